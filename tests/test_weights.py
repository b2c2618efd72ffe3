import copy
import functools
import io
import math
import pickle

import pytest
import torch

import als_ext
from als_ext import SampleWeights
from als_ext.reference.pi_step import pi_step as softmax_step

AGE = 6  # kPiAge of pi_step_lazy_math.h: steps since the sums were made


@pytest.fixture(params=["dense", "lazy"])
def make(request):
    """SampleWeights in a mode: every test that takes this runs on both."""
    return functools.partial(SampleWeights, mode=request.param)


def trained(make, n, device, *, steps=20, batch=16, seed=0, **settings):
    """Weights after some steps."""
    weights = make(n, device=device, **{"lr": 0.5, **settings})
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(0, n, (batch,), generator=generator).to(device)
        weights.update_(index, torch.rand(batch, generator=generator).to(device) * 3)
    return weights


def chi_square_fits(counts, expected):
    """Whether counts are a plausible draw: statistic within six standard deviations."""
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return statistic < freedom + 6 * (2 * freedom) ** 0.5


# ---- the training step ------------------------------------------------------------------------


def test_starts_at_the_prior(make, device):
    index = torch.arange(4, device=device)
    weights = make(4, device=device)
    assert weights.weight(index).tolist() == weights.half_weight(index).tolist() == [1.0] * 4
    prior = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    for temperature in (1.0, 2.0):
        weights = make(4, prior=prior, temperature=temperature)
        assert weights.device.type == device.type
        for read in (weights.weight, weights.half_weight):
            torch.testing.assert_close(read(index), prior / 2.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e308])
def test_a_prior_of_any_scale_is_normalised(make, scale):
    prior = torch.tensor([1.0, 1e-6, 0.5, 0.25], dtype=torch.float64)
    weights = make(4, prior=prior * scale)
    torch.testing.assert_close(weights.pi().double(), prior / prior.sum(), rtol=1e-6, atol=0)


def test_half_weight_is_one_more_step_with_the_last_losses(make, device, generator):
    settings = {"lr": 0.3, "decay": 0.1, "temperature": 1.2, "direction": "min"}
    prior = torch.rand(40, generator=generator).double() + 0.1
    weights = make(40, prior=prior, device=device, **settings)
    pi = prior / prior.sum()
    every = torch.arange(40, device=device)
    for batch in (5, 90, 1, 17):  # the room for the half step grows, then stays
        index = torch.randint(0, 40, (batch,), generator=generator)
        loss = torch.rand(batch, generator=generator)
        weights.update_(index.to(device), loss.to(device))
        pi = softmax_step(pi, index, loss, prior=prior / prior.sum(), **settings)
        half = softmax_step(pi, index, loss, prior=prior / prior.sum(), **settings)
        for got, want in ((weights.weight(every), pi), (weights.half_weight(every), half)):
            torch.testing.assert_close(got.cpu().double(), 40 * want, rtol=1e-6, atol=0)


