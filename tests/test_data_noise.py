import math

import numpy as np
import pytest
import torch

from als_ext.data import ASYMMETRIC_MAPS, NoiseSpec, apply_noise, parse_noise, write_labels
from als_ext.data.hard import _averaged_predictions
from als_ext.data.noise import _truncated_normal
from als_ext.data.splits import apportion, stratified_split

N, C = 1003, 10  # neither a multiple of the other, so that rounding shows


def clean_labels(n=N, num_classes=C, seed=5):
    # Skewed, so that a per-class count differs from an overall one.
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.minimum(rng.geometric(0.25, size=n) - 1, num_classes - 1))


def features(n=N, width=6, seed=6):
    return torch.from_numpy(np.random.default_rng(seed).random((n, 1, 2, width // 2))).float()


SPECS = ["none", "symmetric:0.4", "pair:0.45", "asymmetric:0.3", "instance:0.4", "hard:0.4"]


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.2, 0.4, 0.5, 0.8, 1.0])
def test_symmetric_flips_exactly_round_rate_n(rate):
    y = clean_labels()
    noisy = apply_noise(y, f"symmetric:{rate}", C, seed=1)
    assert int(noisy.flipped.sum()) == round(rate * N)
    assert torch.equal(noisy.flipped, noisy.labels != y)
    assert noisy.rate == pytest.approx(round(rate * N) / N)
    assert noisy.labels.min() >= 0
    assert noisy.labels.max() < C


def test_symmetric_is_uniform_over_the_other_classes():
    y = torch.full((90_000,), 3)
    noisy = apply_noise(y, "symmetric:1.0", C, seed=2)
    counts = torch.bincount(noisy.labels, minlength=C).double()
    assert counts[3] == 0
    others = counts[torch.arange(C) != 3]
    chi_square = ((others - 10_000) ** 2 / 10_000).sum()
    assert chi_square < 26.1  # 0.999 quantile at 8 degrees of freedom


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.45, 1.0])
def test_pair_moves_to_the_next_class_at_an_exact_rate(rate):
    y = clean_labels()
    noisy = apply_noise(y, f"pair:{rate}", C, seed=3)
    assert int(noisy.flipped.sum()) == round(rate * N)
    assert torch.equal(noisy.labels[noisy.flipped], (y[noisy.flipped] + 1) % C)
    for c in range(C):
        in_class = y == c
        assert abs(int(noisy.flipped[in_class].sum()) - rate * int(in_class.sum())) < 1


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("mnist", {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}),
        ("digits", {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}),
        ("fashion-mnist", {9: 7, 7: 5, 2: 6, 4: 3, 3: 4}),
    ],
)
@pytest.mark.parametrize("rate", [0.0, 0.37, 1.0])
def test_asymmetric_follows_the_map_of_the_data_set(dataset, expected, rate):
    y = clean_labels()
    noisy = apply_noise(y, f"asymmetric:{rate}", C, seed=4, dataset=dataset)
    eligible = torch.isin(y, torch.tensor(list(expected)))
    assert int(noisy.flipped.sum()) == round(rate * int(eligible.sum()))
    assert not noisy.flipped[~eligible].any()
    for source, target in expected.items():
        changed = noisy.flipped & (y == source)
        assert (noisy.labels[changed] == target).all()
        assert abs(int(changed.sum()) - rate * int((y == source).sum())) < 1


def test_asymmetric_takes_the_map_of_the_specification_first():
    y = torch.tensor([0, 1, 2] * 100)
    noisy = apply_noise(y, "asymmetric:1.0:0-2,2-0", 3, seed=0, dataset="mnist")
    assert torch.equal(noisy.labels, 2 - y)


@pytest.mark.parametrize(
    ("spec", "num_classes", "dataset", "message"),
    [
        ("asymmetric:0.4", 10, None, "no class map is known for dataset None"),
        ("asymmetric:0.4", 10, "npz:mine", "no class map is known for dataset 'npz:mine'"),
        ("asymmetric:0.4", 5, "mnist", r"expected classes in \[0, 5\), got 7 -> 1"),
        ("asymmetric:0.4:1-9", 5, None, r"expected classes in \[0, 5\), got 1 -> 9"),
        ("asymmetric:0.4:1-1", 5, None, "class 1 is mapped to itself"),
        (NoiseSpec("asymmetric", 0.4, {}), 5, None, "at least one pair of classes"),
    ],
)
def test_asymmetric_needs_a_map_that_fits(spec, num_classes, dataset, message):
    with pytest.raises(ValueError, match=message):
        apply_noise(torch.arange(5), spec, num_classes, seed=0, dataset=dataset)


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.6, 0.8])
def test_instance_rate_is_near(rate):
    n = 20_000
    noisy = apply_noise(clean_labels(n), f"instance:{rate}", C, 7, features(n))
    # Flips are independent Bernoulli(q_i); the truncation to [0, 1] moves the mean of q by < 0.006.
    assert abs(noisy.rate - rate) < 0.006 + 4 * math.sqrt(rate * (1 - rate) / n)


