"""als-lc on images: an embedding without labels, a first correction, views to train on."""

import copy
import math

import pytest
import torch

from als_ext import TrainConfig, Trainer, correct_labels, ops, pretrain
from als_ext.augment import RandomAffine
from als_ext.contrast import TEMPERATURE, Contrast
from als_ext.embedding import make_embedder
from als_ext.methods import METHODS
from als_ext.models import MLP, SmallCNN
from als_ext.runtime import Amp, reproducible

CLASSES, N, SIDE = 3, 240, 16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Steps this small only wait for a second thread; on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shapes(n=N, seed=0, wrong=0.3):
    """Drawings of three kinds, each turned, stretched and shifted; given and true labels."""
    true = torch.arange(n) % CLASSES
    kinds = torch.zeros(CLASSES, 1, SIDE, SIDE)
    kinds[0, 0, 3:13, 7:9] = 1  # a stroke
    kinds[1, 0, 4:12, 4:12] = 1
    kinds[1, 0, 6:10, 6:10] = 0  # a frame
    kinds[2, 0, 7:9, 3:13] = 1
    kinds[2, 0, 3:13, 7:9] = 1  # a cross
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = RandomAffine(degrees=30.0, stretch=0.2, shear=0.2, shift=0.15)(kinds[true])
        x += 0.2 * torch.randn(x.shape)
        flip = torch.rand(n) < wrong
    return x, torch.where(flip, (true + 1) % CLASSES, true), true


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


def neighbours_agree(model, x, true, k=5):
    """Mean share of the k nearest neighbours that are of a sample's class."""
    x = embedding(model, x)
    _, near = ops.knn(x, x, k, metric="cosine", exclude_self=True)
    return float((true[near] == true[:, None]).double().mean())


def test_the_loss_is_that_of_simclr(monkeypatch):
    first, second = shapes()[0][:7], shapes(seed=1)[0][:7]
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


def test_it_brings_samples_of_a_class_together_and_leaves_the_head_alone():
    x, _, true = shapes()
    model = net()
    head = copy.deepcopy(model.head.state_dict())
    before = neighbours_agree(model, x, true)
    with reproducible(0, CPU):
        model.train()
        contrast = Contrast(model.parameters(), make_embedder(model), CPU, Amp("off", CPU))
        order = torch.cat([torch.randperm(N) for _ in range(10)])
        losses = [float(contrast.step(x[rows], 2e-3).mean()) for rows in order.split(60)]
    after = neighbours_agree(model, x, true)
    assert after > before + 0.1, (before, after)  # .72 to .91 on seed 0
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    for name, value in model.head.state_dict().items():
        assert torch.equal(value, head[name])


def test_a_batch_of_one_sample_changes_nothing_but_moments():
    model = net()
    torch.manual_seed(0)
    contrast = Contrast(model.parameters(), make_embedder(model), CPU, Amp("off", CPU))
    before = copy.deepcopy(model.state_dict())
    assert contrast.step(shapes()[0][:1], 1e-2).tolist() == [0.0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def snapshots(given, **settings):
    """The weights after each epoch, and the result."""
    x, _, true = shapes()
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
    _, given, true = shapes()
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
    assert corrected == [False, True, True, False]
    rates = [record["lr"] for record in result.history]
    steps = 2 * math.ceil(N / 32)
    assert rates[0] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 7 / steps)), rel=1e-12)
    assert rates[1] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 15 / steps)), rel=1e-12)
    assert rates[2] == 1e-3


def test_it_corrects_labels_that_a_third_of_the_samples_have_wrong():
    x, given, true = shapes(n=600)
    result = trainer(epochs=4, settings={"pretrain": 12}, lr=2e-3).fit(
        x, given, test=(x, true), true_labels=true
    )
    figures = result.label_metrics
    assert figures["label_accuracy_before"] < 0.74
    assert figures["label_accuracy_after"] > 0.93, figures
    assert result.test_accuracy > 0.93


def test_pretrain_is_what_als_lc_does_first():
    x, given, _ = shapes()
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
        ({"batch_size": 0}, "batch_size: expected"),
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
        pretrain(model, **{"images": shapes()[0], **settings})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def views_seen(monkeypatch, run, x, given):
    """How many images were moved about in training."""
    count = []
    original = RandomAffine.__call__

    def counting(self, images):
        count.append(len(images))
        return original(self, images)

    monkeypatch.setattr(RandomAffine, "__call__", counting)
    run.fit(x, given)
    return sum(count)


@pytest.mark.parametrize(
    ("method", "settings", "views"),
    [
        ("erm", {}, 0),
        ("erm", {"augment": "affine"}, 2 * N),
        ("als-lc", {}, 3 * 2 * N + 2 * N),  # three epochs of two views, two of one
        ("als-lc", {"augment": "none"}, 3 * 2 * N),
        ("als-lc", {"settings": {"pretrain": 0}}, 2 * N),
        ("als-lc", {"settings": {"pretrain": 0}, "augment": "none"}, 0),
    ],
    ids=str,
)
def test_views_are_made_where_asked_for(monkeypatch, method, settings, views):
    x, given, _ = shapes()
    assert views_seen(monkeypatch, trainer(method=method, **settings), x, given) == views


def test_samples_that_are_no_images_are_taken_as_they_are(monkeypatch):
    x, given, _ = shapes()
    x = x.flatten(1)[:, :20]
    run = trainer(MLP((20,), CLASSES))
    assert views_seen(monkeypatch, run, x, given) == 0
    assert run.fit(x, given).history[0]["suspects"] is not None  # warm-up: 1 epoch
    with pytest.raises(ValueError, match=r"pretrain: expected 0 for samples that are not.*got 2"):
        trainer(MLP((20,), CLASSES), settings={"pretrain": 2}).fit(x, given)
    with pytest.raises(ValueError, match="augment: expected floating images"):
        trainer(MLP((20,), CLASSES), augment="affine").fit(x, given)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="pretrain: expected"):
        trainer(settings={"pretrain": -1})
    with pytest.raises(TypeError, match="pretrain: expected"):
        trainer(settings={"pretrain": 1.5})
    with pytest.raises(ValueError, match="augment: expected"):
        trainer(augment="colour")
