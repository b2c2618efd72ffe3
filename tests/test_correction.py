import dataclasses
import io
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from als_ext import CorrectionConfig, LabelCorrector, correct_labels
from als_ext.correction import survival
from als_ext.correction.config import neighbourhoods, neighbours_that_vote
from als_ext.correction.graph import Graph
from als_ext.correction.suspects import ScoreBins, noise_channel, score_threshold


def blobs(n=600, classes=3, spread=1.0, seed=0):
    """Gaussian clusters on the corners of a simplex, 6 apart, and their true labels."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.arange(n) % classes
    x = spread * torch.randn(n, max(8, classes), generator=g)
    x[torch.arange(n), truth] += 6
    return x, truth


def symmetric(truth, rate, classes, seed=0):
    g = torch.Generator().manual_seed(seed)
    given = truth.clone()
    at = torch.randperm(len(truth), generator=g)[: int(rate * len(truth))]
    given[at] = (given[at] + torch.randint(1, classes, (len(at),), generator=g)) % classes
    return given


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.from_numpy(data.data).float(), torch.from_numpy(data.target).long()


# --- what it achieves -----------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "least"), [(0.2, 0.975), (0.4, 0.965), (0.6, 0.95)])
def test_repairs_symmetric_noise_on_digits(digits, rate, least):
    x, truth = digits
    result = correct_labels(x, symmetric(truth, rate, 10))
    assert (result.new_label == truth).double().mean() >= least


def test_relabels_are_more_precise_than_a_plain_vote(digits):
    x, truth = digits
    given = symmetric(truth, 0.2, 10)
    ours = correct_labels(x, given)
    plain = correct_labels(x, given, k=10, voters="all", suspects=torch.ones_like(given).bool())
    precision = [(r.new_label == truth)[r.changed].double().mean() for r in (ours, plain)]
    assert precision[0] >= 0.95
    assert precision[0] > precision[1] + 0.01


def test_repairs_noise_with_a_direction(digits):
    x, truth = digits
    g = torch.Generator().manual_seed(0)
    given = torch.where(torch.rand(len(truth), generator=g) < 0.3, (truth + 1) % 10, truth)
    result = correct_labels(x, given, num_classes=10)
    assert (result.new_label == truth).double().mean() >= 0.95
    # The channel is read off the data: each class keeps about .7 and loses .3 to the next one.
    rows = torch.arange(10)
    assert result.channel.diag().mean().item() == pytest.approx(0.7, abs=0.04)
    assert result.channel[rows, (rows + 1) % 10].mean().item() == pytest.approx(0.3, abs=0.04)


def test_leaves_clean_labels_alone(digits):
    x, truth = digits
    changed = correct_labels(x, truth).changed
    assert changed.double().mean() < 0.003
    x, truth = blobs()
    assert not correct_labels(x, truth, metric="l2").changed.any()


# --- against an independent transcription in numpy ------------------------------------------------


def log_rising(start, count):
    return sum(np.log(start + i) for i in range(count))


def first_guess(near, given, classes, region, spread):
    """als_ext/correction/survival.py with loops."""
    n = len(given)

    def by_hop(rate, seen):
        """Guess and mean log-likelihood after each averaging, from the labels that are seen."""
        likelihood = np.zeros((n, classes))
        for i in range(n):
            rows = [row for row in (i, *near[i][:region]) if seen[row]]
            count = np.bincount(given[rows], minlength=classes)
            size = count.sum()
            for z in range(classes):
                others = size - count[z]
                log = log_rising(100 * rate, count[z]) + log_rising(100 * (1 - rate), others)
                log -= log_rising(100, size) + log_rising(0.1 * (classes - 1), others)
                log += sum(log_rising(0.1, count[j]) for j in range(classes) if j != z)
                likelihood[i, z] = log / max(size, 1)
        for k in spread:
            likelihood = np.array([likelihood[[i, *near[i][:k]]].mean(0) for i in range(n)])
            yield likelihood.argmax(1), likelihood.max(1).mean()

    def kept(guess):
        return float((guess == given).mean().clip(survival.RATES[0], survival.RATES[-1]))

    everyone = np.ones(n, dtype=bool)
    rates = [rate for rate in survival.RATES if rate >= 1 / classes]
    fold = torch.randint(5, (n,), generator=torch.Generator().manual_seed(0)).numpy()

    def best_rate(hops):
        best = (-np.inf, survival.RATES[-1], given)
        for rate in (*rates, None, None):
            rate = rate or kept(best[2])
            guess, likelihood = list(by_hop(rate, everyone))[hops - 1]
            if rate / 2 <= kept(guess) <= rate * 2:
                best = max(best, (likelihood + 0.17 * rate, rate, guess), key=lambda b: b[0])
        return best[1]

    hops = len(spread)
    for _ in range(3):
        before, rate = hops, best_rate(hops)
        found = np.zeros(len(spread))
        for hidden in (fold == number for number in range(5)):
            for hop, (guess, _) in enumerate(by_hop(rate, ~hidden)):
                found[hop] += (guess == given)[hidden].sum()
        guesses = [guess for guess, _ in by_hop(rate, everyone)]
        alike = [np.mean([g[near[i][:region]] == g[i] for i in range(n)]) for g in guesses]
        hops = 1 + (found * alike).argmax()
        if hops == before:
            break
    return guesses[hops - 1], kept(guesses[hops - 1])


def transcription(x, given, score, classes, k, rounds, smoothing, region, spread, enough):
    """docs/correction.md with loops, float64 and brute force."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    n = len(x)
    distance = 0.5 * ((x[:, None] - x[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    near = distance.astype(np.float32).argsort(axis=1, kind="stable")
    label, rate = first_guess(near, given, classes, region, spread)
    for _ in range(rounds):
        sure = np.array([(label[near[i][:k]] == label[i]).all() for i in range(n)])
        channel = np.full((classes, classes), 1 / classes)
        for c in range(classes):
            rows = (label == c) & sure
            for i in np.flatnonzero(rows if rows.sum() >= enough else label == c):
                channel[c, given[i]] += 1
        channel /= channel.sum(1, keepdims=True)
        wrong = np.zeros(n)
        if score is not None:
            contradicted = label != given
            bins = min(50, n // 100)
            edges = np.sort(score)[[b * n // bins for b in range(1, bins)]]
            which = np.searchsorted(edges, score, side="right")
            base = np.clip(contradicted.mean(), 1 / n, 1 - 1 / n)
            for b in range(bins):
                r = (contradicted[which == b].sum() + base) / ((which == b).sum() + 1)
                wrong[which == b] = min(np.log(r / (1 - r)) - np.log(base / (1 - base)), 0)
        evidence = np.zeros((n, classes))
        for i in range(n):
            shares = np.bincount(label[near[i][:k]], minlength=classes) / k
            evidence[i] = np.log(shares + smoothing) + np.log(channel[:, given[i]]) + wrong[i]
            evidence[i, given[i]] -= wrong[i]
        label = evidence.argmax(1)
    return label, evidence.max(1) - evidence[np.arange(n), given], rate


@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize(("k", "rounds"), [(1, 1), (7, 2), (25, 4)])
def test_follows_the_documented_procedure(monkeypatch, device, k, rounds, with_scores):
    monkeypatch.setattr("als_ext.correction.suspects._ENOUGH", 20)  # some classes have them
    x, truth = blobs(400, 4, spread=2.5)
    given = symmetric(truth, 0.3, 4)
    g = torch.Generator().manual_seed(1)
    score = torch.rand(400, generator=g, dtype=torch.float64) + (given != truth)
    score = score if with_scores else None
    config = CorrectionConfig(k=k, rounds=rounds, vote_smoothing=0.01, region=6, spread=(3, 5))
    result = LabelCorrector(given.to(device), 4, config).step(
        x.to(device), None if score is None else score.to(device)
    )
    label, odds, rate = transcription(
        x.double().numpy(),
        given.numpy(),
        None if score is None else score.numpy(),
        4,
        k,
        rounds,
        0.01,
        6,
        (3, 5),
        20,
    )
    assert result.winner.cpu().numpy().tolist() == label.tolist()
    assert result.new_label.cpu().numpy().tolist() == label.tolist()
    assert result.suspect.cpu().numpy().tolist() == (label != given.numpy()).tolist()
    np.testing.assert_allclose(result.log_odds.cpu().numpy(), odds, rtol=1e-5, atol=1e-5)
    assert result.k == k
    assert result.survival == pytest.approx(rate)


# --- how far likelihoods are averaged, and why ----------------------------------------------------


def first(x, given, classes, region=30, spread=(5, 20, 20, 50, 50)):
    graph = Graph(x, 50, "l2", "exact")
    return survival.surviving_labels(graph, given, classes, region, spread)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_patches_are_not_averaged_away(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(3000, 2, generator=g)
    truth = ((x[:, 0] * 24).long() + (x[:, 1] * 6).long()) % 3  # 144 patches of 21 samples
    given = torch.where(torch.rand(3000, generator=g) < 0.1, (truth + 1) % 3, truth)
    label, rate = first(x, given, 3, region=8)
    assert (label == truth).double().mean() > 0.8  # all five averagings: .39
    assert rate > 0.7


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_many_wrong_labels_are_averaged_over_large_neighbourhoods(seed):
    x, truth = blobs(3000, 4, seed=seed)
    given = symmetric(truth, 0.7, 4, seed)
    label, rate = first(x, given, 4)
    one, _ = first(x, given, 4, spread=(5,))
    right = [(guess == truth).double().mean() for guess in (one, label)]
    assert right[1] > right[0] + 0.15
    assert rate == pytest.approx(0.3, abs=0.02)


# --- invariances ----------------------------------------------------------------------------------


def test_classes_can_be_renamed():
    x, truth = blobs(spread=2.0)
    given = symmetric(truth, 0.3, 3)
    name = torch.tensor([2, 0, 1])
    want = name[correct_labels(x, given, k=15).new_label]
    assert torch.equal(correct_labels(x, name[given], k=15).new_label, want)


def test_samples_can_be_reordered():
    x, truth = blobs(spread=2.0)
    given = symmetric(truth, 0.3, 3)
    score = torch.rand(len(x), generator=torch.Generator().manual_seed(3))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    want = correct_labels(x, given, score).new_label[order]
    assert torch.equal(correct_labels(x[order], given[order], score[order]).new_label, want)


def test_cosine_ignores_lengths_and_l2_does_not():
    x, truth = blobs(spread=2.0)
    given = symmetric(truth, 0.3, 3)
    scale = torch.linspace(0.5, 20, len(x))[:, None]
    cosine, l2 = (
        torch.equal(
            correct_labels(x, given, k=9, metric=metric).new_label,
            correct_labels(x * scale, given, k=9, metric=metric).new_label,
        )
        for metric in ("cosine", "l2")
    )
    assert cosine
    assert not l2


def test_only_the_order_of_scores_counts():
    x, truth = blobs(spread=2.5)
    given = symmetric(truth, 0.3, 3)
    score = torch.rand(len(x), generator=torch.Generator().manual_seed(3)) + (given != truth)
    want = correct_labels(x, given, score).log_odds
    assert torch.equal(correct_labels(x, given, (3 * score).exp()).log_odds, want)


def test_same_bits_from_run_to_run_and_on_one_thread():
    x, truth = blobs(1000, spread=2.5)
    given = symmetric(truth, 0.4, 3)
    want = correct_labels(x, given).log_odds
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(correct_labels(x, given).log_odds, want)
    finally:
        torch.set_num_threads(threads)


# --- scores ---------------------------------------------------------------------------------------


def test_a_low_score_protects_a_label_that_the_neighbours_doubt():
    x, truth = blobs(1500, spread=3.5)
    given = symmetric(truth, 0.3, 3)
    score = (given != truth).double() + 0.1 * torch.rand(1500, generator=torch.Generator())
    without, with_scores = correct_labels(x, given), correct_labels(x, given, score)

    def broken(result):
        return int((result.changed & (given == truth)).sum())

    assert broken(without) > 25
    assert broken(with_scores) < 0.5 * broken(without)


def test_scores_without_information_change_next_to_nothing():
    x, truth = blobs(1500, spread=2.5)
    given = symmetric(truth, 0.3, 3)
    score = torch.rand(1500, generator=torch.Generator().manual_seed(5))
    without, with_scores = correct_labels(x, given), correct_labels(x, given, score)
    assert (without.new_label != with_scores.new_label).double().mean() < 0.02
    constant = correct_labels(x, given, torch.ones(1500))
    assert torch.equal(without.log_odds, constant.log_odds)


def test_score_limit_lets_a_high_score_speak_against_a_label():
    score = torch.arange(1000, dtype=torch.float64)
    wrong, everyone = score >= 900, torch.ones(1000, dtype=torch.bool)
    vouch = ScoreBins(score, everyone).evidence(wrong, 0.0)
    assert vouch.max() == 0
    assert vouch[:900].max() < -1
    condemn = ScoreBins(score, everyone).evidence(wrong, 2.0)
    assert (condemn[900:] == 2.0).all()
    assert torch.equal(condemn[:900], vouch[:900])
    some = score < 500
    assert not ScoreBins(score, some).evidence(wrong, 2.0)[~some].any()
    few = torch.arange(len(score)) < 99  # too few to measure anything
    assert not ScoreBins(score, few).evidence(wrong, 2.0).any()


def test_otsu_parts_two_groups_where_they_part():
    score = torch.tensor([0.1, 5.2, 0.2, 5.0, 0.15, 5.1, 0.0], dtype=torch.float64)
    assert score_threshold(score, "score") == 5.0
    assert score_threshold(torch.ones(5, dtype=torch.float64), "score") == float("inf")
    assert score_threshold(score, 0.5) == 0.2  # round(3.5) = 4 of 7
    assert score_threshold(score, 0.2) == 5.2


# --- explicit suspects and voters -----------------------------------------------------------------


def test_only_given_suspects_are_relabelled():
    x, truth = blobs()
    given = symmetric(truth, 0.3, 3)
    mask = torch.arange(len(x)) < 300
    result = correct_labels(x, given, suspects=mask, metric="l2", k=50)
    assert torch.equal(result.suspect, mask)
    assert torch.equal(result.new_label[~mask], given[~mask])
    assert torch.equal(result.new_label[mask], truth[mask])
    assert result.survival is None
    assert result.threshold is None


@pytest.mark.parametrize("suspects", ["score", 0.3])
def test_suspects_by_score(suspects):
    x, truth = blobs()
    given = symmetric(truth, 0.3, 3)
    score = (given != truth).double() + 0.1 * torch.rand(len(x), generator=torch.Generator())
    result = correct_labels(x, given, score, suspects=suspects, metric="l2")
    assert torch.equal(result.suspect, given != truth)
    assert torch.equal(result.suspect, score >= result.threshold)
    assert torch.equal(result.new_label, truth)


def test_equal_scores_make_nobody_a_suspect_by_otsu():
    x, truth = blobs()
    result = correct_labels(x, symmetric(truth, 0.3, 3), torch.ones(len(x)), suspects="score")
    assert not result.suspect.any()
    assert not result.changed.any()


def test_voters_by_hand():
    x = torch.tensor([[0.0], [1.0], [2.1], [3.3], [4.6]])
    labels = torch.tensor([0, 1, 1, 2, 2])
    first = torch.tensor([True, False, False, False, False])
    options = {"metric": "l2", "suspects": first, "k": 4, "num_classes": 3}
    result = correct_labels(x, labels, **options, voters="all")  # 1, 1, 2, 2: a tie
    assert (result.new_label[0], result.share[0], result.margin[0]) == (1, 0.5, 0.0)
    voters = torch.tensor([True, True, False, True, True])
    result = correct_labels(x, labels, **options, voters=voters)
    assert result.new_label.tolist() == [2, 1, 1, 2, 2]
    assert result.share[0].item() == pytest.approx(2 / 3)
    assert result.neighbours[0].tolist() == [1, 2, 3, 4]
    assert result.distances[0].tolist() == pytest.approx([1.0, 2.1**2, 3.3**2, 4.6**2])
    result = correct_labels(x, labels, **(options | {"k": 1}), voters=~first & (labels == 2))
    assert result.winner[0] == -1  # its one neighbour may not vote
    assert result.new_label[0] == 0
    assert result.log_odds[0] == 0


@pytest.mark.parametrize("veto", [{"min_share": 0.95}, {"min_margin": 0.95}])
def test_a_weak_vote_is_vetoed(veto):
    x, truth = blobs(spread=3.0)
    given = symmetric(truth, 0.3, 3)
    free, strict = correct_labels(x, given), correct_labels(x, given, **veto)
    value = strict.share if "min_share" in veto else strict.margin
    assert torch.equal(strict.suspect, free.suspect)
    assert torch.equal(strict.changed, free.changed & (value >= 0.95))
    assert 0 < strict.changed.sum() < free.changed.sum()


# --- the first guess ------------------------------------------------------------------------------


def test_what_outnumbers_the_right_labels_in_places_does_not_win():
    """In each half of a class another wrong label outnumbers the right one: no vote finds it."""
    g = torch.Generator().manual_seed(0)
    x, truth = blobs(3000, 3, spread=1.0)
    half = (x[:, 7] > 0).long()
    wrong = torch.rand(3000, generator=g) < 0.6
    given = torch.where(wrong, (truth + 1 + half) % 3, truth)
    plain = correct_labels(x, given, suspects=torch.ones(3000, dtype=torch.bool), voters="all")
    ours = correct_labels(x, given)
    assert (plain.new_label == truth).double().mean() < 0.5
    assert (ours.new_label == truth).double().mean() > 0.98
    assert ours.survival == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_survival_is_the_share_of_right_labels(rate):
    x, truth = blobs(4000, 10)
    given = symmetric(truth, rate, 10)
    assert correct_labels(x, given).survival == pytest.approx(1 - rate, abs=0.04)


def test_labels_moved_in_one_way_are_moved_back_and_not_on():
    x, truth = blobs(3000, 3)
    given = torch.where(torch.arange(3000) % 10 < 4, (truth + 1) % 3, truth)
    assert (correct_labels(x, given).new_label == truth).double().mean() > 0.99


def test_small_classes_have_small_neighbourhoods():
    assert neighbours_that_vote("auto", 60_000, 10) == 20
    assert neighbours_that_vote("auto", 1600, 10) == 10
    assert neighbours_that_vote("auto", 3, 3) == 1
    assert neighbours_that_vote(50, 60, 10) == 50
    assert neighbourhoods(30, (20, 50), 60_000, 10) == (30, (20, 50))
    assert neighbourhoods(30, (20, 50), 2400, 10) == (15, (15, 15))


@pytest.mark.parametrize("options", [{}, {"suspects": 0.4, "scores": torch.arange(1500.0)}])
def test_gaps_in_the_ids_of_classes_change_nothing(options):
    x, truth = blobs(1500, 5, spread=2.5)
    given = symmetric(truth, 0.4, 5)
    near = correct_labels(x, given, **options)
    far = correct_labels(x, given * 50 + 7, num_classes=300, **options)
    assert 0.02 < (near.new_label != truth).double().mean() < 0.5, "not a toy"
    for name in ("suspect", "changed", "share", "margin", "log_odds", "k", "survival"):
        assert_equal(getattr(far, name), getattr(near, name))
    for name in ("old_label", "new_label", "winner", "guess"):
        value = getattr(near, name)
        assert_equal(getattr(far, name), value if value is None else value * 50 + 7)
    at = torch.arange(5) * 50 + 7
    assert torch.equal(far.channel[at[:, None], at], near.channel)
    torch.testing.assert_close(far.channel.sum(1), torch.ones(300))


def assert_equal(one, other):
    assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_label_that_somebody_else_gave_may_be_of_an_absent_class():
    x, truth = blobs(600, 3)
    corrector = LabelCorrector(truth, num_classes=5)
    corrector.step(x, guess=torch.where(torch.arange(600) < 20, 4, truth))
    result = corrector.step(x)
    assert torch.equal(result.new_label, truth)
    assert result.channel.shape == (5, 5)


def test_blocks_do_not_show(monkeypatch):
    x, truth = blobs(spread=2.5)
    given = symmetric(truth, 0.3, 3)
    want = correct_labels(x, given, k=7).log_odds
    monkeypatch.setattr("als_ext.correction.graph._BLOCK", 50)
    monkeypatch.setattr("als_ext.correction.survival._BLOCK", 600)  # a class at a time
    monkeypatch.setattr("als_ext.correction._inputs._BLOCK", 64)
    assert torch.equal(correct_labels(x, given, k=7).log_odds, want)
    assert torch.equal(torch.from_numpy(correct_labels(x.numpy(), given, k=7).log_odds), want)


def test_channel_of_a_class_without_votes_is_flat():
    winner, given = torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1])
    channel = noise_channel(winner, given, 3)
    torch.testing.assert_close(channel[0], torch.tensor([7, 4, 1]).double() / 12)
    torch.testing.assert_close(channel[1:], torch.full((2, 3), 1 / 3).double())


# --- input and output -----------------------------------------------------------------------------


def test_numpy_and_memory_map_in_numpy_out(tmp_path):
    x, truth = blobs(spread=2.0)
    given = symmetric(truth, 0.3, 3)
    want = correct_labels(x, given)
    np.save(tmp_path / "x.npy", x.numpy())
    for embeddings in (x.numpy(), np.load(tmp_path / "x.npy", mmap_mode="r"), x.double().numpy()):
        got = correct_labels(embeddings, given.numpy().astype(np.uint8))
        for field in dataclasses.fields(want):
            one, other = getattr(want, field.name), getattr(got, field.name)
            if isinstance(one, torch.Tensor):
                assert isinstance(other, np.ndarray)
                np.testing.assert_array_equal(one.numpy(), other)
            else:
                assert one == other
    assert isinstance(correct_labels(x, given.numpy()).new_label, torch.Tensor)


def test_input_is_not_touched_and_output_owns_its_memory():
    x, truth = blobs()
    given = symmetric(truth, 0.3, 3)
    kept_x, kept = x.clone(), given.clone()
    result = correct_labels(x.requires_grad_(), given)
    result.new_label.zero_()
    result.old_label.zero_()
    assert torch.equal(x, kept_x)
    assert torch.equal(given, kept)
    assert not result.log_odds.requires_grad


def test_non_contiguous_input():
    x, truth = blobs()
    given = symmetric(truth, 0.3, 3)
    want = correct_labels(x, given).log_odds
    assert torch.equal(correct_labels(x.T.contiguous().T, given).log_odds, want)
    strided = torch.stack([given, given], dim=1)[:, 0]
    assert torch.equal(correct_labels(x, strided).log_odds, want)
    reverse = correct_labels(x.numpy()[::-1], given.numpy()[::-1], k=9).new_label[::-1]
    np.testing.assert_array_equal(reverse, correct_labels(x, given, k=9).new_label.numpy())


def test_smallest_and_degenerate_input():
    result = correct_labels(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0]))
    assert result.new_label.tolist() == [0, 0]
    assert result.channel.shape == (1, 1)
    same = correct_labels(torch.ones(30, 2), torch.tensor([0] * 25 + [1] * 5), k=29)
    assert same.new_label[:25].tolist() == [0] * 25
    zero = correct_labels(torch.zeros(30, 2), torch.zeros(30, dtype=torch.int64), num_classes=7)
    assert zero.channel.shape == (7, 7)
    assert not zero.changed.any()


def test_result_describes_itself():
    x, truth = blobs()
    result = correct_labels(x, symmetric(truth, 0.25, 3))
    summary = result.summary()
    assert (summary["samples"], summary["changed"], summary["suspects"]) == (600, 150, 150)
    assert summary["k"] == result.k == result.neighbours.shape[1] == result.distances.shape[1]
    assert len(repr(result)) < 200
    table = result.to_pandas()
    assert table.shape == (600, 8)
    assert table["changed"].sum() == 150
    assert (table["new_label"].to_numpy() == result.new_label.numpy()).all()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.k = 3


def test_missing_pandas_is_named(monkeypatch):
    x, truth = blobs(60)
    corrector = LabelCorrector(truth, 3)
    result = corrector.step(x)
    monkeypatch.setitem(sys.modules, "pandas", None)
    for table in (result, corrector.history):
        with pytest.raises(ImportError, match=r"needs pandas: pip install"):
            table.to_pandas()


X, Y = blobs(40)
NAN = X.clone()
NAN[17, 3] = float("nan")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"embeddings": X.tolist()}, TypeError, "embeddings: expected a torch.Tensor or a numpy"),
        ({"embeddings": X.long()}, TypeError, "embeddings: .*float32.* got torch.int64"),
        ({"embeddings": X.long().numpy()}, TypeError, "embeddings: .*float32.* got int64"),
        ({"embeddings": X[:, 0]}, ValueError, r"embeddings: expected 2 dimensions, got .*\[40\]"),
        ({"embeddings": X[:1]}, ValueError, "embeddings: expected at least 2 rows"),
        ({"embeddings": X[:0]}, ValueError, "embeddings: expected at least 2 rows"),
        ({"embeddings": X[:, :0]}, ValueError, "embeddings: expected at least 2 rows and 1 column"),
        ({"embeddings": NAN}, ValueError, "embeddings: .* row 17 holds NaN or inf"),
        ({"embeddings": NAN.numpy()}, ValueError, "embeddings: .* row 17 holds NaN or inf"),
        ({"embeddings": 1e300 * NAN.double()}, ValueError, "embeddings: .*float32 values, row 0"),
        ({"labels": Y.tolist()}, TypeError, "labels: expected a torch.Tensor or a numpy"),
        ({"labels": Y.float()}, TypeError, "labels: expected an integer dtype, got torch.float32"),
        ({"labels": np.array(["a"] * 40)}, TypeError, "labels: expected numbers, got dtype <U1"),
        ({"labels": Y[:39]}, ValueError, "labels: expected 40 entries .* got 39"),
        ({"labels": Y[:0]}, ValueError, "labels: expected at least one label, got none"),
        ({"labels": Y[:, None]}, ValueError, "labels: expected 1 dimensions"),
        ({"labels": Y - 1}, ValueError, r"labels: expected values in \[0, 2\), got -1 at .* 0"),
        ({"num_classes": 2}, ValueError, r"labels: expected values in \[0, 2\), got 2 at .* 2"),
        ({"num_classes": 0}, ValueError, "num_classes: expected >= 1, got 0"),
        ({"num_classes": 3.0}, TypeError, "num_classes: expected an int, got float"),
        ({"scores": [0.0] * 40}, TypeError, "scores: expected a torch.Tensor or a numpy"),
        ({"scores": torch.zeros(39)}, ValueError, "scores: expected 40 entries .* got 39"),
        ({"scores": NAN[:, 3]}, ValueError, "scores: expected finite values, got nan at .* 17"),
        ({"scores": Y.bool()}, TypeError, "scores: expected real numbers, got torch.bool"),
        ({"scores": torch.zeros(40, 1)}, ValueError, "scores: expected 1 dimensions"),
        ({"k": 0}, ValueError, "k: expected >= 1, got 0"),
        ({"k": 40}, ValueError, r"k: expected in \[1, 39\] .* got 40"),
        ({"k": 2.0}, TypeError, "k: expected an int, got float"),
        ({"k": True}, TypeError, "k: expected an int, got bool"),
        ({"k": "all"}, ValueError, "k: expected 'auto' or an int >= 1, got 'all'"),
        ({"suspects": "loss"}, ValueError, "suspects: expected one of 'auto', 'score', got 'loss'"),
        ({"suspects": 0.0}, ValueError, "suspects: expected a finite number in"),
        ({"suspects": 1.0}, ValueError, "suspects: expected a share below 1"),
        ({"suspects": "score"}, ValueError, "scores: expected .*suspects='score'.*, got None"),
        ({"suspects": 0.1}, ValueError, "scores: expected .*suspects=0.1.*, got None"),
        ({"suspects": Y}, TypeError, "suspects: expected a bool mask, got torch.int64"),
        ({"suspects": Y[:9] == 0}, ValueError, "suspects: expected 40 entries .* got 9"),
        ({"suspects": Y >= 0}, ValueError, "voters: expected at least one sample that may vote"),
        ({"suspects": None}, TypeError, "suspects: expected a torch.Tensor or a numpy"),
        ({"voters": "some"}, ValueError, "voters: expected one of 'trusted', 'all', got 'some'"),
        ({"voters": Y < 0}, ValueError, "voters: expected at least one sample that may vote"),
        ({"voters": Y}, TypeError, "voters: expected a bool mask, got torch.int64"),
        ({"metric": "ip"}, ValueError, "metric: expected one of 'cosine', 'l2', got 'ip'"),
        ({"min_share": 1.5}, ValueError, "min_share: expected a finite number in"),
        ({"min_margin": float("nan")}, ValueError, "min_margin: expected a finite number in"),
        ({"min_margin": "1"}, TypeError, "min_margin: expected a number, got str"),
        ({"rounds": 0}, ValueError, "rounds: expected >= 1, got 0"),
        ({"vote_smoothing": 0.0}, ValueError, "vote_smoothing: expected a finite number in"),
        ({"score_limit": -1.0}, ValueError, "score_limit: expected a finite number in"),
        ({"precision": "half"}, ValueError, "precision: expected one of 'exact', 'fast'"),
    ],
)
def test_errors_name_argument_expected_and_got(arguments, error, message):
    with pytest.raises(error, match=message):
        correct_labels(**({"embeddings": X, "labels": Y} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"spread": ()}, TypeError, "spread: expected a non-empty tuple"),
        ({"spread": [5]}, TypeError, "spread: expected a non-empty tuple"),
        ({"spread": (5, 0)}, ValueError, "spread: expected >= 1, got 0"),
        ({"region": 0}, ValueError, "region: expected >= 1, got 0"),
        ({"stop_share": -0.1}, ValueError, "stop_share: expected a finite number in"),
    ],
)
def test_config_is_checked_when_made(arguments, error, message):
    with pytest.raises(error, match=message):
        CorrectionConfig(**arguments)
    with pytest.raises(dataclasses.FrozenInstanceError):
        CorrectionConfig().k = 3