def test_a_skipped_step_keeps_the_pending_half_step(make, device):
    weights = trained(make, 30, device)
    every = torch.arange(30, device=device)
    before = weights.half_weight(every), weights.weight(every), weights.skipped.clone()
    assert not torch.equal(before[0], before[1])
    large = torch.zeros(100, dtype=torch.int64, device=device)  # more room is made all the same
    loss = torch.full((100,), math.nan, device=device)
    weights.update_(large, loss, found_inf=torch.ones((), device=device))
    after = weights.half_weight(every), weights.weight(every), weights.skipped
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_groups_share_one_weight(make, device):
    """Three groups of samples: index holds group ids, the losses of a group add up."""
    weights = make(3, lr=1.0, decay=0.0, device=device)
    group = torch.tensor([0, 1, 1, 2, 1], device=device)
    loss = torch.tensor([1.0, 0.5, 0.25, 0.0, 0.25], device=device)
    weights.update_(group, loss)
    want = 3 * torch.tensor([1.0, 1.0, 0.0]).softmax(0)
    torch.testing.assert_close(weights.weight(group).cpu(), want[group.cpu()], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_a_model_are_constants(make, dtype, device):
    parameter = torch.ones((), device=device, requires_grad=True)
    weights = make(3, lr=1.0, device=device)
    index = torch.tensor([0, 2], device=device)
    losses = (parameter * torch.tensor([1.0, 2.0], device=device)).to(dtype)
    (weights.weight(index) * losses).sum().backward()
    assert parameter.grad.item() == 3.0
    weights.update_(index, losses)
    assert weights.weight(index).argmax().item() == 1
    assert not weights.weight(index).requires_grad


def test_compiles_with_fullgraph(make, device):
    def step(index, loss):
        weights.update_(index, loss)
        return weights.weight(index), weights.half_weight(index)

    index = torch.tensor([5, 3, 5], device=device)
    loss = torch.tensor([1.0, 2.0, 0.5], device=device)
    weights = trained(make, 8, device)
    want = step(index, loss)
    weights = trained(make, 8, device)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(index, loss)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("with_prior", [False, True])
def test_ten_million_samples(make, with_prior):
    n = 10_000_000
    prior = torch.linspace(0.5, 1.5, n) if with_prior else None
    weights = make(n, lr=1.0, prior=prior)
    index = torch.arange(0, n, n // 1000)
    weights.update_(index, torch.full((len(index),), 5.0))
    pi = weights.pi()
    assert pi.sum(dtype=torch.float64).item() == pytest.approx(1.0, abs=2e-7)
    kappa = 1 / 1.01
    ratio = pi[index[1] + 1].item() / pi[index[1]].item()
    assert ratio == pytest.approx(math.exp(-5 * kappa), rel=1e-5)


# ---- reading ----------------------------------------------------------------------------------


def test_pi_and_log_pi(make, device):
    weights = trained(make, 50, device, prior=torch.rand(50) + 0.1)
    pi = weights.pi()
    assert pi.dtype == torch.float32
    assert pi.sum().item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(weights.log_pi().exp(), pi, rtol=1e-6, atol=0)
    index = torch.tensor([7, 7, 0], device=device)
    assert torch.equal(weights.log_pi(index), weights.log_pi()[index])
    torch.testing.assert_close(weights.weight(index), 50 * pi[index], rtol=1e-6, atol=0)


def test_log_pi_does_not_underflow(make, device):
    weights = make(2, lr=1.0, decay=0.0, device=device)
    weights.update_(torch.tensor([0], device=device), torch.tensor([500.0], device=device))
    assert weights.pi().tolist() == [1.0, 0.0]
    assert weights.log_pi().tolist() == pytest.approx([0.0, -500.0], abs=1e-3)


def test_top_breaks_ties_by_lower_index(make, device):
    weights = make(1000, lr=1.0, device=device)
    index = torch.tensor([900, 5, 400, 7], device=device)
    weights.update_(index, torch.tensor([2.0, 1.0, 2.0, 3.0], device=device))
    order = [7, 400, 900, 5, 0, 1, 2, 3, 4, 6]
    for m in range(11):
        assert weights.top(m).tolist() == order[:m]
    assert sorted(weights.top(1000).tolist()) == list(range(1000))


def test_entropy_effective_size_and_kl(make, device, generator):
    prior = torch.rand(300, generator=generator).double() + 0.05
    for given in (None, prior):
        weights = trained(make, 300, device, prior=given, lr=2.0)
        pi = weights.log_pi().double().cpu().softmax(0)
        start = prior / prior.sum() if given is not None else torch.full_like(pi, 1 / 300)
        got = [weights.entropy(), weights.effective_size(), weights.kl()]
        want = [-(pi * pi.log()).sum(), 1 / (pi**2).sum(), (pi * (pi / start).log()).sum()]
        assert all(g.dtype == torch.float64 and g.dim() == 0 for g in got)
        assert [g.item() for g in got] == pytest.approx([w.item() for w in want], rel=1e-5)
    fresh = make(300, device=device)
    assert fresh.entropy().item() == pytest.approx(math.log(300))
    assert fresh.effective_size().item() == pytest.approx(300)
    assert fresh.kl().item() == 0.0


def test_reset_gives_back_the_prior(make, device, generator):
    prior = torch.rand(60, generator=generator).double() + 0.1
    prior /= prior.sum()
    index = torch.tensor([3, 59, 3, 20], device=device)
    others = torch.ones(60, dtype=torch.bool)
    others[index.cpu()] = False
    for temperature in (1.0, 1.5):
        weights = trained(make, 60, device, prior=prior, temperature=temperature, lr=1.0)
        before = weights.pi().double().cpu()
        weights.update_(index, torch.ones(4, device=device))
        weights.reset_(index)
        after = weights.pi().double().cpu()
        torch.testing.assert_close(after[~others], prior[~others], rtol=2e-6, atol=0)
        ratio = after[others] / before[others]
        if temperature == 1.0:  # the others keep their ratios (but for one step's decay)
            torch.testing.assert_close(ratio / ratio[0], torch.ones(57).double(), rtol=0.1, atol=0)
        assert after.sum().item() == pytest.approx(1.0, abs=1e-6)
        # The pending half step forgets them as well: it only decays.
        half = weights.half_weight(torch.arange(60, device=device)).double().cpu() / 60
        settings = weights.settings
        del settings["n"]
        want = softmax_step(after, index[:0].cpu(), torch.empty(0), prior=prior, **settings)
        torch.testing.assert_close(half, want, rtol=2e-6, atol=0)


def test_reset_of_some_keeps_the_ratios_of_the_others_exactly(make, device):
    weights = trained(make, 100, device)
    before = weights.log_pi()
    index = torch.arange(0, 100, 3, device=device)
    weights.reset_(index)
    after = weights.log_pi()
    others = torch.ones(100, dtype=torch.bool, device=device)
    others[index] = False
    change = (after - before)[others]
    torch.testing.assert_close(change, change[:1].expand_as(change), rtol=0, atol=2e-6)
    torch.testing.assert_close(after[index].exp(), torch.full_like(after[index], 0.01))


def test_reset_of_all_and_of_none(make, device):
    weights = trained(make, 20, device)
    before = weights.pi()
    weights.reset_(torch.empty(0, dtype=torch.int64, device=device))
    assert torch.equal(weights.pi(), before)
    weights.reset_(torch.arange(20, device=device))
    torch.testing.assert_close(weights.pi(), torch.full((20,), 0.05, device=device))
    weights.update_(torch.tensor([1], device=device), torch.tensor([1.0], device=device))
    assert weights.top(1).tolist() == [1]


# ---- sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [True, False])
def test_first_draws_follow_pi(make, replacement, device):
    weights = trained(make, 12, device, lr=1.0)
    generator = torch.Generator(device).manual_seed(1)
    if replacement:
        draws = weights.sample(50_000, generator=generator)
    else:
        draws = torch.cat([weights.sample(1, False, generator) for _ in range(5_000)])
    counts = draws.cpu().bincount(minlength=12).double()
    assert chi_square_fits(counts, weights.pi().double().cpu() * len(draws))


def test_pairs_without_replacement_follow_the_sequential_law(make, device):
    weights = make(4, prior=torch.tensor([0.5, 0.3, 0.15, 0.05]), device=device)
    generator = torch.Generator(device).manual_seed(2)
    draws = 6_000
    counts = torch.zeros(4, 4).double()
    for _ in range(draws):
        first, second = weights.sample(2, replacement=False, generator=generator).tolist()
        counts[first, second] += 1
    pi = weights.pi().double().cpu()
    law = pi[:, None] * pi[None, :] / (1 - pi[:, None])
    assert counts.diagonal().sum() == 0
    apart = ~torch.eye(4, dtype=torch.bool)
    assert chi_square_fits(counts[apart], law[apart] * draws)


@pytest.mark.parametrize("replacement", [True, False])
def test_more_than_2_to_the_24_categories(make, replacement):
    """Where torch.multinomial gives up. Skewed, with a tenth of the mass beyond 2^24."""
    n = 2**24 + 5000
    prior = torch.linspace(3.0, 1.0, n)
    prior[2**24 :] *= prior[: 2**24].sum() / prior[2**24 :].sum() / 9
    weights = make(n, prior=prior)
    generator = torch.Generator().manual_seed(3)
    m = 200_000 if replacement else 2_000  # few: without replacement the tail would be used up
    draws = weights.sample(m, replacement, generator)
    assert draws.shape == (m,)
    if not replacement:
        assert len(draws.unique()) == m
    edges = torch.cat([torch.arange(0, 2**24, 2**19), torch.tensor([2**24, 2**24 + 2500])])
    mass = prior.double().cumsum(0)
    mass = torch.diff(mass[edges - 1].index_fill(0, torch.tensor([0]), 0.0), append=mass[-1:])
    counts = torch.bucketize(draws, edges, right=True).sub(1).bincount(minlength=len(edges))
    if replacement:
        assert chi_square_fits(counts.double(), mass / mass.sum() * m)
    else:  # the 5000 heavy ones lose a little as they are used up
        assert counts[-2:].sum().item() == pytest.approx(0.1 * m, rel=0.15)
        assert chi_square_fits(
            counts[:-2].double(), mass[:-2] / mass[:-2].sum() * counts[:-2].sum()
        )


def test_sample_is_repeatable_and_takes_everything_once(make, device):
    weights = trained(make, 500, device)
    draws = [weights.sample(100, r, torch.Generator(device).manual_seed(5)) for r in (1, 1, 0, 0)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[2], draws[3])
    assert sorted(weights.sample(500, replacement=False).tolist()) == list(range(500))
    assert weights.sample(0).shape == weights.sample(0, replacement=False).shape == (0,)


def test_one_sample_has_it_all(make, device):
    weights = make(1, device=device)
    index = torch.zeros(3, dtype=torch.int64, device=device)
    weights.update_(index, torch.tensor([1.0, math.inf, 3.0], device=device))
    assert weights.weight(index).tolist() == weights.half_weight(index).tolist() == [1.0] * 3
    assert weights.pi().tolist() == [1.0]
    assert weights.sample(2).tolist() == [0, 0]
    assert weights.entropy().item() == pytest.approx(0.0, abs=1e-12)
    assert weights.kl().item() == pytest.approx(0.0, abs=1e-12)
    assert weights.skipped.item() == 1


# ---- keeping ----------------------------------------------------------------------------------


def through_file(make, weights):
    file = io.BytesIO()
    torch.save(weights.state_dict(), file)
    file.seek(0)
    fresh = make(60, lr=0.5, prior=torch.arange(1, 61).float(), device=weights.device)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "keep",
    [
        through_file,
        lambda make, w: copy.deepcopy(w),
        lambda make, w: pickle.loads(pickle.dumps(w)),
    ],
)
def test_a_copy_goes_on_bit_for_bit(make, keep, device, generator):
    weights = trained(make, 60, device, prior=torch.arange(1, 61).float())
    state = weights.state_dict()
    other = keep(make, weights)
    every = torch.arange(60, device=device)
    assert torch.equal(other.half_weight(every), weights.half_weight(every))
    index = torch.randint(0, 60, (33,), generator=generator).to(device)
    weights.update_(index, torch.rand(33, device=device))  # the copy does not follow
    assert torch.equal(other.state_dict()["u"], state["u"])
    other = keep(make, weights)
    for _ in range(5):
        loss = torch.rand(33, generator=generator).to(device)
        weights.update_(index, loss)
        other.update_(index, loss)
    ours, theirs = weights.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        same = torch.equal(value, theirs[key]) if torch.is_tensor(value) else value == theirs[key]
        assert same, key
    assert torch.equal(other.half_weight(every), weights.half_weight(every))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 7}, r"state_dict\['n'\]: expected 6, got 7"),
        ({"lr": 1.0}, r"state_dict\['lr'\]: expected 0.001, got 1.0"),
        ({"direction": "min"}, r"state_dict\['direction'\]: expected 'max', got 'min'"),
        ({"u": torch.zeros(7)}, r"state_dict\['u'\]: expected shape \[6\], got \[7\]"),
        ({"u": torch.zeros(6).half()}, r"state_dict\['u'\]: expected dtype float"),
        ({"u": None}, r"state_dict\['u'\]: expected a tensor, got None"),
        ({"log_prior": torch.zeros(6)}, r"state_dict\['log_prior'\]: expected None, got a tensor"),
        (
            {"pending_grad": torch.zeros(3).double()},
            r"state_dict\['pending_grad'\]: expected shape",
        ),
        ({"skipped": "gone"}, r"state_dict: .*got none for \['skipped'\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(make, change, message):
    weights = make(6)
    state = make(6).state_dict() | change
    if change == {"skipped": "gone"}:
        del state["skipped"]
    weights.update_(torch.tensor([1]), torch.tensor([2.0]))
    before = weights.state_dict()
    with pytest.raises(ValueError, match=message):
        weights.load_state_dict(state)
    after = weights.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if torch.is_tensor(before[k]))


