"""The Trainer: what it learns, what it measures, what it leaves alone, what it refuses."""

import csv
import io
import json
import os
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset, TensorDataset

from als_ext import LabelCorrector, TrainConfig, Trainer
from als_ext.embedding import make_embedder
from als_ext.methods import ERM, METHODS, Method
from als_ext.metrics import FIELDS, MetricsWriter, label_metrics
from als_ext.models import MLP, SmallCNN, build_model
from als_ext.progress import ProgressBar
from als_ext.runtime import Amp, reproducible, rng_state

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 4


def blobs(n=400, wrong=0.3, seed=0):
    """Points around the corners of a square, labels of which a share is wrong."""
    g = torch.Generator().manual_seed(seed)
    true = torch.arange(n) % CLASSES
    corner = torch.tensor([[0.0, 0.0], [0.0, 6.0], [6.0, 0.0], [6.0, 6.0]])
    x = corner[true] - 3 + torch.randn(n, 2, generator=g)
    given = true.clone()
    flip = torch.randperm(n, generator=g)[: round(wrong * n)]
    given[flip] = (true[flip] + torch.randint(1, CLASSES, (len(flip),), generator=g)) % CLASSES
    return x, given, true


def net(seed=0, dropout=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MLP((2,), CLASSES, hidden=(32, 16))
    if dropout:
        model.features.append(nn.Dropout(dropout))
    return model


def config(method="erm", **settings):
    base = {"epochs": 6, "batch_size": 32, "warmup": 2, "period": 2, "lr": 5e-3, "device": "cpu"}
    return TrainConfig(**{"method": method, **base, **settings})


def fit(method="erm", model=None, x=None, given=None, true=None, out=None, **settings):
    if x is None:
        x, given, true = blobs()
    trainer = Trainer(model or net(), config(method, **settings), num_classes=CLASSES, out=out)
    return trainer, trainer.fit(x, given, test=(x, true), true_labels=true)


@pytest.mark.parametrize("method", ["erm", "also", "als-lc"])
def test_every_method_learns(method):
    _, result = fit(method)
    assert result.test_accuracy > 0.97
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4, 5, 6]
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_correction_finds_the_wrong_labels_and_keeps_the_right_ones():
    x, given, true = blobs(n=1000, wrong=0.4)
    _, result = fit("als-lc", x=x, given=given, true=true)
    figures = result.label_metrics
    assert figures["label_accuracy_before"] == pytest.approx(0.6)
    assert figures["label_accuracy_after"] > 0.98
    assert figures["relabel_precision"] > 0.98
    assert figures["relabel_recall"] > 0.98
    assert set(result.report) == {"share", "margin", "suspect"}
    assert all(value.shape == (1000,) for value in result.report.values())
    changed = result.labels != result.given_labels
    assert result.report["suspect"][changed].all()
    assert result.history[-1]["changed"] == int(changed.sum())
    assert result.history[1]["suspects"] is not None
    assert result.history[0]["suspects"] is None


@pytest.mark.parametrize("direction", ["max", "min"])
def test_scores_are_high_for_wrong_labels_and_start_again_after_a_relabel(monkeypatch, direction):
    x, given, true = blobs()
    correct, seen = LabelCorrector.step, []

    def watched(self, embeddings, scores, epoch, *guess):
        result = correct(self, embeddings, scores, epoch, *guess)
        seen.append((scores, result.changed, epoch))
        return result

    after_epoch, log_pis = METHODS["als-lc"].after_epoch, []

    def recording(self, epoch, losses):
        extra = after_epoch(self, epoch, losses)
        log_pis.append(self.optimizer.weights.log_pi())
        return extra

    monkeypatch.setattr(LabelCorrector, "step", watched)
    monkeypatch.setattr(METHODS["als-lc"], "after_epoch", recording)
    fit("als-lc", x=x, given=given, true=true, also={"direction": direction, "pi_lr": 0.01})
    scores, changed, epoch = seen[0]
    assert epoch == 2
    wrong = given != true
    assert scores[wrong].mean() > scores[~wrong].mean() + 0.005  # two epochs of losses, times 0.01
    log_pi = log_pis[1]
    assert changed.sum() > 50
    assert log_pi[changed].unique().numel() == 1
    assert log_pi[~changed].unique().numel() > 50