# --- LabelCorrector -------------------------------------------------------------------------------


@pytest.fixture
def training():
    x, truth = blobs(spread=1.0)
    given = symmetric(truth, 0.3, 3)
    return x, truth, given, LabelCorrector(given, 3, CorrectionConfig(metric="l2"))


def misplaced(x):
    """The first 30 samples lie where the next class lies: none keeps its label."""
    return torch.cat([x[1:31], x[30:]])


def test_a_step_corrects_and_records(training):
    x, truth, given, corrector = training
    assert not corrector.converged
    result = corrector.step(x, epoch=4)
    assert torch.equal(corrector.labels, truth)
    assert torch.equal(corrector.original, given)
    history = corrector.history
    wrong = (given != truth).nonzero()[:, 0]
    assert torch.equal(history.sample, wrong)
    assert torch.equal(history.old, given[wrong])
    assert torch.equal(history.new, truth[wrong])
    assert torch.equal(history.share, result.share[wrong])
    assert torch.equal(history.margin, result.margin[wrong])
    assert set(history.epoch.tolist()) == {4}
    assert not corrector.converged
    corrector.step(x, epoch=6)
    assert corrector.converged
    assert len(corrector.history) == len(wrong) == len(history.to_pandas())
    assert str(len(wrong)) in repr(history)
    assert str(len(wrong)) in repr(corrector)