def test_another_prior_does_not_load(make):
    state = make(3, prior=torch.tensor([1.0, 2.0, 3.0])).state_dict()
    with pytest.raises(
        ValueError, match=r"state_dict\['log_prior'\]: expected this object's prior"
    ):
        make(3, prior=torch.tensor([1.0, 2.0, 3.1])).load_state_dict(state)
    make(3, prior=torch.tensor([2.0, 4.0, 6.0])).load_state_dict(state)


@pytest.mark.cuda
def test_moves_between_devices(make, device):
    weights = trained(make, 30, device)
    before = weights.half_weight(torch.arange(30, device=device)).cpu()
    assert weights.to("cpu") is weights
    assert torch.equal(weights.half_weight(torch.arange(30)), before)
    weights.to("cuda")
    assert weights.device.type == "cuda"


@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize(
    ("lr", "reach", "most_passes"),
    [(0.002, 2, 3), (0.02, 20, 600), (0.2, 200, 100_000)],  # 600 nats apart: exact passes pay
)
def test_lazy_follows_float64_for_a_hundred_thousand_steps(
    direction, with_prior, lr, reach, most_passes, generator
):
    """Duplicates in every batch, samples that never come, large r: 1e-6 relative, every sample."""
    n, batch, period, steps = 400, 8, 101, 100_000
    prior = torch.rand(n, generator=generator).double() + 0.01 if with_prior else None
    decay = 1e-3 / lr
    weights = SampleWeights(
        n, lr=lr, decay=decay, prior=prior, direction=direction, mode="lazy", device="cpu"
    )
    index = torch.randint(0, n, (period, batch), generator=generator).clamp_min(20)
    index[:, 1] = index[:, 0]
    loss = torch.rand(period, batch, generator=generator) * 20 - 5
    passes, age, sums = 0, -1.0, weights._state.sums
    for step in range(steps):
        weights.update_(index[step % period], loss[step % period])
        passes += sums[AGE].item() <= age
        age = sums[AGE].item()
    # The same in closed form, in float64: r = sum over s of rho^(steps - s) step g_s.
    rule = weights._rule
    gradient = torch.zeros(period, n).double().scatter_add_(1, index, loss.double()) * rule.step
    powers = torch.tensor(rule.rho, dtype=torch.float64) ** torch.arange(steps, 0, -1).double()
    r = sum(powers[k::period].sum() * gradient[k] for k in range(period))
    base = torch.zeros(n).double() if prior is None else (prior / prior.sum()).log()
    torch.testing.assert_close(
        weights.log_pi().double(), (base + r).log_softmax(0), rtol=2e-7, atol=1e-6
    )
    torch.testing.assert_close(weights.pi().double(), (base + r).softmax(0), rtol=1e-6, atol=1e-37)
    assert r.max() - r.min() > reach
    assert passes <= most_passes


