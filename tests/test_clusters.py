"""Clusters found without labels, and classes of them that explain mostly wrong labels."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from als_ext import CorrectionConfig, correct_labels
from als_ext.correction import disputes
from als_ext.correction.clusters import (
    _k_means,
    _Names,
    _walk,
    explained_anywhere,
    named_clusters,
)
from als_ext.correction.disputes import propagated_labels
from als_ext.correction.graph import Graph

pytestmark = pytest.mark.usefixtures("one_thread")


def caps(n=3000, classes=6, share=0.8, seed=0):
    """Classes around points of a sphere; the ``share`` nearest to another has the label of that."""
    g = torch.Generator().manual_seed(seed)
    true = torch.arange(n) % classes
    middle = F.normalize(torch.randn(classes, 16, generator=g), dim=1)
    x = middle[true] + 0.2 * torch.randn(n, 16, generator=g)
    near = (F.normalize(x, dim=1) @ middle.T).scatter(1, true[:, None], -2.0)
    to_other, other = near.max(dim=1)
    own = (F.normalize(x, dim=1) * middle[true]).sum(dim=1)
    hardest = (to_other - own).argsort(descending=True)[: round(share * n)]
    given = true.clone()
    given[hardest] = other[hardest]
    return x, true, given


def right(label, true):
    return float((label == true).double().mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.2, 0.6, 0.8])
def test_wrong_labels_that_point_to_neighbours_name_the_clusters(share, seed):
    x, true, given = caps(share=share, seed=seed)
    found = named_clusters(Graph(x, 20, "cosine", "exact"), x, given)
    assert right(found.label, true) > 0.95
    assert found.wrong == pytest.approx(share, abs=0.03)


def test_the_same_clusters_again_whatever_the_lengths_and_the_state_of_generators():
    x, _, given = caps(1200)
    graph = Graph(x, 20, "cosine", "exact")
    first = named_clusters(graph, x, given)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = named_clusters(graph, (0.2 + torch.arange(1200) % 7)[:, None] * x, given)
    assert torch.equal(first.label, again.label)
    assert first.wrong == again.wrong
    assert torch.equal(torch.get_rng_state(), state)


def test_values_are_the_formula():
    g = torch.Generator().manual_seed(0)
    m, count, classes = 30, 5, 3
    unit = F.normalize(torch.randn(m, 4, generator=g), dim=1)
    cluster = torch.arange(m) % count
    label = torch.randint(classes, (m,), generator=g)
    search = _Names(unit, cluster, label, count, classes)
    middle = [F.normalize(unit[cluster == k].sum(dim=0), dim=0) for k in range(count)]
    cosine = [
        [float(unit[i].double() @ middle[j].double()) for j in range(count)] for i in range(m)
    ]

    def value(name):
        rho = sum(name[int(cluster[i])] != int(label[i]) for i in range(m)) / m
        total = 0.0
        for i in range(m):
            own, given = name[int(cluster[i])], int(label[i])
            pull = [
                sum(math.exp(cosine[i][j] / 0.05) for j in range(count) if name[j] == c)
                for c in range(classes)
            ]
            rest = sum(pull[c] for c in range(classes) if c != own)
            p = 1 - rho if given == own else rho * pull[given] / rest if rest else 0.0
            total += math.log(0.98 * p + 0.02 / classes)
        return total / m

    for name in itertools.islice(itertools.product(range(classes), repeat=count), 0, None, 7):
        for k in (0, 3):
            wanted = [value([*name[:k], c, *name[k + 1 :]]) for c in range(classes)]
            found = search._values(torch.tensor(name), k)
            torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=1e-4, atol=1e-5)


def test_a_search_ends_where_no_cluster_gains_by_another_class():
    x, _, given = caps(600)
    cluster = torch.arange(600) % 12
    search = _Names(F.normalize(x, dim=1), cluster, given, 12, 6)
    start = search.random(torch.Generator().manual_seed(1))
    value, name = search.climb(start)
    assert value > float(search._values(start, 0)[start[0]])
    for k in range(12):
        assert float(search._values(name, k).max()) <= value + 1e-6
    votes = torch.zeros(12, 6).index_put_((cluster, given), torch.ones(600), accumulate=True)
    assert torch.equal(search.plurality, votes.argmax(dim=1))


def test_a_walk_knows_parts_of_a_graph_that_nothing_joins():
    """A ball within a ring: no border between two middles tells them apart, a walk does."""
    g = torch.Generator().manual_seed(0)
    ring = torch.arange(800) % 2
    angle = 2 * math.pi * torch.rand(800, generator=g)
    x = ring[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    x = x + 0.05 * torch.randn(800, 2, generator=g)
    walk = _walk(Graph(x, 15, "l2", "exact"), 6)
    torch.testing.assert_close(walk.norm(dim=1), torch.ones(800))

    def mixed(rows):
        middle = _k_means(rows, 6, torch.Generator().manual_seed(0))
        cluster = (rows @ middle.T).argmax(dim=1)
        both = torch.stack([torch.bincount(cluster[ring == r], minlength=6) for r in (0, 1)])
        return int(both.amin(dim=0).sum())

    assert mixed(walk) == 0
    assert mixed(F.normalize(x, dim=1)) > 200


def test_clusters_that_are_empty_are_no_harm():
    x = F.normalize(torch.eye(3).repeat_interleave(20, dim=0) - 0.4, dim=1)  # far from each other
    middle = _k_means(x, 5, torch.Generator().manual_seed(0))
    assert middle.shape == (5, 3)
    assert bool(middle.isfinite().all())
    cluster = (x @ middle.T).argmax(dim=1)
    empty = torch.bincount(cluster, minlength=5) == 0
    assert int(empty.sum()) == 2
    true = torch.arange(60) // 20
    given = torch.where(torch.arange(60) % 5 == 0, true, (true + 1) % 3)
    name = torch.zeros(5, dtype=torch.int64)
    name[cluster] = true
    found = []
    for of_empty in range(3):
        name[empty] = of_empty
        found.append(_Names(x, cluster, given, 5, 3)._values(name, int(cluster[0])))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_wrong_labels_that_may_be_any_explain_as_by_hand():
    label = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    given = torch.tensor([0, 0, 1, 2, 2, 2, 0, 1])
    right, wrong = math.log(0.98 * 5 / 8 + 0.02 / 3), math.log(0.98 * 3 / 8 / 2 + 0.02 / 3)
    assert explained_anywhere(label, given) == pytest.approx(5 / 8 * right + 3 / 8 * wrong)
    assert explained_anywhere(given, given) == pytest.approx(math.log(0.98 + 0.02 / 3))


def test_where_the_metric_is_l2_the_origin_does_not_matter():
    x, true, given = caps()
    moved = x + 3.0
    found = named_clusters(Graph(moved, 20, "l2", "exact"), moved, given, "l2")
    assert right(found.label, true) > 0.95
    found = propagated_labels(moved, given, given, 6, CorrectionConfig(metric="l2"))
    assert right(found.origin, true) > 0.95


def test_classes_that_nobody_was_given_have_no_cluster():
    x, true, given = caps()
    names = torch.tensor([1, 4, 5, 8, 9, 11])  # of twelve
    found = propagated_labels(x, names[given], names[given], 12, CorrectionConfig())
    assert right(found.label, names[true]) > 0.95


def modes(share, n=3000, classes=6, per_class=6):
    """Classes of several clusters each; the ``share`` nearest to another class has its label."""
    g = torch.Generator().manual_seed(0)
    mode = torch.arange(n) % (classes * per_class)
    middle = F.normalize(torch.randn(classes * per_class, 16, generator=g), dim=1)
    x = middle[mode] + 0.2 * torch.randn(n, 16, generator=g)
    near = (F.normalize(x, dim=1) @ middle.T).view(n, per_class, classes).amax(dim=1)
    true = mode % classes
    to_other, other = near.scatter(1, true[:, None], -2.0).max(dim=1)
    own = near.gather(1, true[:, None])[:, 0]
    hardest = (to_other - own).argsort(descending=True)[: round(share * n)]
    given = true.clone()
    given[hardest] = other[hardest]
    return x, true, given


@pytest.mark.parametrize("case", ["classes of many clusters", "wrong labels of any class"])
def test_names_that_wrong_labels_do_not_point_to_are_not_heard(case):
    if case == "classes of many clusters":
        x, true, given = modes(0.25)
    else:
        x, true, _ = caps()
        g = torch.Generator().manual_seed(1)
        any_class = torch.randint(6, (len(x),), generator=g)
        given = torch.where(torch.rand(len(x), generator=g) < 0.65, any_class, true)
    guess = correct_labels(x, given).guess
    named = named_clusters(Graph(x, 20, "cosine", "exact"), x, given)
    assert named.wrong > 0.5
    assert named.explained < explained_anywhere(named.label, given) - 0.3
    found = propagated_labels(x, given, guess, 6, CorrectionConfig())
    assert torch.equal(found.origin, guess)
    assert right(found.label, true) > 0.95 > right(named.label, true) + 0.05


def test_classes_of_clusters_hold_where_most_labels_are_wrong():
    x, true, given = caps()
    guess = correct_labels(x, given).guess
    found = propagated_labels(x, given, guess, 6, CorrectionConfig())
    assert right(given, true) == pytest.approx(0.2)
    assert right(guess, true) < 0.6
    assert right(found.label, true) > 0.95
    assert right(found.origin, true) > 0.95
    named = named_clusters(Graph(x, 20, "cosine", "exact"), x, given)
    assert named.explained > explained_anywhere(named.label, given) + 0.3


@pytest.mark.parametrize("case", ["few wrong", "two classes", "many classes", "a class without"])
def test_they_are_not_heard_where_they_prove_nothing(monkeypatch, case):
    x, true, given = caps(share=0.2 if case == "few wrong" else 0.8)
    classes = 6
    if case == "two classes":
        x, given, classes = x[true < 2], true[true < 2], 2
    if case == "many classes":
        names = torch.randperm(21, generator=torch.Generator().manual_seed(0))
        given, classes = names[torch.arange(len(x)) % 21], 21
    if case == "a class without":
        given[3], classes = 6, 7  # one sample is no cluster
    asked = []

    def asking(*arguments):
        asked.append(named_clusters(*arguments))
        return asked[-1]

    monkeypatch.setattr(disputes, "named_clusters", asking)
    monkeypatch.setattr(disputes, "explained_anywhere", lambda *arguments: -float("inf"))
    found = propagated_labels(x, given, given, classes, CorrectionConfig())
    assert torch.equal(found.origin, given)
    assert len(asked) == (case in ("few wrong", "a class without"))
    if case == "a class without":
        assert asked[0].wrong > 0.5


@pytest.mark.parametrize("n", [7, 30])
def test_few_samples_are_enough(n):
    x, _, given = caps(n, classes=3, share=0.5)
    found = propagated_labels(x, given, given, 3, CorrectionConfig())
    assert found.label.shape == (n,)
    assert bool(torch.isin(found.label, given).all())


@pytest.mark.cuda
def test_on_a_gpu_as_on_a_cpu():
    x, _, given = caps()
    moved = x.cuda()
    graph = Graph(moved, 20, "cosine", "exact")
    found = [named_clusters(graph, moved, given.cuda()) for _ in range(2)]
    assert torch.equal(found[0].label, found[1].label)
    assert found[0][1:] == found[1][1:]
    wanted = named_clusters(Graph(x, 20, "cosine", "exact"), x, given)
    assert right(found[0].label.cpu(), wanted.label) > 0.99