def test_what_later_evidence_does_not_support_is_taken_back(training):
    x, truth, _, corrector = training
    corrector.step(misplaced(x))
    assert not torch.equal(corrector.labels, truth)
    result = corrector.step(x)
    assert torch.equal(corrector.labels, truth)
    assert torch.equal(result.old_label != truth, result.changed)
    assert torch.equal(result.changed.nonzero()[:, 0], corrector.history.sample[-30:])


def test_undo_steps_backwards(training):
    x, truth, given, corrector = training
    corrector.step(x)
    corrector.step(misplaced(x))
    wrong = corrector.labels != truth
    assert wrong[:30].all()
    back = corrector.undo()
    assert torch.equal(corrector.labels, truth)
    assert torch.equal(back, wrong.nonzero()[:, 0])
    corrector.undo()
    assert torch.equal(corrector.labels, given)
    history = corrector.history
    assert torch.equal(history.share.isnan(), history.epoch == -1)
    with pytest.raises(ValueError, match="undo: expected a step to take back, got none"):
        corrector.undo()
    corrector.step(x)
    assert torch.equal(corrector.labels, truth)


def test_undo_of_a_step_leaves_what_changed_since(training):
    x, truth, given, corrector = training
    corrector.step(x)
    one = int((given != truth).nonzero()[3])
    corrector.undo(one)
    assert one not in corrector.undo().tolist()
    assert torch.equal(corrector.labels, given)
    corrector.step(x)
    corrector.step(misplaced(x))
    thrice = int((given[:30] == (truth[:30] + 2) % 3).nonzero()[0])  # a, then b, then c, then a
    corrector.undo(thrice)
    corrector.undo()
    assert (corrector.labels != truth).nonzero()[:, 0].tolist() == [thrice]
    assert corrector.labels[thrice] == given[thrice]