def test_instance_targets_follow_the_softmax_of_the_projection():
    """All samples alike and of class 0, whose W is drawn first: the law of the target is known."""
    n, num_classes, seed = 40_000, 4, 11
    x = np.array([0.3, -0.2, 0.5])
    noisy = apply_noise(
        torch.zeros(n, dtype=torch.int64),
        "instance:0.5",
        num_classes,
        seed,
        torch.from_numpy(x).expand(n, 3),
    )
    rng = np.random.default_rng(seed)
    rng.random(n)
    _truncated_normal(n, 0.5, 0.1, rng)
    weight = rng.standard_normal((3, num_classes), dtype=np.float32)
    score = np.exp(x @ weight)[1:]
    expected = score / score.sum()
    flipped = int(noisy.flipped.sum())
    found = np.bincount(noisy.labels.numpy(), minlength=num_classes)[1:] / flipped
    assert expected.max() - expected.min() > 0.1  # otherwise the check below shows nothing
    np.testing.assert_array_less(
        np.abs(found - expected), 4 * np.sqrt(expected * (1 - expected) / flipped)
    )


def test_instance_depends_on_the_features():
    """With large features the softmax is one class: equal samples of a class go the same way."""
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).mul(1000.0)
    y = torch.arange(50) % 5
    noisy = apply_noise(y.repeat(40), "instance:0.5", 5, 3, x.repeat(40, 1))
    labels, flipped = noisy.labels.view(40, 50), noisy.flipped.view(40, 50)
    targets = [set(labels[flipped[:, i], i].tolist()) for i in range(50)]
    assert all(len(target) == 1 for target in targets)
    assert len({(int(y[i]), *targets[i]) for i in range(50)}) > 5  # not a function of the class


def test_instance_blocks_do_not_change_the_result(monkeypatch):
    args = (clean_labels(), "instance:0.5", C, 0, features())
    whole = apply_noise(*args)
    monkeypatch.setattr("als_ext.data.noise._INSTANCE_BLOCK_ELEMENTS", 64)
    assert torch.equal(apply_noise(*args).labels, whole.labels)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 1.0])
