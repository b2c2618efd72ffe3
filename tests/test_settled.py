"""Training on settled labels, on views, and on what the network is sure of."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from als_ext import CorrectionConfig, LabelCorrector, TrainConfig, Trainer
from als_ext.als_lc import AlsLc
from als_ext.checkpoint import load_checkpoint
from als_ext.data import apply_noise, load_dataset
from als_ext.methods import METHODS
from als_ext.models import SmallCNN
from als_ext.settled import SettledLabels

CLASSES, N, SIDE = 10, 240, 16
pytestmark = pytest.mark.usefixtures("one_thread")


def digits(n=N):
    """Real digits, of 16 x 16 pixels; the hardest fifth has wrong labels; true labels."""
    data = load_dataset("digits")
    rows = torch.randperm(len(data.y_train), generator=torch.Generator().manual_seed(0))[:n]
    x = F.interpolate(data.x_train[rows].view(-1, 1, 8, 8), size=(SIDE, SIDE), mode="bilinear")
    true = data.y_train[rows]
    given = apply_noise(true, "hard:0.2", CLASSES, 0, features=x).labels
    return (x - x.mean()) / x.std(), given, true


def trainer(out=None, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallCNN((1, SIDE, SIDE), CLASSES)
    base = {"epochs": 3, "warmup": 1, "period": 1, "batch_size": 32, "device": "cpu"}
    return Trainer(model, TrainConfig(**{**base, **settings}), num_classes=CLASSES, out=out)


@pytest.fixture
def no_evidence(monkeypatch):
    monkeypatch.setattr("als_ext.als_lc.labels_are_evidence", lambda *arguments: False)


def test_targets_are_settled_labels_and_what_the_network_is_sure_of():
    label, settled = torch.tensor([0, 1, 2, 0]), torch.tensor([True, False, False, True])
    index = torch.tensor([1, 3, 2, 1])
    p = torch.tensor([[0.05, 0.91, 0.04], [0.2, 0.2, 0.6], [0.89, 0.1, 0.01], [0.3, 0.4, 0.3]])
    found = SettledLabels(label, settled).targets(p.log() + 3, index)
    assert found.label.tolist() == [1, 0, 0, 1]  # named, settled, named, named
    assert found.plain.tolist() == [0, 1, 0, 0]
    assert found.moved.tolist() == [1, 1, 0, 0]  # sure, settled, neither, neither
    assert not any(part.requires_grad for part in found)


def test_state_goes_and_comes_back():
    one = SettledLabels(torch.tensor([3, 1]), torch.tensor([False, True]))
    two = SettledLabels.from_state_dict(one.state_dict(), torch.device("cpu"))
    logits, index = torch.randn(2, 4), torch.tensor([1, 0])
    for a, b in zip(one.targets(logits, index), two.targets(logits, index), strict=True):
        assert torch.equal(a, b)


def noted(monkeypatch, run, x, given, **settings):
    """Every step's settled labels, its inputs and losses; every correction and its arguments."""
    steps, corrections = [], []
    correct, step = LabelCorrector.step, AlsLc._step_settled

    def correcting(self, x, scores=None, epoch=None, guess=None, **others):
        result = correct(self, x, scores, epoch, guess, **others)
        corrections.append((epoch, scores, guess, others, result))
        return result

    def stepping(self, settled, x, index):
        losses = step(self, settled, x, index)
        steps.append((settled, index, losses))
        return losses

    monkeypatch.setattr(LabelCorrector, "step", correcting)
    monkeypatch.setattr(AlsLc, "_step_settled", stepping)
    return run.fit(x, given, **settings), steps, corrections