@pytest.mark.parametrize("make", [int, torch.tensor, np.array, lambda i: torch.tensor([i, i])])
def test_undo_of_one_sample_and_pin(training, make):
    x, truth, given, corrector = training
    corrector.step(x)
    at = int((given != truth).nonzero()[3])
    assert corrector.undo(make(at)).tolist() == [at]
    assert corrector.labels[at] == given[at]
    assert (corrector.labels != truth).sum() == 1
    assert corrector.undo(at).tolist() == []
    corrector.step(x)
    assert torch.equal(corrector.labels, truth)
    corrector.undo(make(at), pin=True)
    result = corrector.step(x)
    assert corrector.labels[at] == result.new_label[at] == given[at]
    assert not result.changed.any()


def test_scores_of_labels_it_made_are_not_heard():
    x, truth = blobs(1500, spread=3.5)
    given = symmetric(truth, 0.3, 3)
    corrector = LabelCorrector(given, 3)
    relabelled = corrector.step(x).changed
    score = torch.rand(1500, generator=torch.Generator().manual_seed(0))
    first = corrector.step(x, score)
    corrector.undo()
    # Whatever the scores of relabelled samples say, the decision is the same.
    second = corrector.step(x, torch.where(relabelled, 1e6 * score, score))
    assert torch.equal(first.new_label, second.new_label)
    corrector.undo()
    third = corrector.step(x, torch.where(relabelled, score, (given == truth).double()))
    assert not torch.equal(first.log_odds, third.log_odds)