def test_hard_noise_gives_what_lies_between_classes_to_the_other_one(rate):
    """Three classes in a row: the middle of the row is between the first two or the last two."""
    n = 3000
    y = torch.arange(n) % 3
    x = 2.0 * y[:, None] + torch.rand(n, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy = apply_noise(y, f"hard:{rate}", 3, 0, torch.cat([x, x.square()], dim=1))
    assert int(noisy.flipped.sum()) == round(rate * n)
    if rate in (0.0, 1.0):
        return
    border = torch.tensor([1.0, 3.0])
    distance = (x - border).abs().amin(dim=1)
    assert distance[noisy.flipped].mean() < 0.5 * distance[~noisy.flipped].mean()
    right_of = (x[:, 0] > y * 2).long() * 2 - 1  # the class on the side where the sample lies
    near = noisy.flipped & (distance < 0.3)
    assert int(near.sum()) > 100
    assert float((noisy.labels == y + right_of)[near].double().mean()) > 0.99


def test_hard_noise_is_averaged_over_the_epochs_of_a_classifier(monkeypatch):
    """The second of two epochs is what two means of one leave over: again probabilities."""
    y, x = clean_labels(), features().flatten(1).numpy()
    means = []
    for epochs in (1, 2):
        monkeypatch.setattr("als_ext.data.hard._EPOCHS", epochs)
        means.append(_averaged_predictions(y, C, x, 0))
    second = 2 * means[1] - means[0]
    assert float(second.min()) > -1e-6
    torch.testing.assert_close(second.sum(dim=1), torch.ones(N))
    assert float((means[0] > 2 * means[1]).sum()) == 0  # which the second alone would not keep
    assert float((means[0] > 2 * second).sum()) > 0
    monkeypatch.setattr("als_ext.data.hard._BLOCK", 64)
    assert torch.equal(_averaged_predictions(y, C, x, 0), means[1])


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_hard_noise_of_other_dtypes_is_that_of_float32(dtype, default):
    y, x = clean_labels(), (30 * features()).half()
    wanted = apply_noise(y, "hard:0.3", C, 0, x.float()).labels
    torch.set_default_dtype(default)
    try:
        found = apply_noise(y, "hard:0.3", C, 0, x.to(dtype)).labels
    finally:
        torch.set_default_dtype(torch.float32)
    assert float((found == wanted).double().mean()) > 0.99


@pytest.mark.parametrize("mean", [0.01, 0.5, 0.99])
def test_truncated_normal_matches_its_law(mean):
    values = _truncated_normal(100_000, mean, 0.1, np.random.default_rng(0))
    assert values.min() >= 0.0
    assert values.max() <= 1.0

    def density(z):
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    def cdf(z):
        return (1 + math.erf(z / math.sqrt(2))) / 2

    low, high = -mean / 0.1, (1 - mean) / 0.1
    expected = mean + 0.1 * (density(low) - density(high)) / (cdf(high) - cdf(low))
    assert abs(values.mean() - expected) < 4 * 0.1 / math.sqrt(100_000)


@pytest.mark.parametrize("spec", SPECS)
def test_transition_and_rate_are_those_of_the_labels(spec):
    y = clean_labels()
    y[y == 9] = 8  # a class without samples
    noisy = apply_noise(y, spec, C, 0, features(), dataset="mnist")
    expected = torch.zeros(C, C, dtype=torch.float64)
    for i in range(C):
        for j in range(C):
            if (y == i).any():
                expected[i, j] = (noisy.labels[y == i] == j).double().mean()
    torch.testing.assert_close(noisy.transition, expected)
    assert noisy.transition[9].sum() == 0
    assert noisy.rate == pytest.approx((noisy.labels != y).double().mean().item())


@pytest.mark.parametrize("spec", SPECS)
def test_seeded_without_touching_global_state_or_input(spec):
    y = clean_labels()
    kept = y.clone()
    states = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first, again, other = (
        apply_noise(y, spec, C, seed, features(), dataset="mnist") for seed in (1, 1, 2)
    )
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.labels, other.labels) == (spec == "none")
    assert torch.equal(y, kept)
    assert first.labels.data_ptr() != y.data_ptr()
    assert np.array_equal(states[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(states[1], torch.get_rng_state())


def test_numpy_and_torch_labels_agree():
    y = clean_labels()
    noisy = apply_noise(y, "symmetric:0.4", C, 0)
    same = apply_noise(y.numpy().astype(np.uint8), "symmetric:0.4", C, 0)
    assert torch.equal(noisy.labels, same.labels)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("symmetric:0.5", [0, 1, 1, 3, 1, 3, 2, 2, 0, 2, 2, 2]),
        ("pair:0.5", [1, 1, 2, 3, 0, 2, 2, 0, 1, 2, 3, 3]),
        ("instance:0.5", [0, 2, 0, 2, 0, 1, 2, 3, 0, 1, 2, 0]),
    ],
)
def test_the_labels_of_a_seed_stay_the_same_from_version_to_version(spec, expected):
    x = torch.arange(24.0).view(12, 2) / 24
    assert apply_noise(torch.arange(12) % 4, spec, 4, 0, x).labels.tolist() == expected


