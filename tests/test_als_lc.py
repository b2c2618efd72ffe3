"""als-lc on images: an embedding without labels, a first correction, views to train on."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn.functional import interpolate, normalize, one_hot
from torch.utils.data import TensorDataset

from als_ext import (
    CorrectionConfig,
    LabelCorrector,
    TrainConfig,
    Trainer,
    correct_labels,
    pretrain,
)
from als_ext.als_lc import AlsLc, _few_pixels
from als_ext.augment import RandomAffine, RandomShift
from als_ext.checkpoint import load_checkpoint
from als_ext.contrast import TEMPERATURE, Contrast, view
from als_ext.data import load_dataset
from als_ext.embedding import make_embedder
from als_ext.forward import LocalChannel
from als_ext.methods import METHODS
from als_ext.models import MLP, SmallCNN
from als_ext.runtime import Amp

CLASSES, N, SIDE = 10, 240, 16
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def digits(n=N, seed=0, wrong=0.3):
    """Real digits, of 16 x 16 pixels; given labels of which a share is wrong, true labels."""
    data = load_dataset("digits")
    g = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data.y_train), generator=g)[:n]
    x = interpolate(data.x_train[rows].view(-1, 1, 8, 8), size=(SIDE, SIDE), mode="bilinear")
    true = data.y_train[rows]
    flip = torch.rand(n, generator=g) < wrong
    return (x - x.mean()) / x.std(), torch.where(flip, (true + 1) % CLASSES, true), true


def net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallCNN((1, SIDE, SIDE), CLASSES)


def trainer(model=None, out=None, method="als-lc", **settings):
    base = {"epochs": 2, "warmup": 1, "period": 1, "batch_size": 32, "device": "cpu"}
    config = TrainConfig(method=method, **{**base, **settings})
    return Trainer(model or net(), config, num_classes=CLASSES, out=out)


def embedding(model, x):
    model.eval()
    with torch.no_grad():
        return make_embedder(model)(x)


def partners_nearer(model, x):
    """How often a view is nearer to the other of its image than to one of another image."""
    torch.manual_seed(7)
    z = normalize(embedding(model, torch.cat([view(x), view(x)])), dim=1)
    cosine = z @ z.T
    at = torch.arange(2 * len(x))
    partner = cosine[at, at.roll(len(x))]
    return float((cosine < partner[:, None]).double().mean())


@pytest.mark.parametrize("kind", [lambda x: x.numpy(), TensorDataset, lambda x: list(x.numpy())])
def test_images_are_images_whatever_they_come_in(kind):
    x, given, true = digits()
    one, other = trainer(), trainer()
    expected = one.fit(x, given, test=(x, true))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    result = other.fit(kind(x), given.numpy(), test=(x.numpy(), true.numpy()))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(result.history) == 5, "three epochs without labels"
    assert result.test_accuracy == expected.test_accuracy
    assert torch.equal(result.labels, expected.labels)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_the_loss_is_that_of_simclr(monkeypatch):
    first, second = digits()[0][:7], digits(seed=1)[0][:7]
    views = iter((first, second))
    monkeypatch.setattr("als_ext.contrast.view", lambda x: next(views))
    model = net()
    embed = make_embedder(model)
    torch.manual_seed(0)
    contrast = Contrast(model.parameters(), embed, CPU, Amp("off", CPU))
    contrast._start(128)
    with torch.no_grad():
        z = contrast._projector(embed(torch.cat([first, second]))).double()
    z = z / z.norm(dim=1, keepdim=True)
    wanted = []
    for i in range(14):
        others = [j for j in range(14) if j != i]
        scores = torch.stack([z[i] @ z[j] / TEMPERATURE for j in others])
        wanted.append(scores.logsumexp(0) - z[i] @ z[(i + 7) % 14] / TEMPERATURE)
    losses = contrast.step(first, 1e-3)
    torch.testing.assert_close(
        losses.double(), torch.stack(wanted).view(2, 7).mean(0), rtol=1e-5, atol=1e-5
    )


def test_views_of_unseen_images_find_each_other_and_the_head_is_left_alone():
    x, _, _ = digits(n=600)
    model = net()
    head = copy.deepcopy(model.head.state_dict())
    before = partners_nearer(model, x[400:])
    losses = pretrain(model, x[:400], epochs=12, batch_size=50, lr=2e-3, device="cpu")
    after = partners_nearer(model, x[400:])
    assert after > before + 0.1, (before, after)  # .64 to .84; .15 more on two other seeds
    assert losses[-1] < 0.8 * losses[0]
    for name, value in model.head.state_dict().items():
        assert torch.equal(value, head[name])


def test_a_batch_of_one_sample_changes_nothing_but_moments():
    model = net()
    torch.manual_seed(0)
    contrast = Contrast(model.parameters(), make_embedder(model), CPU, Amp("off", CPU))
    before = copy.deepcopy(dict(model.named_parameters()))
    assert contrast.step(digits()[0][:1], 1e-2).tolist() == [0.0]
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def snapshots(given, **settings):
    """The weights after each epoch, and the result."""
    x, _, true = digits()
    run, seen = trainer(**settings), []
    method = METHODS["als-lc"]
    original = method.after_epoch

    def noting(self, epoch, losses):
        seen.append(copy.deepcopy(self.task.model.state_dict()))
        return original(self, epoch, losses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "after_epoch", noting)
        result = run.fit(x, given, test=(x, true), true_labels=true)
    return seen, result


def test_labels_play_no_part_until_the_first_correction():
    _, given, true = digits()
    settings = {"settings": {"pretrain": 2}}
    (first, result), (second, _) = snapshots(given, **settings), snapshots(true, **settings)
    for epoch in (0, 1):
        for name, value in first[epoch].items():
            assert torch.equal(value, second[epoch][name]), (epoch, name)
    assert any(not torch.equal(value, second[2][name]) for name, value in first[2].items())
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4]
    measured = [record["test_accuracy"] is not None for record in result.history]
    corrected = [record["suspects"] is not None for record in result.history]
    assert measured == [False, False, True, True]
    assert corrected == [False, True, True, True]  # after the last epoch as well
    rates = [record["lr"] for record in result.history]
    steps = 2 * math.ceil(N / 32)
    assert rates[0] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 7 / steps)), rel=1e-12)
    assert rates[1] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 15 / steps)), rel=1e-12)
    # the warm-up is one epoch here, the rest another: a half cosine each
    assert rates[2] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 7 / 8)), rel=1e-12)
    assert rates[3] == rates[2]


def test_a_constant_learning_rate_has_no_phases():
    x, given, _ = digits()
    result = trainer(lr_schedule="constant", settings={"pretrain": 2}).fit(x, given)
    rates = [record["lr"] for record in result.history]
    assert rates[1] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 15 / 16)), rel=1e-12)
    assert rates[2:] == [1e-3, 1e-3]


def channels(monkeypatch, run, x, given, **settings):
    """The channels in the order of the steps through them, and all corrections."""
    corrections, seen = [], []
    correct, original = LabelCorrector.step, AlsLc._step_through

    def keeping(self, *arguments):
        corrections.append(correct(self, *arguments))
        return corrections[-1]

    def noting(self, channel, x, index):
        assert not torch.equal(self.task.labels, given)  # corrected labels are there ...
        assert channel._given.data_ptr() != self.task.labels.data_ptr()
        assert torch.equal(channel._given, given)  # ... and play no part
        seen.append(channel)
        return original(self, channel, x, index)

    monkeypatch.setattr(LabelCorrector, "step", keeping)
    monkeypatch.setattr(AlsLc, "_step_through", noting)
    run.fit(x, given, **settings)
    return seen, corrections


def test_given_labels_are_learned_through_the_channel_of_the_last_correction(monkeypatch):
    """What all neighbours agree on is trusted by the share of wrong labels, after the warm-up."""
    x, given, _ = digits(1000)  # six neighbours vote
    run = trainer(epochs=3, warmup=2, settings={"pretrain": 1})
    seen, corrections = channels(monkeypatch, run, x, given)
    steps = math.ceil(1000 / 32)
    assert len(seen) == 3 * steps
    assert len(corrections) == 3  # before labels, after the warm-up, at the end
    for channel, result in ((seen[0], corrections[0]), (seen[-1], corrections[1])):
        assert torch.equal(channel.winner, result.winner)
        assert torch.equal(channel._log_channel, result.channel.log())
    assert all(channel is seen[0] for channel in seen[: 2 * steps])
    assert all(channel is seen[-1] for channel in seen[2 * steps :])
    assert not seen[0]._trust.any()
    agreed = corrections[1].share == 1
    assert 250 < int(agreed.sum()) < 1000
    right = corrections[1].channel.diagonal()[corrections[1].winner]
    assert torch.equal(seen[-1]._trust, torch.where(agreed, 1 - right, 0.0))
    assert float(seen[-1]._trust.max()) > 0.2  # .3 of the labels are wrong


def test_labels_that_are_kept_are_trusted_from_the_first_correction_on(monkeypatch):
    x, given, true = digits()
    kept = (given == true).nonzero()[:20, 0]
    run = trainer(settings={"pretrain": 1})
    seen, _ = channels(monkeypatch, run, x, given, kept=kept)
    assert len(seen) == 2 * math.ceil(N / 32)
    for channel in seen:
        assert torch.equal(channel.winner[kept], given[kept])
        assert torch.equal(channel._trust[kept], torch.ones(20))


@pytest.mark.parametrize(("epochs", "viewed"), [(2, []), (3, [2]), (6, [2, 3])])
def test_views_come_in_the_first_half_of_what_follows_the_warm_up(monkeypatch, epochs, viewed):
    """Also where corrections have ended."""
    x, _, true = digits()
    shifted = []
    shift = RandomShift.__call__

    def counting(self, images):
        shifted.extend([run._method._finished] * len(images))
        return shift(self, images)

    monkeypatch.setattr(RandomShift, "__call__", counting)
    settings = CorrectionConfig(stop_share=1.0)
    run = trainer(epochs=epochs, correction=settings, settings={"pretrain": 1})
    history = run.fit(x, true).history
    assert [record["suspects"] is not None for record in history] == [True] + [False] * epochs
    assert shifted == [epoch for epoch in viewed for _ in range(N)]


def corrections_of(monkeypatch, run, x, given, change=lambda at, winner: winner):
    """Epoch, guess and winner of every correction; ``change`` makes other winners of them."""
    seen = []
    original = LabelCorrector.step

    def noting(self, embeddings, scores=None, epoch=None, guess=None, **others):
        result = original(self, embeddings, scores, epoch, guess, **others)
        result = dataclasses.replace(result, winner=change(len(seen), result.winner))
        seen.append((epoch, guess, result.winner))
        return result

    monkeypatch.setattr(LabelCorrector, "step", noting)
    run.fit(x, given)
    return seen


def without(label, share, mistaken=3):
    """A share of the samples of one class, of at least five, is taken for the next."""
    members = (label == mistaken).nonzero()[:, 0]
    assert len(members) >= 5
    label = label.clone()
    label[members[: round(share * len(members))]] = mistaken + 1
    return label


@pytest.mark.parametrize("lost", [False, True])
def test_a_class_that_the_network_lost_is_not_forgotten(monkeypatch, lost):
    """Then the correction before is the guess of the next one, not the predictions."""
    x, given, _ = digits()
    first = []

    def predict(self, x):
        return one_hot(without(first[0], 1.0 if lost else 0.5), CLASSES).float()

    def keep(at, winner):
        first.append(winner)
        return winner

    monkeypatch.setattr(AlsLc, "predict", predict)
    run = trainer(epochs=2, settings={"pretrain": 1})
    seen = corrections_of(monkeypatch, run, x, given, keep)
    assert [guess is None for _, guess, _ in seen] == [True, False, False]
    assert torch.equal(seen[1][1], first[0] if lost else without(first[0], 0.5))


@pytest.mark.parametrize("lost", [False, True])
def test_a_correction_that_loses_a_class_is_taken_back(monkeypatch, lost):
    """Those in between start afresh, and again from the predictions where a class is lost."""
    x, given, _ = digits()
    run = trainer(epochs=3, warmup=1, correction=CorrectionConfig(stop_share=0.0))

    def change(at, winner):
        return without(winner, 0.9 if lost else 0.5) if at == 2 else winner

    seen = corrections_of(monkeypatch, run, x, given, change)
    again = [(5, True)] if lost else []
    wanted = [(3, False), (4, True), (5, False), *again, (6, True)]
    assert [(epoch, guess is not None) for epoch, guess, _ in seen] == wanted
    corrector = run._method.corrector
    history = corrector.history
    assert bool((history.epoch == -1).any()) is lost


def test_without_epochs_without_labels_nothing_goes_through_the_channel(monkeypatch):
    def refuse(self, channel, x, index):
        raise AssertionError("a step through a channel that nobody has estimated")

    x, given, _ = digits()
    monkeypatch.setattr(AlsLc, "_step_through", refuse)
    result = trainer(epochs=3, settings={"pretrain": 0}).fit(x, given)
    assert [record["suspects"] is not None for record in result.history] == [True, True, False]


def test_it_corrects_labels_that_a_third_of_the_samples_have_wrong():
    x, given, true = digits(n=1000)
    result = trainer(epochs=12, warmup=4, period=4, settings={"pretrain": 4}, lr=2e-3).fit(
        x, given, test=(x, true), true_labels=true
    )
    figures = result.label_metrics
    assert figures["label_accuracy_before"] < 0.74
    assert figures["label_accuracy_after"] > 0.93, figures
    assert result.test_accuracy > 0.93
    first = next(record for record in result.history if record["suspects"] is not None)
    assert first["epoch"] == 4
    assert first["label_accuracy"] > 0.9


def test_first_neighbours_are_by_a_mean_of_two_cosines(monkeypatch):
    x, given, _ = digits()
    seen = []
    original = LabelCorrector.step

    def noting(self, embeddings, scores=None, epoch=None, guess=None):
        seen.append((embeddings.shape[1], scores is None, guess is None))
        return original(self, embeddings, scores, epoch, guess)

    monkeypatch.setattr(LabelCorrector, "step", noting)
    run = trainer(settings={"pretrain": 1})
    run.fit(x, given)
    assert seen == [(50 + 128, True, True), (128, False, False), (128, False, False)]
    both = run._method._without_labels().double()
    learned = normalize(run.embeddings().double(), dim=1)
    centred = x.flatten(1).double()
    centred = centred - centred.mean(0)
    pixels = normalize(centred @ torch.linalg.svd(centred).Vh[:50].T, dim=1)
    wanted = 0.65 * learned @ learned.T + 0.35 * pixels @ pixels.T
    torch.testing.assert_close(both @ both.T, wanted, rtol=0, atol=1e-5)


def test_pretrain_is_what_als_lc_does_first():
    x, given, _ = digits()
    seen, _ = snapshots(given, settings={"pretrain": 2})
    model = net()
    before = torch.get_rng_state()
    losses = pretrain(model, x, epochs=2, batch_size=32, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert losses[1] < losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[1][name]), name
    result = correct_labels(embedding(model, x), given)
    assert result.neighbours.shape[0] == N


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected"),
        ({"batch_size": 1}, "batch_size: expected >= 2"),
        ({"lr": 0.0}, "lr: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"amp": "f8"}, "amp: expected"),
        ({"layer": "trunk"}, "embedding: expected one of the layers"),
        ({"images": torch.rand(5, 16)}, r"images: expected floating \[n, C, H, W\]"),
        ({"images": torch.rand(0, 1, 16, 16)}, "expected at least one sample"),
    ],
    ids=str,
)
def test_pretrain_checks_its_arguments(settings, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pretrain(model, **{"images": digits()[0], **settings})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pretrain_leaves_the_model_as_a_training_loop_wants_it():
    x, _, _ = digits()
    model = net()
    model.features[0].eval()
    pretrain(model, x, epochs=1, device="cpu")
    assert [m.training for m in model.features[:2]] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="loss: expected a finite mean, got nan in epoch 1"):
        pretrain(model, x * float("nan"), epochs=2, device="cpu")
    assert [m.training for m in model.features[:2]] == [False, True]
    with pytest.raises(TypeError, match="images: expected a tensor, got ndarray"):
        pretrain(model, x.numpy())


def test_bfloat16_learns_as_well():
    x, _, _ = digits(n=400)
    losses = [
        pretrain(net(), x, epochs=6, batch_size=50, lr=2e-3, device="cpu", amp=amp)[-1]
        for amp in ("off", "bf16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["off", "bf16", "f16"])
def test_a_step_on_images_waits_for_no_gpu_and_repeats(amp):
    x, given, true = digits()
    runs = [trainer(device="cuda", amp=amp).fit(x, given, test=(x, true)) for _ in range(2)]
    assert torch.equal(runs[0].labels, runs[1].labels)
    assert torch.equal(runs[0].losses, runs[1].losses)
    result = correct_labels(x.flatten(1).cuda(), given.cuda(), num_classes=CLASSES)
    trust = torch.ones(N, device="cuda")
    channel = LocalChannel(result, given.cuda(), result.winner, trust)
    logits, index = torch.zeros(32, CLASSES, device="cuda"), torch.arange(32, device="cuda")
    model = net().cuda()
    device = torch.device("cuda")
    contrast = Contrast(model.parameters(), make_embedder(model), device, Amp("bf16", device))
    batch = x[:32].cuda()
    contrast.step(batch, 1e-3)  # makes the projection
    torch.cuda.set_sync_debug_mode("error")
    try:
        contrast.step(batch, 1e-3)
        RandomAffine()(batch)
        channel.losses(logits, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_only_training_needs_is_not_kept(tmp_path):
    x, given, _ = digits()
    trainer(out=tmp_path, settings={"pretrain": 1}).fit(x, given)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["method"]["contrast"] == {"width": None}
    assert state["method"]["channel"] is None


def test_pixels_of_large_images_are_few():
    assert _few_pixels(torch.rand(2, 3, 64, 20)).shape == (2, 3 * 32 * 20)
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(_few_pixels(x), x.flatten(1))


def views_seen(monkeypatch, run, x, given):
    """How many images were moved about in training: affinely, by a shift."""
    count = {"RandomAffine": 0, "RandomShift": 0}

    def counted(original):
        def counting(self, images):
            count[type(self).__name__] += len(images)
            return original(self, images)

        return counting

    for kind in (RandomAffine, RandomShift):
        monkeypatch.setattr(kind, "__call__", counted(kind.__call__))
    run.fit(x, given)
    return count["RandomAffine"], count["RandomShift"]


@pytest.mark.parametrize(
    ("method", "settings", "views"),
    [
        ("erm", {}, (0, 0)),
        ("erm", {"augment": "affine"}, (2 * N, 0)),
        ("erm", {"augment": "shift"}, (0, 2 * N)),
        # three epochs of two views, one of none, one of one, one of none
        ("als-lc", {"epochs": 3}, (3 * 2 * N, N)),
        ("als-lc", {"epochs": 3, "augment": "affine"}, (3 * 2 * N + N, 0)),
        ("als-lc", {"augment": "none"}, (3 * 2 * N, 0)),
        ("als-lc", {"settings": {"pretrain": 0}}, (0, 2 * N)),
        ("als-lc", {"settings": {"pretrain": 0}, "augment": "none"}, (0, 0)),
    ],
    ids=str,
)
def test_views_are_made_where_asked_for(monkeypatch, method, settings, views):
    x, given, _ = digits()
    assert views_seen(monkeypatch, trainer(method=method, **settings), x, given) == views


class OfBytes(SmallCNN):
    """Takes bytes, as images often come."""

    def embed(self, x):
        return super().embed(x.float() / 255)


def test_images_of_bytes_are_trained_on_as_they_are(monkeypatch):
    x, given, _ = digits()
    x = (40 * (x + 2)).clamp(0, 255).byte()
    run = trainer(OfBytes((1, SIDE, SIDE), CLASSES))
    assert views_seen(monkeypatch, run, x, given) == (0, 0)
    with pytest.raises(ValueError, match="pretrain: expected 0 for samples that are no float"):
        trainer(OfBytes((1, SIDE, SIDE), CLASSES), settings={"pretrain": 1}).fit(x, given)


def test_samples_that_are_no_images_are_taken_as_they_are(monkeypatch):
    x, given, _ = digits()
    x = x.flatten(1)[:, :20]
    run = trainer(MLP((20,), CLASSES))
    assert views_seen(monkeypatch, run, x, given) == (0, 0)
    assert run.fit(x, given).history[0]["suspects"] is not None  # warm-up: 1 epoch
    with pytest.raises(ValueError, match=r"pretrain: expected 0 for samples that are no .*got 2"):
        trainer(MLP((20,), CLASSES), settings={"pretrain": 2}).fit(x, given)
    with pytest.raises(ValueError, match="augment: expected floating images"):
        trainer(MLP((20,), CLASSES), augment="affine").fit(x, given)


@pytest.mark.parametrize("suspects", ["score", 0.2])
def test_suspects_by_score_want_scores_from_the_first_correction_on(suspects):
    x, given, _ = digits()
    correction = CorrectionConfig(suspects=suspects)
    with pytest.raises(ValueError, match=r"pretrain: expected 0 with correction.suspects="):
        trainer(correction=correction).fit(x, given)
    settings = {"correction": correction, "settings": {"pretrain": 0}}
    assert trainer(**settings).fit(x, given).history[0]["suspects"] > 0


def test_settings_are_checked():
    with pytest.raises(ValueError, match="pretrain: expected"):
        trainer(settings={"pretrain": -1})
    with pytest.raises(TypeError, match="pretrain: expected"):
        trainer(settings={"pretrain": 1.5})
    with pytest.raises(ValueError, match="augment: expected"):
        trainer(augment="colour")