def test_state_round_trip_continues_bit_for_bit(training):
    x, _, given, corrector = training
    corrector.step(misplaced(x), epoch=2)
    corrector.undo(5, pin=True)
    file = io.BytesIO()
    torch.save(corrector.state_dict(), file)
    file.seek(0)
    other = LabelCorrector(given, 3, CorrectionConfig(metric="l2"))
    other.load_state_dict(torch.load(file, weights_only=True))
    for one in (corrector, other):
        one.step(x, epoch=3)
        one.undo()
    assert torch.equal(corrector.labels, other.labels)
    assert corrector.converged == other.converged
    for field in dataclasses.fields(corrector.history):
        a, b = (getattr(c.history, field.name) for c in (corrector, other))
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), field.name


def test_state_of_something_else_is_refused(training):
    _, _, given, corrector = training
    state = corrector.state_dict()
    for other, message in [
        (LabelCorrector(given[:-1], 3), "expected 599 labels of 3 classes, got 600 of 3"),
        (LabelCorrector(given, 4), "expected 600 labels of 4 classes, got 600 of 3"),
        (LabelCorrector(given.roll(1), 3), "expected the same original labels"),
    ]:
        before = other.labels
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert torch.equal(other.labels, before)
    del state["pinned"]
    with pytest.raises(ValueError, match="pinned"):
        corrector.load_state_dict(state)


