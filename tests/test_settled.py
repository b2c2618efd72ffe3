"""Training on settled labels, on views, and on what the network is sure of."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from als_ext import CorrectionConfig, LabelCorrector, TrainConfig, Trainer
from als_ext.als_lc import AlsLc
from als_ext.checkpoint import load_checkpoint, save_checkpoint
from als_ext.correction.disputes import PropagatedLabels, propagated_labels
from als_ext.data import apply_noise, load_dataset
from als_ext.methods import METHODS
from als_ext.models import SmallCNN
from als_ext.settled import SettledLabels

CLASSES, N, SIDE = 10, 1000, 16  # so many that six neighbours vote
pytestmark = pytest.mark.usefixtures("one_thread")


def digits(n=N):
    """Real digits, of 16 x 16 pixels; the hardest fifth has wrong labels; true labels."""
    data = load_dataset("digits")
    rows = torch.randperm(len(data.y_train), generator=torch.Generator().manual_seed(0))[:n]
    x = F.interpolate(data.x_train[rows].view(-1, 1, 8, 8), size=(SIDE, SIDE), mode="bilinear")
    true = data.y_train[rows]
    given = apply_noise(true, "hard:0.2", CLASSES, 0, features=x).labels
    return (x - x.mean()) / x.std(), given, true


def trainer(out=None, classes=CLASSES, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallCNN((1, SIDE, SIDE), classes)
    base = {"epochs": 3, "warmup": 1, "period": 1, "batch_size": 32, "device": "cpu"}
    return Trainer(model, TrainConfig(**{**base, **settings}), num_classes=classes, out=out)


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

    def stepping(self, settled, x, label, index):
        losses = step(self, settled, x, label, index)
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
        assert 0.2 * N < int(settled._settled.sum()) < N
        assert bool(torch.isfinite(losses).all())
        assert not losses.requires_grad
    assert torch.equal(result.labels, corrections[-1][-1].new_label)


def test_a_step_is_that_of_the_definition(monkeypatch, no_evidence):
    """Weights of the samples are uniform at first; what it returns is against the labels now."""
    x, given, _ = digits()
    run = trainer(settings={"pretrain": 1})
    monkeypatch.setattr("als_ext.als_lc._MOVE", lambda images: images.flip(3))
    seen = []

    def step(self, settled, x, label, index):
        model = copy.deepcopy(self.task.model)
        losses = original(self, settled, x, label, index)
        if seen:
            return losses
        gradient = [p.grad.clone() for p in self.task.model.parameters()]
        logits, of_views = model(x).double(), model(x.flip(3)).double()
        target, plain, moved = settled.targets(logits, index)
        first = plain * F.cross_entropy(logits, target, reduction="none")
        second = moved * F.cross_entropy(of_views, target, reduction="none")
        (first + second).mean().backward()
        wanted = [p.grad for p in model.parameters()]
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)
        against = F.cross_entropy(logits, label, reduction="none")
        torch.testing.assert_close(losses.double(), against.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(label, self.task.labels[index])
        seen.append(int(plain.sum()))
        return losses

    original = AlsLc._step_settled
    monkeypatch.setattr(AlsLc, "_step_settled", step)
    run.fit(x, given)
    assert 0 < seen[0] < 32  # some are settled, some are not


def test_labels_that_are_kept_are_settled(monkeypatch, no_evidence):
    x, given, true = digits()
    kept = (given != true).nonzero()[:10, 0]
    run = trainer(settings={"pretrain": 1})
    guesses = []

    def spreading(x, given, guess, num_classes, config):
        guesses.append(guess)
        return propagated_labels(x, given, guess, num_classes, config)

    monkeypatch.setattr("als_ext.als_lc.propagated_labels", spreading)
    result, steps, corrections = noted(monkeypatch, run, x, given, kept=kept)
    assert torch.equal(result.labels[kept], given[kept])
    assert not torch.equal(corrections[0][-1].guess[kept], given[kept])
    assert torch.equal(guesses[0][kept], given[kept])  # so they vote from the start
    for settled, _, _ in steps:
        assert torch.equal(settled.label[kept], given[kept])
        assert bool(settled._settled[kept].all())
        assert not bool(settled._settled.all())


def test_a_run_that_is_cut_goes_on_with_what_was_settled(tmp_path, monkeypatch, no_evidence):
    x, given, true = digits()
    whole = trainer(tmp_path / "whole", settings={"pretrain": 1}).fit(x, given, test=(x, true))
    state = load_checkpoint(tmp_path / "whole" / "checkpoint.pt")
    assert state["method"]["settled"] is None  # what only training needs
    method = METHODS["als-lc"]
    original = method._step_settled
    count = []

    def cut(self, settled, x, label, index):
        count.append(1)
        if len(count) == 41:
            raise KeyboardInterrupt
        return original(self, settled, x, label, index)

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


def test_a_checkpoint_from_before_there_were_settled_labels_goes_on(tmp_path):
    x, given, _ = digits(240)
    run = {"settings": {"pretrain": 1}, "checkpoint_steps": 1}
    whole = trainer(tmp_path / "whole", **run).fit(x, given)
    original, count = AlsLc._step_through, []

    def cut(self, channel, x, index):
        count.append(1)
        if len(count) == 11:
            raise KeyboardInterrupt
        return original(self, channel, x, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlsLc, "_step_through", cut)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / "cut", **run).fit(x, given)
    path = tmp_path / "cut" / "checkpoint.pt"
    state = load_checkpoint(path)
    del state["method"]["settled"]
    save_checkpoint(path, state)
    again = trainer(tmp_path / "cut", **run).fit(x, given, resume=True)
    assert torch.equal(again.losses, whole.losses)


def bars(n=1200, seed=0):
    """Noisy images of a bar, on the left or on the right; where; which."""
    g = torch.Generator().manual_seed(seed)
    at = 2 + 12 * torch.rand(n, generator=g)
    x = (-(torch.arange(16.0) - at[:, None]).square() / 4).exp()[:, None, None, :]
    x = x + 0.5 * torch.randn(n, 1, SIDE, SIDE, generator=g)
    return (x - x.mean()) / x.std(), at, (at > 8).long()


def on_bars(given, x, true):
    run = trainer(classes=2, settings={"pretrain": 2})
    result = run.fit(x, given, true_labels=true)
    heard = {r["evidence"] for r in result.history if r["suspects"] is not None}
    return result.label_metrics["label_accuracy_after"], heard, run._method.corrector.history


def test_mistakes_at_the_border_are_told_from_others(monkeypatch):
    """Nothing is faked: bars near the middle of the image are called by the wrong side's name."""
    x, at, true = bars()
    border = torch.where((at - 8).abs() < 0.8, 1 - true, true)
    assert 0.12 < float((border != true).double().mean()) < 0.14
    after, heard, history = on_bars(border, x, true)
    assert heard == {0}
    assert after > 0.95  # .97
    taken_back = history.epoch == -1  # of the first correction, which listened
    assert torch.equal(history.step[taken_back], torch.zeros_like(history.step[taken_back]))
    scattered = torch.rand(len(x), generator=torch.Generator().manual_seed(3)) < 0.2
    assert on_bars(true, x, true)[:2] == (1.0, {1})
    after, heard, _ = on_bars(torch.where(scattered, 1 - true, true), x, true)
    assert heard == {1}
    assert after > 0.96
    # believing the labels at the border leaves more of them wrong
    monkeypatch.setattr("als_ext.als_lc.labels_are_evidence", lambda *arguments: True)
    assert on_bars(border, x, true)[0] < 0.93


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_mistakes_on_hard_digits_are_corrected(no_evidence, amp):
    x, given, true = digits(1400)
    run = trainer(epochs=12, warmup=4, period=4, settings={"pretrain": 4}, lr=2e-3, amp=amp)
    result = run.fit(x, given, test=(x, true), true_labels=true)
    assert result.label_metrics["label_accuracy_before"] == 0.8
    assert result.label_metrics["label_accuracy_after"] > 0.85  # .91, .88 in bfloat16