def test_lazy_and_dense_are_the_same_distribution(device, generator):
    lazy, dense = (SampleWeights(300, lr=0.1, mode=m, device=device) for m in ("lazy", "dense"))
    for _ in range(200):
        index = torch.randint(0, 300, (32,), generator=generator).to(device)
        loss = torch.rand(32, generator=generator).to(device)
        lazy.update_(index, loss)
        dense.update_(index, loss)
    every = torch.arange(300, device=device)
    for read in ("pi", "entropy", "effective_size", "kl"):
        got, want = (getattr(w, read)() for w in (lazy, dense))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(lazy.half_weight(every), dense.half_weight(every))
    assert torch.equal(lazy.top(20), dense.top(20))


def test_auto_is_lazy_where_n_is_large_against_the_batch(monkeypatch):
    assert SampleWeights(8191, device="cpu").mode == "dense"
    assert SampleWeights(8192, device="cpu").mode == "lazy"
    monkeypatch.setitem(als_ext.weights.LAZY_FROM, "cpu", (1000, 30))
    weights = SampleWeights(60_000, device="cpu")
    assert weights.mode == "lazy"
    index = torch.arange(128)
    weights.update_(index, index / 100)
    assert weights.mode == "lazy"
    before = weights.log_pi()
    weights.update_(torch.arange(0), torch.zeros(0))
    large = torch.arange(4096)
    other = copy.deepcopy(weights)
    weights.update_(large, large / 1000)
    assert weights.mode == "dense"
    other._mode = "lazy"  # the same step, lazily
    other.update_(large, large / 1000)
    torch.testing.assert_close(weights.log_pi(), other.log_pi(), rtol=0, atol=2e-6)
    assert not torch.equal(weights.log_pi(), before)


