"""Label correction over processes: the labels of one process, whatever the shards."""

from functools import partial

import numpy as np
import pytest
import torch
from workers import shards

from als_ext import CorrectionConfig, LabelCorrector, correct_labels

FIELDS = ("suspect", "old_label", "new_label", "changed", "winner", "share", "margin", "neighbours")
CLOSE = ("log_odds", "distances")


def problem(n=900, classes=5, rate=0.4, seed=0):
    """Overlapping blobs, wrong labels, and scores that know a little."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (n,), generator=g)
    x = torch.randn(n, max(8, classes), generator=g)
    x[torch.arange(n), truth] += 3
    wrong = torch.rand(n, generator=g) < rate
    given = torch.where(wrong, torch.randint(0, classes, (n,), generator=g), truth)
    return x, given, wrong + torch.rand(n, generator=g), truth


def spread(group, x, labels, scores, options):
    import torch.distributed as dist

    rank = dist.get_rank(group)
    own = {name: part[rank] if isinstance(part, list) else part for name, part in options.items()}
    score = None if scores is None else scores[rank]
    return correct_labels(x[rank], labels[rank], score, group=group, **own)


def check(workers, rows, x, labels, scores=None, **options):
    want = correct_labels(x, labels, scores, **options)
    cut = partial(shards, rows=rows)
    parts = {
        name: cut(value) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    spread_scores = None if scores is None else cut(scores)
    found = workers.run(len(rows), spread, cut(x), cut(labels), spread_scores, parts)
    for name in FIELDS:
        assert torch.equal(torch.cat([getattr(f, name) for f in found]), getattr(want, name)), name
    if want.guess is None:
        assert all(f.guess is None for f in found)
    else:
        assert torch.equal(torch.cat([f.guess for f in found]), want.guess)
    for name in CLOSE:
        torch.testing.assert_close(
            torch.cat([getattr(f, name) for f in found]), getattr(want, name), rtol=1e-6, atol=1e-6
        )
    for f in found:
        assert torch.equal(f.channel, want.channel)
        assert (f.k, f.survival, f.threshold) == (want.k, want.survival, want.threshold)
    return want


@pytest.mark.parametrize("rows", [(450, 450), (899, 1), (300, 300, 300), (0, 650, 250)])
def test_result_of_one_process(workers, rows):
    x, given, _, truth = problem()
    result = check(workers, rows, x, given)
    before, after = ((label == truth).double().mean() for label in (given, result.new_label))
    assert after > before + 0.15  # there was something to do


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.7])
def test_at_every_rate_of_noise(workers, rate):
    x, given, _, _ = problem(rate=rate, seed=3)
    check(workers, (500, 150, 250), x, given, metric="l2")


def test_more_classes_than_one_block_holds(workers, monkeypatch):
    from als_ext.correction import survival

    x, given, _, _ = problem(n=600, classes=40)
    monkeypatch.setattr(survival, "_BLOCK", 600 * 7)
    want = correct_labels(x, given, num_classes=41)
    monkeypatch.undo()
    found = workers.run(2, spread_in_blocks, shards(x, (200, 400)), shards(given, (200, 400)))
    assert torch.equal(torch.cat([f.new_label for f in found]), want.new_label)


def spread_in_blocks(group, x, labels):
    from als_ext.correction import survival

    before, survival._BLOCK = survival._BLOCK, 600 * 7
    try:
        return spread(group, x, labels, None, {"num_classes": 41})
    finally:
        survival._BLOCK = before


def test_with_scores(workers):
    x, given, scores, _ = problem()
    with_scores = check(workers, (100, 500, 300), x, given, scores, score_limit=1.0)
    assert not torch.equal(with_scores.new_label, correct_labels(x, given).new_label)


def test_given_suspects_and_voters(workers):
    x, given, scores, _ = problem()
    rows = (0, 500, 400)
    check(workers, rows, x, given, scores, suspects="score")
    check(workers, rows, x, given, scores, suspects=0.3, voters="all")
    mask = scores > 0.8
    check(workers, rows, x, given, suspects=mask, voters=~mask, min_share=0.4)


def test_classes_are_counted_over_all_processes(workers):
    x, _, _, truth = problem(classes=3)
    order = truth.argsort()
    check(workers, (350, 550), x[order], truth[order])  # the last class is in one process alone


def test_numpy_in_numpy_out(workers):
    x, given, _, _ = problem(n=300)
    parts = [part.numpy() for part in shards(x, (200, 100))]
    labels = [part.numpy() for part in shards(given, (200, 100))]
    found = workers.run(2, spread, parts, labels, None, {})
    assert all(isinstance(f.new_label, np.ndarray) for f in found)
    want = correct_labels(x, given)
    assert (np.concatenate([f.new_label for f in found]) == want.new_label.numpy()).all()


def test_an_error_in_one_process_is_an_error_in_all(workers):
    x, given, scores, _ = problem(n=60)
    parts = shards(x, (30, 30)), shards(given, (30, 30))

    def texts(x, labels, scores, options):
        answers = workers.answers(2, spread, x, labels, scores, options)
        assert [kind for kind, *_ in answers] == ["error", "error"]
        return [text for _, _, text, _ in answers]

    bad = [parts[0][0], torch.full((30, 8), float("inf"))]
    other, own = texts(bad, parts[1], None, {})
    assert own == "embeddings: expected finite float32 values, row 0 holds NaN or inf"
    assert other == f"process 1: {own}"
    assert "settings: expected the same" in texts(*parts, None, {"rounds": [1, 2]})[0]
    assert texts(*parts, None, {"rounds": [0, 2]})[1] == ("process 0: rounds: expected >= 1, got 0")
    assert "score given: expected the same" in texts(*parts, [scores[:30], None], {})[1]
    assert "labels: expected values in [0, 2)" in texts(*parts, None, {"num_classes": 2})[0]
    nobody = {"voters": [torch.zeros(30, dtype=torch.bool)] * 2}
    assert "at least one sample that may vote" in texts(*parts, None, nobody)[0]
    tiny = [x[:1], x[:0]], [given[:1], given[:0]]
    assert "at least 2 rows over all processes" in texts(*tiny, None, {})[0]
    check(workers, (30, 30), x, given)  # and the group still works


HISTORY = ("step", "epoch", "sample", "old", "new", "share", "margin")


def steps_of(corrector, rounds, group=None):
    """A life of a corrector: each round a step, between them a decision and an undo."""
    results = []
    for epoch, (x, scores, guess) in enumerate(rounds):
        alone = epoch == 2
        results.append(corrector.step(x, scores, epoch, guess, group, votes_only=alone))
        if epoch == 0:
            corrector.undo(results[0].changed.new_tensor([2, 5, 7], dtype=torch.int64), pin=True)
        if epoch == 1:
            corrector.undo()
    state = corrector.state_dict()
    return results, state, corrector.converged


def spread_steps(group, given, rounds, config):
    import torch.distributed as dist

    rank = dist.get_rank(group)
    own = [tuple(part if part is None else part[rank] for part in parts) for parts in rounds]
    return steps_of(LabelCorrector(given, 5, config), own, group)


@pytest.mark.parametrize("rows", [(450, 450), (0, 650, 250)])
def test_a_corrector_goes_the_way_of_one_process(workers, rows):
    x, given, scores, truth = problem()
    later = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) / 2
    rounds = [(x, None, None), (later, scores, None), (later, None, truth), (x, scores, None)]
    config = CorrectionConfig(score_limit=1.0)
    results, state, converged = steps_of(LabelCorrector(given, 5, config), rounds)
    assert len(set(state["history"]["step"].tolist())) == 4
    spread_rounds = [
        tuple(part if part is None else shards(part, rows) for part in parts) for parts in rounds
    ]
    found = workers.run(len(rows), spread_steps, given, spread_rounds, config)
    for others, other_state, other_converged in found:
        assert other_converged == converged
        assert (other_state["steps"], other_state["standing"]) == (4, state["standing"])
        assert other_state["changed_share"] == state["changed_share"]
        for name in ("original", "labels", "pinned"):
            assert torch.equal(other_state[name], state[name]), name
        for name in HISTORY:
            torch.testing.assert_close(
                other_state["history"][name], state["history"][name], rtol=0, atol=0, equal_nan=True
            )
        assert len(others) == len(results)
    for step, result in enumerate(results):
        for name in FIELDS:
            parts = [getattr(others[step], name) for others, _, _ in found]
            assert torch.equal(torch.cat(parts), getattr(result, name)), name


def differing_steps(group, x, given, change):
    import torch.distributed as dist

    rank = dist.get_rank(group)
    corrector = LabelCorrector(given, 5)
    if change == "pin" and rank == 1:
        corrector.undo(3, pin=True)
    before = corrector.state_dict()
    try:
        epoch, alone = (rank if change == name else 0 for name in ("epoch", "votes_only"))
        corrector.step(x[rank], epoch=epoch, group=group, votes_only=bool(alone))
    finally:
        same = torch.equal(corrector.labels, before["labels"]) and len(corrector.history) == 0
        assert same, "the labels did not stay"


def test_correctors_that_differ_are_an_error_in_all(workers):
    x, given, _, _ = problem(n=60)

    def texts(parts, change=None):
        answers = workers.answers(2, differing_steps, parts, given, change)
        assert [kind for kind, *_ in answers] == ["error", "error"]
        return [text for _, _, text, _ in answers]

    parts = shards(x, (20, 40))
    assert "pinned samples: expected the same on every process" in texts(parts, "pin")[0]
    assert "epoch: expected the same on every process, got 0" in texts(parts, "epoch")[1]
    assert "votes_only: expected the same on every process" in texts(parts, "votes_only")[0]
    fewer = texts([parts[0], parts[1][1:]])
    assert set(fewer) == {"embeddings: expected 60 rows over all processes, got 59"}
    given = given[:1]
    assert "at least 2 rows over all processes, got 1" in texts([x[:1], x[:0]])[1]