def test_given_labels_are_heard_after_all_where_a_class_would_go_under(monkeypatch, no_evidence):
    def without_three(x, given, guess, num_classes, config):
        return PropagatedLabels(torch.where(guess == 3, 4, guess), guess)

    x, given, _ = digits()
    monkeypatch.setattr("als_ext.als_lc.propagated_labels", without_three)
    run = trainer(settings={"pretrain": 1})
    result, steps, corrections = noted(monkeypatch, run, x, given)
    assert not steps
    assert result.history[0]["evidence"] == 1
    first, alone, again, *_ = (result for *_, result in corrections)
    assert not bool((alone.winner == 3).any())
    assert torch.equal(again.winner, first.winner)
    assert [others.get("votes_only", False) for *_, others, _ in corrections[:4]] == [
        *(False, True),
        *(False, False),
    ]


def test_a_later_correction_that_loses_a_class_is_made_again_from_what_was_settled(
    monkeypatch, no_evidence
):
    x, given, _ = digits()
    correct, guesses = LabelCorrector.step, []

    def losing(self, x, scores=None, epoch=None, guess=None, **others):
        result = correct(self, x, scores, epoch, guess, **others)
        guesses.append(guess)
        if len(guesses) != 3:
            return result
        return dataclasses.replace(result, winner=torch.where(result.winner == 3, 4, result.winner))

    monkeypatch.setattr(LabelCorrector, "step", losing)
    run = trainer(epochs=2, settings={"pretrain": 1}, correction=CorrectionConfig(stop_share=0.0))
    _, steps, corrections = noted(monkeypatch, run, x, given)
    assert [epoch for epoch, *_ in corrections] == [1, 1, 2, 2, 3]
    assert torch.equal(guesses[3], steps[0][0].label)
    assert torch.equal(steps[-1][0].label, corrections[3][-1].winner)
    assert bool((steps[-1][0].label == 3).any())


@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["off", "bf16", "f16"])
def test_a_step_on_settled_labels_waits_for_no_gpu(no_evidence, monkeypatch, amp):
    x, given, _ = digits()
    original = AlsLc._step_settled

    def watched(self, settled, x, label, index):
        if amp == "f16":  # a gradient scaler looks at the gradients
            return original(self, settled, x, label, index)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(self, settled, x, label, index)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(AlsLc, "_step_settled", watched)
    settings = {"device": "cuda", "amp": amp, "settings": {"pretrain": 1}}
    runs = [trainer(**settings).fit(x, given) for _ in range(2)]
    assert torch.equal(runs[0].labels, runs[1].labels)
    assert torch.equal(runs[0].losses, runs[1].losses)