def test_what_is_settled_comes_from_votes_alone(monkeypatch, no_evidence):
    x, given, _ = digits()
    run = trainer(settings={"pretrain": 1}, correction=CorrectionConfig(stop_share=0.0))
    result, steps, corrections = noted(monkeypatch, run, x, given)
    # the usual first one is taken back; then warm-up, in between, the end
    assert [epoch for epoch, *_ in corrections] == [1, 1, 2, 3, 4]
    assert [others.get("votes_only", False) for *_, others, _ in corrections] == [False] + 4 * [
        True
    ]
    assert all(scores is None for _, scores, *_ in corrections)
    assert [guess is None for _, _, guess, *_ in corrections] == [True] + 4 * [False]
    a_epoch = math.ceil(N / 32)
    assert len(steps) == 3 * a_epoch
    for number, (settled, _, losses) in enumerate(steps):
        last = corrections[1 + number // a_epoch][-1]
        assert torch.equal(settled.label, last.winner)
        assert torch.equal(settled._settled, last.share == 1)
        assert bool(torch.isfinite(losses).all())
        assert not losses.requires_grad
    assert torch.equal(result.labels, corrections[-1][-1].new_label)


def test_a_step_is_that_of_the_definition(monkeypatch, no_evidence):
    """Weights of the samples are uniform at first; the losses are those of samples and views."""
    x, given, _ = digits(1000)  # six neighbours vote
    run = trainer(settings={"pretrain": 1})
    seen = []

    def step(self, settled, x, index):
        if not seen:
            model = copy.deepcopy(self.task.model)
            monkeypatch.setattr("als_ext.als_lc.move", lambda images: images.flip(3))
            losses = original(self, settled, x, index)
            gradient = [p.grad.clone() for p in self.task.model.parameters()]
            logits, of_views = model(x).double(), model(x.flip(3)).double()
            label, plain, moved = settled.targets(logits, index)
            first = plain * F.cross_entropy(logits, label, reduction="none")
            second = moved * F.cross_entropy(of_views, label, reduction="none")
            (first + second).mean().backward()
            torch.testing.assert_close(
                losses.double(), (first + second).detach(), rtol=1e-5, atol=1e-6
            )
            wanted = [p.grad for p in model.parameters()]
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)
            seen.append(int(plain.sum()))
            return losses
        return original(self, settled, x, index)

    original = AlsLc._step_settled
    monkeypatch.setattr(AlsLc, "_step_settled", step)
    run.fit(x, given)
    assert 0 < seen[0] < 32  # some are settled, some are not


def test_labels_that_are_kept_are_settled(monkeypatch, no_evidence):
    x, given, true = digits()
    kept = (given != true).nonzero()[:10, 0]
    run = trainer(settings={"pretrain": 1})
    result, steps, _ = noted(monkeypatch, run, x, given, kept=kept)
    assert torch.equal(result.labels[kept], given[kept])
    for settled, _, _ in steps:
        assert torch.equal(settled.label[kept], given[kept])
        assert bool(settled._settled[kept].all())


def test_a_run_that_is_cut_goes_on_with_what_was_settled(tmp_path, monkeypatch, no_evidence):
    x, given, true = digits()
    whole = trainer(tmp_path / "whole", settings={"pretrain": 1}).fit(x, given, test=(x, true))
    state = load_checkpoint(tmp_path / "whole" / "checkpoint.pt")
    assert state["method"]["settled"] is None  # what only training needs
    method = METHODS["als-lc"]
    original = method._step_settled
    count = []

    def cut(self, settled, x, index):
        count.append(1)
        if len(count) == 11:
            raise KeyboardInterrupt
        return original(self, settled, x, index)

    run = {"checkpoint_steps": 1, "settings": {"pretrain": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "_step_settled", cut)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / "cut", **run).fit(x, given, test=(x, true))
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["method"]["settled"] is not None
    again = trainer(tmp_path / "cut", **run).fit(x, given, test=(x, true), resume=True)
    assert torch.equal(again.labels, whole.labels)
    assert torch.equal(again.losses, whole.losses)
    assert again.test_accuracy == whole.test_accuracy


def test_mistakes_on_hard_digits_are_corrected(no_evidence):
    x, given, true = digits(1400)
    run = trainer(epochs=12, warmup=4, period=4, settings={"pretrain": 4}, lr=2e-3)
    result = run.fit(x, given, test=(x, true), true_labels=true)
    assert result.label_metrics["label_accuracy_before"] == 0.8
    assert result.label_metrics["label_accuracy_after"] > 0.88  # .91


@pytest.mark.cuda
def test_a_step_on_settled_labels_waits_for_no_gpu(no_evidence):
    x, given, _ = digits()
    runs = [trainer(device="cuda", settings={"pretrain": 1}).fit(x, given) for _ in range(2)]
    assert torch.equal(runs[0].labels, runs[1].labels)
    assert torch.equal(runs[0].losses, runs[1].losses)
    settled = SettledLabels(given.cuda(), torch.ones(N, dtype=torch.bool, device="cuda"))
    logits, index = torch.zeros(32, CLASSES, device="cuda"), torch.arange(32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        settled.targets(logits, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