@pytest.mark.parametrize("modes", [("lazy", "dense"), ("dense", "lazy")])
def test_a_checkpoint_of_the_other_mode_is_converted(modes, generator):
    source, target, auto = (
        SampleWeights(50_000, lr=0.1, mode=m, device="cpu") for m in (*modes, "auto")
    )
    for _ in range(5):
        index = torch.randint(0, 50_000, (16,), generator=generator)
        source.update_(index, torch.rand(16, generator=generator))
    for weights in (target, auto):
        weights.load_state_dict(source.state_dict())
    assert auto.mode == source.mode
    assert target.mode == modes[1]
    torch.testing.assert_close(target.log_pi(), source.log_pi(), rtol=0, atol=2e-6)
    assert torch.equal(auto.log_pi(), source.log_pi())
    for weights in (source, target, auto):
        weights.update_(index, torch.ones(16))
    torch.testing.assert_close(target.half_weight(index), source.half_weight(index))
    assert torch.equal(auto.half_weight(index), source.half_weight(index))


def test_a_lazy_state_beyond_float32_turns_dense(generator):
    """T = 3 shrinks A by 3 a step: after 150 steps u = r / A is beyond float32, r is not."""
    settings = {"lr": 0.3, "temperature": 3.0, "device": "cpu"}
    lazy = SampleWeights(9000, mode="auto", **settings)
    for _ in range(150):
        index = torch.randint(0, 9000, (64,), generator=generator)
        lazy.update_(index, torch.rand(64, generator=generator))
    assert lazy._state.u.abs().max() > torch.finfo(torch.float32).max
    loaded = SampleWeights(9000, mode="dense", **settings)
    loaded.load_state_dict(lazy.state_dict())
    turned = copy.deepcopy(lazy)
    turned._make_dense()
    for weights in (loaded, turned):
        assert weights.mode == "dense"
        torch.testing.assert_close(weights.log_pi(), lazy.log_pi(), rtol=0, atol=2e-6)
        torch.testing.assert_close(weights.half_weight(index), lazy.half_weight(index))