def test_a_failed_step_leaves_everything_as_it_was(training):
    x, _, given, corrector = training
    for arguments, error, message in [
        ((x[:-1],), ValueError, "embeddings: expected 600 entries"),
        ((x, x[:-1, 0]), ValueError, "scores: expected 600 entries"),
        ((x, None, -1), ValueError, "epoch: expected >= 0, got -1"),
        ((x, None, 1.0), TypeError, "epoch: expected an int, got float"),
    ]:
        with pytest.raises(error, match=message):
            corrector.step(*arguments)
    for index, error, message in [
        (600, ValueError, r"index: expected positions in \[0, 600\), got 600"),
        (-1, ValueError, r"index: expected positions in \[0, 600\), got -1"),
        (0.5, TypeError, "index: expected an int or"),
        (torch.tensor([0.5]), TypeError, "index: expected an integer dtype"),
        (torch.tensor([True]), TypeError, "index: expected an integer dtype"),
    ]:
        with pytest.raises(error, match=message):
            corrector.undo(index)
    assert torch.equal(corrector.labels, given)
    assert len(corrector.history) == 0
    with pytest.raises(TypeError, match="config: expected a CorrectionConfig, got dict"):
        LabelCorrector(given, 3, {})


def test_labels_cannot_be_changed_from_outside(training):
    _, _, given, corrector = training
    corrector.labels.zero_()
    corrector.original.zero_()
    assert torch.equal(corrector.labels, given)
    mine = given.numpy().copy()
    other = LabelCorrector(mine)
    mine[:] = 0
    assert torch.equal(other.original, given)
    assert (other.num_classes, len(other), other.config) == (3, 600, CorrectionConfig())