def test_methods_without_correction_leave_labels_alone():
    _, result = fit("also")
    assert torch.equal(result.labels, result.given_labels)
    assert result.report is None
    assert result.label_metrics["relabel_precision"] is None
    assert result.label_metrics["relabel_recall"] == 0.0


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    first, same, other = (fit("als-lc", seed=seed)[0].model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_global_state_is_left_as_it_was():
    torch.manual_seed(5)
    before = rng_state(torch.device("cpu"))
    fit("als-lc", model=net(dropout=0.5))
    after = rng_state(torch.device("cpu"))
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_callers_labels_are_left_as_they_were():
    x, given, true = blobs()
    kept = given.clone()
    fit("als-lc", x=x, given=given, true=true)
    assert torch.equal(given, kept)


class Pairs(Dataset):
    def __init__(self, x, y):
        self.x, self.targets = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, at):
        return self.x[at], self.targets[at]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_trains_like_tensors(workers):
    x, given, true = blobs(n=200)
    expected_trainer, expected = fit("als-lc", x=x, given=given, true=true, epochs=3)
    model = net()
    settings = config("als-lc", epochs=3, num_workers=workers)
    trainer = Trainer(model, settings, num_classes=CLASSES)
    result = trainer.fit(Pairs(x, given), test=TensorDataset(x, true), true_labels=true)
    assert torch.equal(result.labels, expected.labels)
    assert result.test_accuracy == expected.test_accuracy
    for name, value in expected_trainer.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_embeddings_come_from_plain_samples_where_given():
    x, given, _ = blobs(n=80)
    trainer = Trainer(net(), config("erm", epochs=1), num_classes=CLASSES)
    trainer.fit(Pairs(x + 100, given), plain=Pairs(x, given))
    with torch.no_grad():
        assert torch.equal(trainer.embeddings(), trainer.model.embed(x))


def test_a_named_layer_gives_what_the_models_function_gives():
    model, x = net(), blobs()[0]
    assert torch.equal(make_embedder(model, "features")(x), model.embed(x))
    assert torch.equal(make_embedder(model, "head")(x), model(x))
    by_name, by_function = (fit("als-lc", embedding=e)[1] for e in ("features", None))
    assert torch.equal(by_name.labels, by_function.labels)
    assert not model.features._forward_hooks


def test_embeddings_are_flat_float32():
    model = SmallCNN((1, 12, 12), 3).double()
    embedding = make_embedder(model, "features.0")(torch.zeros(2, 1, 12, 12, dtype=torch.float64))
    assert embedding.shape == (2, 32 * 10 * 10)
    assert embedding.dtype == torch.float32


