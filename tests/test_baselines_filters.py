"""Baselines that filter or relabel: each one's known effect, by a margin seen on three seeds."""

import copy
import dataclasses
import sys

import pytest
import torch
from blobs import CLASSES, blobs, train, trainer
from torch.utils.data import TensorDataset

from als_ext import TrainConfig, Trainer
from als_ext.baselines import DeepKnn, _neighbours, confident_learning, deep_knn, knn_relabel
from als_ext.baselines._kept import Kept
from als_ext.cli import main
from als_ext.correction import CorrectionConfig
from als_ext.data import apply_noise
from als_ext.methods import Task
from als_ext.models import MLP

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = {"epochs": 15, "config": {"batch_size": 100, "lr": 1e-2}}


@pytest.fixture(scope="module")
def problem():
    x, given, true = blobs()
    test_x, _, test_true = blobs(n=1500, seed=1)
    return x, given, true, (test_x, test_true)


def run(method, problem, **settings):
    """The trainer after a run, and the result."""
    x, given, true, test = problem
    clean = settings.pop("clean", None)
    one = trainer(method, **FAST, **settings)
    return one, one.fit(x, given, test=test, true_labels=true, clean=clean)


@pytest.fixture(scope="module")
def erm(problem):
    return run("erm", problem)[1].test_accuracy


@pytest.fixture(scope="module")
def als_lc(problem):
    return run("als-lc", problem)[1]


def wrong_share(problem, mask):
    """Share of wrong labels among the samples of a mask."""
    _, given, true, _ = problem
    return float((given != true)[mask].double().mean())


def suspects(result):
    return [r["suspects"] for r in result.history if r["suspects"] is not None]


# ---- training on some of the samples --------------------------------------------------------


def step_of(keep, label, x):
    torch.manual_seed(0)
    model = MLP((5,), 3, hidden=(8,))
    task = Task(
        model=model,
        config=TrainConfig(method="erm"),
        num_classes=3,
        labels=label,
        device=torch.device("cpu"),
        collect=None,
    )
    method = Kept(task)
    method.keep = keep
    losses = method.step(x, label, torch.arange(len(x)))
    return losses, [p.grad.clone() for p in model.parameters()]


def test_dropped_samples_teach_nothing_and_the_rest_is_averaged():
    g = torch.Generator().manual_seed(0)
    x, label = torch.randn(8, 5, generator=g), torch.randint(0, 3, (8,), generator=g)
    keep = torch.arange(8) % 2 == 0
    losses, gradients = step_of(keep, label, x)
    assert losses.shape == (8,)
    other = torch.where(keep, label, (label + 1) % 3)
    for one, two in zip(gradients, step_of(keep, other, x)[1], strict=True):
        assert torch.equal(one, two)
    alone = step_of(torch.ones(4, dtype=torch.bool), label[keep], x[keep])[1]
    for one, two in zip(gradients, alone, strict=True):
        torch.testing.assert_close(one, two)


def test_a_batch_of_dropped_samples_makes_no_gradient():
    x, label = torch.ones(4, 5), torch.zeros(4, dtype=torch.int64)
    _, gradients = step_of(torch.zeros(4, dtype=torch.bool), label, x)
    assert all((g == 0).all() for g in gradients)


def test_the_second_training_starts_like_the_first(problem):
    one = trainer("deep-knn", **FAST)
    first = copy.deepcopy(one.model.state_dict())
    seen = []

    class Watched(Exception):
        pass

    def watch(self, x, label, index):
        if self.stage == 1:
            seen.append(
                {name: value.clone() for name, value in self.task.model.state_dict().items()}
            )
            seen.append(dict(self.optimizer.state))
            raise Watched
        return Kept.step(self, x, label, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepKnn, "step", watch)
        with pytest.raises(Watched):
            one.fit(problem[0], problem[1])
    assert all(torch.equal(first[name], value) for name, value in seen[0].items())
    assert seen[1] == {}  # Adam has no moments yet


def test_learning_rates_start_again_with_each_stage(problem):
    _, result = run("deep-knn", problem)
    rates = [r["lr"] for r in result.history]
    assert len(rates) == 30
    assert rates[:15] == rates[15:]
    assert rates[14] < rates[0]