def test_to_and_repr():
    weights = SampleWeights(7, lr=0.25, direction="min")
    assert weights.to("cpu") is weights
    assert len(weights) == weights.n == 7
    assert repr(weights) == (
        "SampleWeights(n=7, lr=0.25, decay=0.01, temperature=1.0, direction='min', "
        "prior='uniform', device='cpu')"
    )
    for device in ("meta", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=f"device: expected cpu.* got '{device}'"):
            weights.to(device)


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n": 0}, ValueError, "n: expected >= 1, got 0"),
        ({"n": 3.0}, TypeError, "n: expected an int, got float"),
        ({"lr": math.nan}, ValueError, "lr: expected a finite number"),
        ({"temperature": 0.5}, ValueError, "temperature: expected more than 1 /"),
        ({"direction": "maximum"}, ValueError, "direction: expected one of 'max', 'min'"),
        ({"mode": "fast"}, ValueError, "mode: expected one of 'auto', 'dense', 'lazy', got 'fast'"),
        ({"prior": [1.0] * 4}, TypeError, "prior: expected a torch.Tensor, got list"),
        ({"prior": torch.ones(5)}, ValueError, r"prior: expected shape \[4\], got \[5\]"),
        ({"prior": torch.ones(4).long()}, TypeError, "prior: expected dtype float32"),
        (
            {"prior": torch.tensor([1.0, 0.0, 1.0, 1.0])},
            ValueError,
            "prior: expected positive finite values, got 0.0 at position 1",
        ),
        (
            {"prior": torch.tensor([1.0, 1.0, 1.0, math.nan])},
            ValueError,
            "prior: expected positive finite values, got nan at position 3",
        ),
        ({"device": "meta"}, ValueError, "device: expected cpu or cuda, got 'meta'"),
    ],
)
def test_bad_settings_are_named(change, error, message):
    with pytest.raises(error, match=message):
        SampleWeights(**{"n": 4, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda w: w.weight(torch.tensor([0, -1])),
            ValueError,
            r"index: expected values in \[0, 4\), got -1 at position 1",
        ),
        (lambda w: w.half_weight(torch.tensor([4])), ValueError, "index: expected values in"),
        (lambda w: w.log_pi(torch.tensor([4])), ValueError, "index: expected values in"),
        (lambda w: w.reset_(torch.tensor([0, 4])), ValueError, "got 4 at position 1"),
        (lambda w: w.weight(torch.tensor([1.0])), TypeError, "index: expected dtype int64"),
        (lambda w: w.weight(torch.tensor(1)), ValueError, r"index: expected shape \[B\], got \[\]"),
        (
            lambda w: w.update_(torch.tensor([0, 9]), torch.ones(2)),
            ValueError,
            "got 9 at position 1",
        ),
        (
            lambda w: w.update_(torch.tensor([0]), torch.ones(2)),
            ValueError,
            r"loss: expected shape \[1\], got \[2\]",
        ),
        (lambda w: w.top(5), ValueError, r"m: expected in \[0, 4\], got 5"),
        (lambda w: w.top(2.0), TypeError, "m: expected an int"),
        (lambda w: w.sample(-1), ValueError, "m: expected >= 0, got -1"),
        (lambda w: w.sample(5, replacement=False), ValueError, r"m: expected in \[0, 4\], got 5"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(make, call, error, message):
    weights = make(4)
    with pytest.raises(error, match=message):
        call(weights)
    assert weights.weight(torch.arange(4)).tolist() == [1.0] * 4


@pytest.mark.cuda
def test_devices_that_do_not_fit_are_named():
    weights = SampleWeights(4, device="cuda")
    with pytest.raises(ValueError, match="index: expected device 'cuda:0', got 'cpu'"):
        weights.weight(torch.tensor([0]))
    with pytest.raises(ValueError, match="generator: expected device"):
        weights.sample(1, generator=torch.Generator())