class Viewing(nn.Module):
    """Looks at its images as they lie in memory, as many models do."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(3 * 2 * 2, 8)
        self.head = nn.Linear(8, CLASSES)

    def embed(self, x):
        return self.features(x.view(x.shape[0], -1)).relu()

    def forward(self, x):
        return self.head(self.embed(x))


@pytest.mark.parametrize("layer", [None, "features"])
def test_a_model_gets_its_images_as_they_are(layer):
    x = torch.randn(60, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(60) % CLASSES
    trainer = Trainer(Viewing(), config("als-lc", embedding=layer), num_classes=CLASSES)
    assert trainer.fit(x, y, test=(x, y)).report is not None


def test_the_layout_of_inference_changes_last_bits_alone():
    torch.manual_seed(0)
    model, x = SmallCNN((3, 13, 15), 4), torch.randn(9, 3, 13, 15)
    want = model.embed(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.embed(x), want, rtol=0, atol=1e-5)
        assert model.features[0](x).is_contiguous(), "the weights keep their order"


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.twice = nn.Linear(2, 2)

    def forward(self, x):
        return self.twice(self.twice(x))


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (nn.Linear(2, 4), None, "no function embed"),
        (net(), "nope", "layers features"),
        (net(), "", "layers features"),
    ],
)
def test_an_embedding_that_cannot_work_is_refused_before_training(model, layer, message):
    with pytest.raises(ValueError, match=message):
        Trainer(model, config("als-lc", embedding=layer), num_classes=CLASSES)


@pytest.mark.parametrize("layer", ["unused", "twice"])
def test_a_layer_has_to_run_once(layer):
    with pytest.raises(ValueError, match="one tensor a forward pass"):
        make_embedder(TwoOutputs(), layer)(torch.zeros(3, 2))


def test_erm_needs_no_embedding():
    trainer = Trainer(nn.Linear(2, CLASSES), config(epochs=1), num_classes=CLASSES)
    x, given, _ = blobs(n=40)
    assert trainer.fit(x, given).test_accuracy is None


def test_metrics_files_hold_one_record_an_epoch(tmp_path):
    _, result = fit("als-lc", out=tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(FIELDS)
    assert [float(row["train_loss"]) for row in rows] == [r["train_loss"] for r in result.history]
    assert rows[0]["suspects"] == ""
    assert set(result.history[0]) == set(FIELDS)


def test_opening_the_metrics_drops_what_the_history_does_not_know(tmp_path):
    records = [dict.fromkeys(FIELDS, 1), {**dict.fromkeys(FIELDS), "epoch": 2}]
    writer = MetricsWriter(tmp_path)
    for record in records:
        writer.append(record)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "tor')
    MetricsWriter(tmp_path, records[:1])
    assert [json.loads(s) for s in (tmp_path / "metrics.jsonl").open()] == records[:1]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


def test_switches_and_generators_are_put_back_even_after_a_seed_that_is_none():
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.get_rng_state()
    try:
        with reproducible(3, torch.device("cpu"), deterministic=True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(ValueError), reproducible(2**70, torch.device("cpu")):
            pass
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.use_deterministic_algorithms(False)


def test_label_metrics_by_hand():
    given = torch.tensor([0, 1, 2, 0, 1])
    true = torch.tensor([0, 1, 1, 1, 1])
    corrected = torch.tensor([1, 1, 1, 2, 1])  # broken, kept, repaired, still wrong, kept
    assert label_metrics(given, corrected, true) == {
        "label_accuracy_before": 3 / 5,
        "label_accuracy_after": 3 / 5,
        "relabel_precision": 1 / 3,
        "relabel_recall": 1 / 2,
    }
    clean = label_metrics(true, true, true)
    assert clean["relabel_precision"] is None
    assert clean["relabel_recall"] is None
    assert set(label_metrics(given, corrected, None).values()) == {None}


def test_learning_rate_is_constant_in_the_warmup_then_a_half_cosine():
    settings = config(lr=0.1, epochs=6, warmup=2)
    rates = [settings.lr_at(step, 10) for step in range(60)]
    assert rates[:21] == [0.1] * 21
    assert rates[40] == pytest.approx(0.05)
    assert 0 < rates[-1] < 0.001
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert {config(lr_schedule="constant").lr_at(step, 10) for step in range(60)} == {5e-3}


def test_the_recipe_goes_by_size_and_shortens_its_warmup():
    large, small = TrainConfig.recommended(60_000), TrainConfig.recommended(1_438)
    assert (large.epochs, large.batch_size, large.warmup, large.period) == (12, 128, 4, 4)
    assert (small.epochs, small.batch_size, small.warmup, small.period) == (20, 32, 4, 4)
    assert TrainConfig.recommended(60_000, epochs=3).warmup == 1
    assert TrainConfig.recommended(60_000, epochs=8).warmup == 4
    assert TrainConfig.recommended(1_438, epochs=6).warmup == 3
    assert TrainConfig.recommended(1_438, epochs=6, warmup=5).warmup == 5
    assert TrainConfig.recommended(1_438, seed=7, lr=0.1).lr == 0.1


class NoLearning(Method, name="test-none"):
    """Gives fixed losses: what the loop itself does is all there is."""

    loss = 1.0

    def make_optimizer(self):
        return torch.optim.SGD(self.task.model.parameters(), lr=0.1)

    def step(self, x, label, index):
        return torch.full((len(x),), self.loss)


class HostReads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(kwargs or {}))


def test_a_registered_method_plugs_in_and_the_loop_reads_nothing_in_a_step():
    x, given, _ = blobs(n=64)
    reads = []
    for batch_size in (1, 64):
        settings = config("test-none", epochs=1, batch_size=batch_size)
        trainer = Trainer(net(), settings, num_classes=CLASSES)
        with HostReads() as mode:
            result = trainer.fit(x, given)
        reads.append(mode.count)
        assert result.history[0]["train_loss"] == 1.0
    assert reads[0] == reads[1] > 0  # reads belong to the epoch, not to its steps


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["erm", "also", "als-lc"])
def test_a_cuda_step_does_not_wait_for_the_device(method):
    x, given, _ = blobs()
    trainer = Trainer(net(), config(method, epochs=3, device="cuda"), num_classes=CLASSES)
    step = METHODS[method].step

    def watched(self, *batch):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, *batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS[method], "step", watched)
        trainer.fit(x, given)


@pytest.mark.cuda
def test_cuda_trains_as_the_cpu_does():
    _, result = fit("als-lc", device="cuda")
    assert result.test_accuracy > 0.97
    assert result.label_metrics["label_accuracy_after"] > 0.97


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(NoLearning, "loss", float("nan"))
    with pytest.raises(RuntimeError, match="finite mean, got nan in epoch 1"):
        fit("test-none", out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("amp", ["bf16", "f16"])
@pytest.mark.parametrize("method", ["erm", "als-lc"])
def test_mixed_precision_trains(method, amp):
    assert fit(method, amp=amp)[1].test_accuracy > 0.97


def test_the_scaler_is_part_of_the_state():
    amp = Amp("f16", torch.device("cpu"))
    parameter = nn.Parameter(torch.ones(()))
    amp.backward_and_step(parameter * float("inf"), torch.optim.SGD([parameter], lr=1.0))
    assert parameter.item() == 1.0  # a step with infinite gradients is skipped
    other = Amp("f16", torch.device("cpu"))
    other.load_state_dict(amp.state_dict())
    assert other.state_dict() == amp.state_dict()
    assert amp.state_dict()["scale"] < Amp("f16", torch.device("cpu")).state_dict()["scale"]


def test_the_model_is_left_in_evaluation_at_theta_itself():
    trainer, result = fit("also", model=net(dropout=0.5))
    assert not trainer.model.training
    x, _, true = blobs()
    with torch.no_grad():
        accuracy = (trainer.model(x).argmax(1) == true).double().mean()
    assert float(accuracy) == result.test_accuracy


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_on_a_terminal_and_is_silent_elsewhere(capsys, monkeypatch):
    fit("erm", epochs=1)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    fit("erm", epochs=1)
    assert "epoch 1/1: loss" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.stderr", Terminal())
    with ProgressBar("hidden", 2, enabled=False) as bar:
        bar.step_to(1)
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs: expected >= 1, got 0"),
        ({"epochs": 2.5}, TypeError, "epochs: expected an int"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"seed": -1}, ValueError, "seed"),
        ({"amp": "fp8"}, ValueError, "amp: expected one of 'off', 'bf16', 'f16', got 'fp8'"),
        ({"lr_schedule": "step"}, ValueError, "lr_schedule"),
        ({"checkpoint_steps": 0}, ValueError, "checkpoint_steps"),
        ({"checkpoint_seconds": 0.0}, ValueError, "checkpoint_seconds"),
        ({"num_workers": -1}, ValueError, "num_workers"),
        ({"deterministic": "no"}, TypeError, "deterministic: expected bool, got str"),
        ({"device": None}, TypeError, "device: expected str, got NoneType"),
        ({"method": ERM}, TypeError, "method: expected str, got ABCMeta"),
        ({"embedding": 3}, TypeError, "embedding: expected str or None, got int"),
        ({"also": ["pi_lr"]}, TypeError, "also: expected Mapping, got list"),
        ({"settings": None}, TypeError, "settings: expected Mapping, got NoneType"),
        ({"correction": {"k": 5}}, TypeError, "correction: expected CorrectionConfig, got dict"),
    ],
)
def test_settings_are_checked(settings, error, message):
    with pytest.raises(error, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sgd"}, "method: expected one of 'erm', 'also'.*'als-lc'.*got 'sgd'"),
        ({"device": "tpu"}, "device: expected auto, cpu or cuda"),
        ({"device": "mps"}, "device: expected auto, cpu or cuda"),
        ({"method": "also", "also": {"pi_l": 1}}, "also: expected some of .*pi_lr.*, got 'pi_l'"),
        ({"method": "also", "also": {"lr": 0.1}}, "also: expected some of .*, got 'lr'"),
        ({"method": "als-lc", "also": {"group": None}}, "also: expected some of .*, got 'group'"),
        ({"method": "erm", "also": {"alpha": 0.5}}, "also: expected none for erm, .*'alpha': 0.5"),
    ],
)
def test_unknown_choices_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Trainer(net(), config(**settings), num_classes=CLASSES)


def test_a_warmup_of_the_whole_run_is_refused():
    with pytest.raises(ValueError, match="epochs: expected more than warmup=2 for als-lc, got 2"):
        fit("als-lc", epochs=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 4])}, r"labels: .*expected a label in \[0, 4\), got 4"),
        ({"labels": torch.tensor([0, 1])}, "expected 3 labels, got 2"),
        ({"labels": None}, "expected integer labels"),
        ({"true_labels": torch.tensor([0, 1])}, "true_labels: expected 3 labels, got 2"),
        ({"test": (torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64))}, "test labels"),
        ({"resume": True}, "resume: expected a folder"),
        ({"kept": torch.tensor([3])}, r"kept: expected values in \[0, 3\), got 3 at 0"),
        ({"kept": torch.tensor([1, 1])}, "kept: expected distinct positions"),
        (
            {"plain": TensorDataset(torch.zeros(3, 2))},
            "plain: expected None where data is a tensor",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(change, message):
    arguments = {"labels": torch.tensor([0, 1, 2]), **change}
    with pytest.raises(ValueError, match=message):
        Trainer(net(), config(), num_classes=CLASSES).fit(torch.zeros(3, 2), **arguments)


def test_a_plain_set_of_another_length_and_inputs_of_another_type_are_refused():
    x, y = torch.zeros(3, 2), torch.tensor([0, 1, 2])
    trainer = Trainer(net(), config(), num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"plain: expected the 3 samples of data .*, got 2"):
        trainer.fit(TensorDataset(x), y, plain=TensorDataset(x[:2]))
    with pytest.raises(TypeError, match="test inputs: expected a tensor or an array, got list"):
        trainer.fit(x, y, test=([[0.0, 0.0]] * 3, y))


def test_arrays_of_any_floats_are_inputs():
    x, given, true = blobs(n=60)
    _, expected = fit("erm", x=x, given=given, true=true, epochs=1)
    for array in (x.numpy().astype(float), x.numpy().astype(">f4"), x.numpy()[::-1][::-1]):
        trainer = Trainer(net(), config("erm", epochs=1), num_classes=CLASSES)
        assert torch.equal(trainer.fit(array, given.numpy()).losses, expected.losses)
    with pytest.raises(TypeError, match="data: expected numbers, got dtype object"):
        trainer.fit(x.numpy().astype(object), given)


class Once(Dataset):
    """Counts the processes that read items."""

    def __init__(self, x):
        self.x, self.readers = x, set()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, at):
        self.readers.add(os.getpid())
        return self.x[at].numpy()


@pytest.mark.parametrize("method", ["erm", "als-lc"])
def test_items_are_read_by_the_workers_alone(method):
    x, given, _ = blobs(n=60)
    source = Once(x)
    trainer = Trainer(net(), config(method, epochs=3, num_workers=1), num_classes=CLASSES)
    trainer.fit(source, given)
    assert source.readers == set()


def test_nothing_kept_is_as_good_as_none():
    x, given, _ = blobs(n=60)
    labels = []
    for kept in (None, torch.tensor([], dtype=torch.int64)):
        trainer = Trainer(net(), config("als-lc", epochs=3), num_classes=CLASSES)
        labels.append(trainer.fit(x, given, kept=kept).labels)
    assert torch.equal(*labels)


def test_the_rate_falls_in_short_runs_too():
    whole = config(epochs=10, warmup=4)
    assert [whole.lr_at(step, 1) for step in (0, 3, 4)] == [whole.lr] * 3
    assert 0 < whole.lr_at(9, 1) < 0.1 * whole.lr
    short = config(epochs=4, warmup=4)
    assert [short.lr_at(step, 1) / short.lr for step in range(4)] == pytest.approx([1, 1, 1, 0.5])


@pytest.mark.parametrize(
    ("shape", "name", "expected"),
    [
        ((1, 28, 28), "auto", SmallCNN),
        ((3, 12, 12), "auto", SmallCNN),
        ((1, 8, 8), "auto", MLP),
        ((64,), "auto", MLP),
        ((1, 28, 28), "mlp", MLP),
    ],
)
def test_models_fit_their_samples(shape, name, expected):
    model = build_model(name, shape, 5)
    assert type(model) is expected
    x = torch.zeros(3, *shape)
    assert model(x).shape == (3, 5)
    assert torch.equal(model.head(model.embed(x)), model(x))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vgg", (1, 28, 28), "expected one of auto"),
        ("cnn", (1, 11, 28), ">= 12"),
        ("cnn", (64,), "images"),
    ],
)
def test_models_that_do_not_fit_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, shape, 5)


def test_an_mlp_needs_a_layer():
    with pytest.raises(ValueError, match="hidden: expected at least one layer width"):
        MLP((2,), 3, hidden=())