def test_a_filter_that_drops_everything_is_an_error(problem, monkeypatch):
    monkeypatch.setattr(DeepKnn, "select", lambda self: torch.zeros(600, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="deep-knn: expected samples to train on again"):
        run("deep-knn", problem)


# ---- erm-early-stop -------------------------------------------------------------------------


def test_early_stopping_beats_the_last_epoch(problem, erm):
    one, result = run("erm-early-stop", problem)
    assert result.test_accuracy > erm + 0.06  # 0.13 to 0.17 on three seeds
    x, given, _, _ = problem
    method = one._method
    held_out = ~method.keep
    assert int(held_out.sum()) == 60
    for c in range(CLASSES):  # stratified by the given labels
        assert abs(int((given[held_out] == c).sum()) - 0.1 * int((given == c).sum())) < 1
    with torch.no_grad():  # the model holds the best weights
        right = (one.model(x[held_out]).argmax(1) == given[held_out]).double().mean()
    assert float(right) == pytest.approx(method._accuracy)
    assert result.test_accuracy in [r["test_accuracy"] for r in result.history[:-1]]


DRAWN = {  # what each draws from the run's seed
    "erm-early-stop": lambda method: method._rows,
    "confident-learning": lambda method: method._fold == 0,
    "random-relabel": lambda method: method._rank < 100,
}


@pytest.mark.parametrize("method", DRAWN)
def test_what_is_drawn_does_not_follow_the_noise(method):
    """The noise comes from the same seed: one permutation for both held out wrong labels alone."""
    pytest.importorskip("cleanlab")
    x, _, true = blobs()
    for seed in range(3):
        given = apply_noise(true, "symmetric:0.4", num_classes=CLASSES, seed=seed).labels
        one = trainer(method, epochs=2, config={"batch_size": 600, "warmup": 1, "seed": seed})
        one.fit(x, given)
        rate = float((given != true)[DRAWN[method](one._method)].double().mean())
        assert abs(rate - 0.4) < 0.17, seed  # of 60 samples and more: 2.7 standard deviations


def test_early_stopping_on_a_dataset_is_that_on_tensors(problem):
    x, given, _, test = problem
    short = {"epochs": 4, "config": {"batch_size": 100, "lr": 1e-2}}
    a, b = trainer("erm-early-stop", **short), trainer("erm-early-stop", **short)
    one = a.fit(x, given, test=test)
    two = b.fit(TensorDataset(x, given), test=TensorDataset(*test))
    assert [r["test_accuracy"] for r in one.history] == [r["test_accuracy"] for r in two.history]
    assert a._method._accuracy == b._method._accuracy


# ---- the choice of k ------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [10_000, 150], ids=["all rows", "some rows"])
def test_k_agrees_most_often_with_labels_that_it_did_not_see(monkeypatch, rows):
    monkeypatch.setattr(_neighbours, "_SAMPLES", rows)
    wide, given, _ = blobs(rate=0.5)
    narrow = torch.arange(600.0)[:, None]  # stripes of 30: more neighbours are strangers
    chosen = []
    for x, label in ((wide, given), (narrow, torch.arange(600) // 30 % CLASSES)):
        chosen.append(_neighbours.choose_k(x, label, CLASSES, "auto", "l2"))
        asked = torch.arange(600)
        if rows < 600:
            asked = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:rows]
        distance = torch.cdist(x.double(), x.double()).fill_diagonal_(float("inf"))[asked]
        nearest = distance.argsort(dim=1, stable=True)
        votes = torch.nn.functional.one_hot(label[nearest], CLASSES).cumsum(1)
        candidates = (10, 20, 50, 100, 200)  # no more than samples of a class
        agreement = [int((votes[:, k - 1].argmax(1) == label[asked]).sum()) for k in candidates]
        assert chosen[-1] == candidates[agreement.index(max(agreement))]
    assert chosen[0] >= 100
    assert chosen[1] == 10


# ---- knn-floor ------------------------------------------------------------------------------


def floor_of(x, given, test_x, k, components):
    """The definition: singular vectors of the centred inputs, all distances, all votes."""
    x, test_x = x.double(), test_x.double()
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:components].T
    distance = torch.cdist((test_x - x.mean(0)) @ axes, (x - x.mean(0)) @ axes)
    nearest = distance.topk(k, largest=False).indices
    return torch.nn.functional.one_hot(given[nearest], CLASSES).sum(1).argmax(1)


def test_knn_floor_is_principal_components_and_a_plurality(problem):
    x, given, _, (test_x, test_true) = problem
    one = trainer("knn-floor", **FAST, k=25, components=7)
    before = copy.deepcopy(one.model.state_dict())
    result = one.fit(x, given, test=(test_x, test_true))
    got = one._method.predict(test_x).argmax(1)
    # A near tie of distances may turn in float32.
    assert int((got != floor_of(x, given, test_x, 25, 7)).sum()) <= 1
    assert result.test_accuracy == float((got == test_true).double().mean())
    assert all(torch.equal(before[name], p) for name, p in one.model.state_dict().items())
    (record,) = result.history
    assert record["train_loss"] is None
    assert record["lr"] is None


def test_knn_floor_chooses_a_k_that_stands_the_noise(problem, erm):
    one, result = run("knn-floor", problem)
    assert result.test_accuracy > erm + 0.12  # 0.19 to 0.28 on three seeds
    assert one._method._space[3] >= 50


def test_knn_floor_takes_all_of_few_features(problem):
    x, given, _, test = problem
    one = trainer("knn-floor", **FAST, k=25, components=50)
    one.fit(x, given, test=test)
    got = one._method.predict(test[0]).argmax(1)
    assert int((got != floor_of(x, given, test[0], 25, 20)).sum()) <= 1


def test_knn_floor_asks_no_more_neighbours_than_there_are():
    x, given, true = blobs(n=90)
    with pytest.raises(ValueError, match=r"k: expected in \[1, 90\], got 91"):
        train("knn-floor", given, x, (x, true), k=91)


# ---- deep-knn -------------------------------------------------------------------------------


def test_deep_knn_drops_wrong_labels(problem, erm):
    one, result = run("deep-knn", problem)
    dropped = ~one._method.keep
    assert suspects(result) == [int(dropped.sum())]
    assert torch.equal(result.report["suspect"], dropped)
    assert wrong_share(problem, dropped) > wrong_share(problem, dropped | True) + 0.25  # 0.37+
    assert result.test_accuracy > erm  # 0.02 to 0.05 on three seeds: M has memorised
    assert torch.equal(result.labels, problem[1])


def test_deep_knn_with_clean_samples_drops_and_learns_better(problem, erm):
    x, _, y = blobs(n=60, seed=2)
    one, result = run("deep-knn", problem, clean=(x, y))
    assert wrong_share(problem, one._method.keep) < 0.1  # 0.02 to 0.05 on three seeds
    assert result.test_accuracy > erm + 0.1  # 0.17 to 0.26 on three seeds


@pytest.mark.parametrize("noise", [0.4, 0.0])
def test_deep_knn_takes_the_logits_of_the_better_model(monkeypatch, noise):
    x, given, _ = blobs(n=300, rate=noise)
    clean_x, _, clean_y = blobs(n=12 if noise == 0 else 150, seed=2)
    one = trainer("deep-knn", **FAST, k=30)
    right, seen = [], []
    count, vote = DeepKnn._right, deep_knn.plurality

    def counting(self, model):
        right.append((count(self, model), copy.deepcopy(model)))
        return right[-1][0]

    def voting(logits, *rest):
        seen.append(logits)
        return vote(logits, *rest)

    monkeypatch.setattr(DeepKnn, "_right", counting)
    monkeypatch.setattr(deep_knn, "plurality", voting)
    one.fit(x, given, clean=(clean_x, clean_y))
    (of_rival, rival), (of_union, union) = right
    assert (of_rival > of_union) == (noise > 0)
    better = rival if of_rival > of_union else union
    with torch.no_grad():
        expected = better(torch.cat([x, clean_x]))
    torch.testing.assert_close(seen[0], expected)
    # The definition: k nearest by the logits, all labels, the sample itself left out.
    distance = torch.cdist(seen[0].double(), seen[0].double()).fill_diagonal_(float("inf"))
    nearest = distance.topk(30, largest=False).indices
    label = torch.cat([given, clean_y])
    winner = torch.nn.functional.one_hot(label[nearest], CLASSES).sum(1).argmax(1)
    assert torch.equal(one._method.keep, (winner == label)[: len(given)])


def test_deep_knn_takes_known_samples_out_of_the_noisy_set(monkeypatch):
    x, given, true = blobs(n=150)
    rows = torch.arange(0, 150, 5)
    asked, vote = [], deep_knn.plurality

    def voting(logits, label, *rest):
        asked.append((logits, label))
        return vote(logits, label, *rest)

    weights, batch = [[], []], DeepKnn.batch

    def weighing(self, x, label, index):
        made = batch(self, x, label, index)
        weights[self.stage].append(made[2][len(index) :].sum())
        return made

    monkeypatch.setattr(deep_knn, "plurality", voting)
    monkeypatch.setattr(DeepKnn, "batch", weighing)
    one = trainer("deep-knn", epochs=3, config={"batch_size": 50})
    result = one.fit(x, given, clean=(x[rows], true[rows], rows))
    noisy = torch.ones(150, dtype=torch.bool)
    noisy[rows] = False
    ((logits, label),) = asked  # nobody else is a neighbour
    assert len(logits) == 150
    assert torch.equal(label, torch.cat([given[noisy], true[rows]]))
    keep = one._method.keep
    assert not keep[rows].any()
    assert suspects(result) == [120 - int(keep.sum())]
    assert torch.equal(result.report["suspect"], noisy & ~keep)
    # As in epochs over the union, clean samples count once each: 7 of 10 in the first training.
    assert [float(torch.stack(w).sum()) for w in weights] == pytest.approx([3 * 21, 3 * 30])


def test_deep_knn_refuses_what_cannot_vote():
    x, given, true = blobs(n=90)
    with pytest.raises(ValueError, match=r"k: expected in \[1, 89\], got 90"):
        train("deep-knn", given, x, (x, true), k=90)
    with pytest.raises(ValueError, match="clean: expected at least 2 samples for deep-knn, got 1"):
        trainer("deep-knn").fit(x, given, clean=(x[:1], true[:1]))
    with pytest.raises(ValueError, match="clean positions: expected some other samples"):
        trainer("deep-knn").fit(x, given, clean=(x, true, torch.arange(90)))


# ---- confident-learning ---------------------------------------------------------------------


def test_confident_learning_drops_wrong_labels(problem, erm):
    pytest.importorskip("cleanlab")
    one, result = run("confident-learning", problem)
    assert len(result.history) == 5 * 15
    dropped = ~one._method.keep
    assert suspects(result) == [int(dropped.sum())]
    assert torch.equal(result.report["suspect"], dropped)
    assert wrong_share(problem, dropped) > 0.6  # 0.72 to 0.74 on three seeds; 0.4 of all are wrong
    assert result.test_accuracy > erm + 0.06  # 0.12 to 0.14 on three seeds


def test_confident_learning_asks_networks_that_did_not_see_the_sample(problem, monkeypatch):
    x, given, _, _ = problem
    found = []

    def issues(labels, pred_probs, n_jobs):
        found.append((labels, pred_probs))
        return pred_probs.argmax(1) != labels

    monkeypatch.setattr(confident_learning, "_find_label_issues", lambda: issues)
    one = trainer("confident-learning", epochs=2, config={"batch_size": 100}, folds=3)
    masks, select = [], confident_learning.ConfidentLearning.select
    unseen = torch.full((600, CLASSES), float("nan"))

    def watched(self):
        masks.append(self.keep.clone())
        with torch.no_grad():
            unseen[~self.keep] = self.task.model(x[~self.keep]).softmax(1)
        return select(self)

    monkeypatch.setattr(confident_learning.ConfidentLearning, "select", watched)
    one.fit(x, given)
    assert len(masks) == 3
    assert (torch.stack(masks).sum(0) == 2).all()  # every sample is held out once
    for mask in masks:
        for c in range(CLASSES):  # and the folds are stratified
            assert abs(int((given[~mask] == c).sum()) - int((given == c).sum()) / 3) <= 1
    labels, probabilities = found[0]
    assert (labels == given.numpy()).all()
    assert probabilities == pytest.approx(unseen.numpy(), rel=1e-4, abs=1e-6)
    assert torch.equal(one._method.keep, torch.from_numpy(probabilities.argmax(1) == labels))


def test_confident_learning_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(ImportError, match=r"needs cleanlab: pip install 'als_ext\[cleanlab\]'"):
        trainer("confident-learning")
    assert main(["run", "--method", "confident-learning"]) == 2
    assert "pip install" in capsys.readouterr().err.splitlines()[-1]


# ---- relabelling ----------------------------------------------------------------------------


def test_knn_relabel_relabels_everyone(problem, erm):
    _, result = run("knn-relabel", problem)
    changed = [r["changed"] for r in result.history if r["suspects"] is not None]
    assert suspects(result) == changed
    assert torch.equal(result.report["suspect"], result.labels != result.given_labels)
    metrics = result.label_metrics
    assert metrics["label_accuracy_after"] > metrics["label_accuracy_before"] + 0.2  # 0.31 +
    assert result.test_accuracy > erm + 0.1  # 0.18 to 0.25 on three seeds
    assert set(result.report) == {"share", "margin", "suspect"}


def test_knn_relabel_corrects_at_the_epochs_of_als_lc_until_little_changes(monkeypatch):
    x, given, _ = blobs(n=150)
    voters, vote = [], knn_relabel.plurality

    def voting(embeddings, labels, *rest):
        voters.append(labels)
        return vote(embeddings, labels, *rest)

    monkeypatch.setattr(knn_relabel, "plurality", voting)
    config = {
        "batch_size": 50,
        "warmup": 2,
        "period": 3,
        "correction": CorrectionConfig(stop_share=0.0),
    }
    result = trainer("knn-relabel", epochs=9, config=config).fit(x, given)
    due = [r["epoch"] for r in result.history if r["suspects"] is not None]
    assert due == [2, 5, 8]
    assert all(torch.equal(labels, given) for labels in voters)  # never those that it has made
    config["correction"] = dataclasses.replace(config["correction"], stop_share=1.0)
    result = trainer("knn-relabel", epochs=9, config=config).fit(x, given)
    assert [r["epoch"] for r in result.history if r["suspects"] is not None] == [2]
    with pytest.raises(ValueError, match="epochs: expected more than warmup=9 for knn-relabel"):
        trainer("knn-relabel", epochs=9, config={"warmup": 9})


def test_random_relabel_has_the_number_and_the_vote_but_not_the_choice_of_als_lc(problem, als_lc):
    _, result = run("random-relabel", problem)
    assert suspects(result)[0] == suspects(als_lc)[0]  # until then the runs are the same
    random, chosen = result.report["suspect"], als_lc.report["suspect"]
    assert abs(wrong_share(problem, random) - wrong_share(problem, random | True)) < 0.12
    assert wrong_share(problem, chosen) > 0.9
    first = {"epochs": 3, "config": {**FAST["config"], "warmup": 2}}  # one correction
    one, two = (trainer(m, **first).fit(*problem[:2]) for m in ("random-relabel", "als-lc"))
    both = one.report["suspect"] & two.report["suspect"]
    assert int(both.sum()) > 50
    assert (one.labels[both] == two.labels[both]).double().mean() > 0.9  # 0.97 to 1
    alone = ~one.report["suspect"]
    assert torch.equal(one.labels[alone], problem[1][alone])
    after, best = (r.label_metrics["label_accuracy_after"] for r in (result, als_lc))
    assert after < best - 0.15  # 0.24 to 0.26 on three seeds
    assert result.test_accuracy < als_lc.test_accuracy - 0.05  # 0.14 to 0.15 on three seeds


# ---- also-min -------------------------------------------------------------------------------


def test_also_min_takes_weight_from_wrong_labels(problem, erm):
    _, given, true, _ = problem
    one, result = run("also-min", problem)
    pi = one._method.optimizer.weights.pi()
    assert pi[given != true].mean() < 0.6 * pi[given == true].mean()
    assert result.test_accuracy > erm + 0.05  # 0.09 to 0.11 on three seeds


@pytest.mark.parametrize("epochs", [2, 5])
def test_also_min_makes_the_sources_way_in_any_number_of_epochs(epochs):
    x, given, _ = blobs(n=90)
    one = trainer("also-min", epochs=epochs)
    one.fit(x, given)
    assert epochs * one._method.optimizer.weights.settings["lr"] == pytest.approx(160 * 0.01)


def test_also_min_has_its_own_pi_settings():
    config = TrainConfig(method="also-min", also={"direction": "max"})
    with pytest.raises(ValueError, match="also: expected no direction for also-min"):
        Trainer(MLP((3,), 3), config, num_classes=3)
    x, given, _ = blobs(n=90)
    one = trainer("also-min", epochs=2, pi_lr=0.5, pi_decay=0.25)
    one.fit(x, given)
    assert one._method.optimizer.weights.settings["lr"] == 0.5
    assert one._method.optimizer.weights.settings["decay"] == 0.25


# ---- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "error", "message"),
    [
        ("erm-early-stop", {"validation_share": 0.0}, ValueError, "validation_share: expected"),
        ("erm-early-stop", {"validation_share": 0.6}, ValueError, "validation_share: expected"),
        ("knn-floor", {"k": 0}, ValueError, "k: expected"),
        ("knn-floor", {"k": "many"}, ValueError, "k: expected one of 'auto'"),
        ("knn-floor", {"components": 0}, ValueError, "components: expected"),
        ("deep-knn", {"k": 2.5}, TypeError, "k: expected an int"),
        ("confident-learning", {"folds": 1}, ValueError, "folds: expected"),
        ("also-min", {"pi_lr": 0.0}, ValueError, "pi_lr: expected"),
        ("also-min", {"pi_decay": -1.0}, ValueError, "pi_decay: expected"),
        ("knn-relabel", {"k": 0}, ValueError, "k: expected"),
        ("random-relabel", {"k": 5}, ValueError, "it has none"),
    ],
)
def test_bad_settings_are_named(method, settings, error, message):
    with pytest.raises(error, match=message):
        trainer(method, **settings)