def test_file(tmp_path):
    y = clean_labels()
    given = y.clone()
    given[:7] = (given[:7] + 1) % C
    write_labels(tmp_path / "y.npy", given)
    noisy = apply_noise(y, f"file:{tmp_path / 'y.npy'}", C, 0)
    assert torch.equal(noisy.labels, given)
    assert noisy.flipped.nonzero().flatten().tolist() == list(range(7))
    with pytest.raises(ValueError, match=r"y\.npy: expected 5 labels, got 1003"):
        apply_noise(y[:5], f"file:{tmp_path / 'y.npy'}", C, 0)
    with pytest.raises(FileNotFoundError):
        apply_noise(y, "file:none.npy", C, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "expected one of none, symmetric"),
        ("uniform:0.4", "expected one of none, symmetric"),
        ("symmetric", "expected a rate after symmetric:, got nothing"),
        ("symmetric:", "expected a rate after symmetric:, got nothing"),
        ("symmetric:much", "expected a number as the rate, got 'much'"),
        ("symmetric:40", r"expected a rate in \[0, 1\], got 40"),
        ("symmetric:-0.1", r"expected a rate in \[0, 1\], got -0.1"),
        ("symmetric:nan", r"expected a rate in \[0, 1\], got nan"),
        ("symmetric:0.4:1-2", "only asymmetric takes a class map"),
        ("pair:0.4:", "expected class pairs such as 7-1,2-7 in the map, got ''"),
        ("asymmetric:0.4:", "expected class pairs such as 7-1,2-7 in the map, got ''"),
        ("asymmetric:0.4:7>1", "expected class pairs such as 7-1,2-7 in the map, got '7>1'"),
        ("asymmetric:0.4:7-1,7-2", "class 7 is mapped twice"),
        ("instance:0", r"expected a rate in \(0, 1\), got 0"),
        ("instance:1", r"expected a rate in \(0, 1\), got 1"),
        ("file", "expected a path after file:, got nothing"),
        ("none:0.4", "none takes no argument, got '0.4'"),
    ],
)
def test_bad_specifications(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_noise(spec)


def test_bad_spec_objects():
    with pytest.raises(ValueError, match="expected one of none"):
        NoiseSpec("wrong")
    with pytest.raises(ValueError, match="expected a path for file only, got None"):
        NoiseSpec("file")
    with pytest.raises(ValueError, match="expected a path for file only, got 'p'"):
        NoiseSpec("pair", 0.1, path="p")


def test_file_paths_may_hold_colons():
    assert parse_noise("file:a:b.npy").path == "a:b.npy"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([0, 10])}, ValueError, r"entry 1: .*in \[0, 10\), got 10"),
        ({"labels": torch.tensor([-1, 1])}, ValueError, r"entry 0: .*in \[0, 10\), got -1"),
        ({"labels": torch.tensor([0.0])}, TypeError, "labels: expected integer class labels"),
        ({"labels": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one label"),
        ({"num_classes": 1}, ValueError, "num_classes: expected at least 2, got 1"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"features": None}, ValueError, r"features: instance noise needs .*\[1003, \.\.\.\]"),
        ({"features": None, "spec": "hard:0.4"}, ValueError, "features: hard noise needs the inp"),
        ({"features": features(7)}, ValueError, r"features: expected shape \[1003, \.\.\.\]"),
        ({"features": torch.ones(N)}, ValueError, r"features: expected shape .*got \[1003\]"),
        ({"features": torch.ones(N, 2).long()}, TypeError, "features: expected floating point"),
        ({"features": torch.full((N, 2), torch.nan)}, ValueError, "features: expected finite"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "labels": clean_labels(),
        "spec": "instance:0.4",
        "num_classes": C,
        "seed": 0,
        "features": features(),
    }
    with pytest.raises(error, match=message):
        apply_noise(**(arguments | change))


def test_maps_are_read_only_and_without_fixed_points():
    with pytest.raises(TypeError):
        ASYMMETRIC_MAPS["mnist"][0] = 1
    assert all(a != b for m in ASYMMETRIC_MAPS.values() for a, b in m.items())


@pytest.mark.parametrize("rate", [0.0, 1 / 3, 0.29, 0.5, 1.0])
def test_apportion_adds_up_and_stays_near(rate):
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(0, 40, size=7)
        counts = apportion(sizes, rate)
        assert counts.sum() == round(rate * int(sizes.sum()))
        assert (np.abs(counts - rate * sizes) < 1).all()
        assert (counts >= 0).all()
        assert (counts <= sizes).all()


def test_stratified_split_is_a_partition_with_class_proportions():
    labels = clean_labels().numpy()
    train, test = stratified_split(labels, 0.2, seed=0)
    assert len(test) == round(0.2 * N)
    np.testing.assert_array_equal(np.sort(np.concatenate((train, test))), np.arange(N))
    for c in range(C):
        assert abs((labels[test] == c).sum() - 0.2 * (labels == c).sum()) < 1
    np.testing.assert_array_equal(test, stratified_split(labels, 0.2, seed=0)[1])
    assert not np.array_equal(test, stratified_split(labels, 0.2, seed=1)[1])
    with pytest.raises(ValueError, match="2 samples split into 2 for training and 0 for testing"):
        stratified_split(np.array([0, 1]), 0.2, seed=0)
