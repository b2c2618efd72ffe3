"""Every operation against its reference on drawn shapes, layouts, dtypes, ties and extremes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from als_ext import reference
from als_ext.ops import knn, knn_vote, sample_loss, weighted_loss
from als_ext.ops.also_step import also_step_
from als_ext.ops.pi_step import pi_rule, pi_state, pi_step_, pi_weight
from als_ext.reference import also_step, pi_step
from als_ext.reference.knn import distances
from als_ext.reference.knn import knn as reference_knn
from als_ext.reference.knn_vote import knn_vote as reference_vote
from als_ext.reference.sample_loss import sample_loss as reference_loss
from als_ext.reference.weighted_loss import weighted_loss as reference_weighted

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = 150

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
# Results of F32 and below are computed in float32; a gradient is rounded once to its own dtype.
LOSS = {d: {"rtol": 2e-6, "atol": 2e-6} for d in (F32, BF16, F16)} | {
    F64: {"rtol": 1e-12, "atol": 1e-12}
}
GRAD = {F32: 4e-6, BF16: 2**-8, F16: 2**-11 * 1.01, F64: 1e-12}
SEEDS = st.integers(0, 2**31)
VALUES = st.sampled_from(("normal", "ties", "large", "zero"))
LAYOUTS = st.sampled_from(("plain", "transposed", "every second", "offset", "reversed twice"))
LOSSES = {
    "cross_entropy": {},
    "gce": {"q": 0.7},
    "sce": {"alpha": 0.1, "beta": 1.0, "A": -4.0},
    "mae": {},
    "focal": {"gamma": 2.0},
    "bootstrap": {"beta": 0.8, "kind": "soft"},
}


def values(kind, shape, seed, dtype=F32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == "ties":
        x = x.round()
    elif kind == "large":
        x = x * 10.0 ** torch.randint(-4, 5, shape, generator=g)
        x = x.clamp(-6e4, 6e4)  # float16 ends at 65504
    elif kind == "zero":
        x = torch.zeros(shape)
    return x.to(dtype)


def laid_out(x, layout):
    """The same values with other strides."""
    if layout == "transposed" and x.ndim == 2:
        return x.t().contiguous().t()
    if layout == "every second" and x.ndim:
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "offset" and x.ndim:
        return torch.cat((x[:1], x))[min(1, len(x)) :]
    if layout == "reversed twice" and x.ndim:
        return x.flip(0).contiguous().flip(0)
    return x


@settings(max_examples=EXAMPLES)
@given(
    st.integers(0, 9),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    VALUES,
    LAYOUTS,
    st.sampled_from(sorted(LOSSES)),
    st.booleans(),
    SEEDS,
)
def test_losses_and_gradients(batch, classes, dtype, kind, layout, loss, weighted, seed):
    options = {"loss": loss, "ignore_index": -100, **LOSSES[loss]}
    g = torch.Generator().manual_seed(seed)
    z = laid_out(values(kind, (batch, classes), seed, dtype), layout).requires_grad_()
    target = torch.randint(0, classes, (batch,), generator=g)
    target[torch.rand(batch, generator=g) < 0.2] = -100
    target = laid_out(target, layout)
    weight = laid_out(torch.rand(batch, generator=g) * 3, layout)
    exact = z.detach().double().requires_grad_()
    if weighted:
        got, want = weighted_loss(z, target, weight, **options), None
        total, losses = got[0], got[1]
        want, want_losses = reference_weighted(exact, target, weight, **options)
        torch.testing.assert_close(
            total.double(), want, rtol=1e-5 if dtype != F64 else 1e-12, atol=1e-4
        )
    else:
        losses = sample_loss(z, target, **options)
        total, want_losses = losses.sum(), reference_loss(exact, target, **options)
        want = want_losses.sum()
    torch.testing.assert_close(losses.double(), want_losses, **LOSS[dtype])
    if batch == 0:
        assert losses.shape == (0,)
        return
    (mine,) = torch.autograd.grad(total, z)
    (theirs,) = torch.autograd.grad(want, exact)
    assert mine.shape == z.shape
    torch.testing.assert_close(mine.double(), theirs, rtol=GRAD[dtype], atol=4e-6)


@settings(max_examples=EXAMPLES)
@given(
    st.integers(0, 6),
    st.integers(1, 40),
    st.sampled_from((1, 2, 3, 16, 33, 130)),
    st.sampled_from((F32, BF16, F16)),
    VALUES,
    LAYOUTS,
    st.sampled_from(("l2", "ip", "cosine")),
    st.booleans(),
    st.data(),
)
def test_nearest_neighbours(queries, rows, columns, dtype, kind, layout, metric, own, data):
    seed = data.draw(SEEDS)
    database = laid_out(values(kind, (rows, columns), seed, dtype), layout)
    if own and rows < 2:
        own = False
    query = database if own else laid_out(values(kind, (queries, columns), seed + 1, dtype), layout)
    k = data.draw(st.integers(1, rows - own))
    got, index = knn(query, database, k, metric=metric, exclude_self=own)
    want, want_index = reference_knn(query, database, k, metric=metric, exclude_self=own)
    assert got.shape == index.shape == (len(query), k)
    assert (index.sort(dim=1).values.diff(dim=1) > 0).all(), "a neighbour twice"
    if kind in {"ties", "zero"} and metric != "cosine":  # sums of whole numbers: no rounding
        assert torch.equal(got, want)
        assert torch.equal(index, want_index)
        return
    scale = distances(query, database, metric=metric).abs().max().item() if want.numel() else 0.0
    close = {"rtol": 1.2e-7, "atol": 1e-15 * scale + 1e-14}
    torch.testing.assert_close(got, want, **close)
    theirs = distances(query, database, metric=metric).gather(1, index)
    torch.testing.assert_close(got, theirs, **close)


@settings(max_examples=EXAMPLES)
@given(
    st.integers(0, 9),
    st.integers(1, 12),
    st.integers(1, 9),
    VALUES,
    LAYOUTS,
    st.sampled_from(("uniform", "distance", "softmax")),
    SEEDS,
)
def test_votes(queries, k, classes, kind, layout, weighting, seed):
    g = torch.Generator().manual_seed(seed)
    samples = 13
    label = torch.randint(-1, classes, (samples,), generator=g)
    index = laid_out(torch.randint(-1, samples + 1, (queries, k), generator=g), layout)
    distance = values(kind, (queries, k), seed).abs()
    distance[torch.rand(queries, k, generator=g) < 0.1] = float("nan")
    distance[torch.rand(queries, k, generator=g) < 0.1] = float("inf")
    distance = laid_out(distance, layout)
    arguments = (distance, index, label, classes)
    got = knn_vote(*arguments, weighting=weighting)
    want = reference_vote(*arguments, weighting=weighting)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[2], want[2], rtol=1e-6, atol=1e-6)
    clear = (want[2] > 1e-5) | (want[0] < 0)
    if weighting == "uniform":
        clear[:] = True  # whole numbers: the lower class wins a tie
    assert torch.equal(got[0][clear], want[0][clear])


@settings(max_examples=EXAMPLES)
@given(
    st.integers(1, 300),
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.sampled_from((F32, F64, BF16, F16)),
    st.sampled_from(("max", "min")),
    st.sampled_from((1.0, 1.5)),
    st.booleans(),
    LAYOUTS,
    SEEDS,
)
def test_pi_steps(n, batches, dtype, direction, temperature, lazy, layout, seed):
    options = {"lr": 1e-2, "decay": 1e-2, "temperature": temperature, "direction": direction}
    rule = pi_rule(**options)
    state = pi_state(n, rule, capacity=40, lazy=lazy)
    want = torch.full((n,), 1 / n, dtype=F64)
    g = torch.Generator().manual_seed(seed)
    for batch in batches:
        index = torch.randint(0, n, (batch,), generator=g)
        loss = (torch.rand(batch, generator=g) * 5).to(dtype)
        loss[torch.rand(batch, generator=g) < 0.1] = float("nan")  # is left out
        pi_step_(state, rule, laid_out(index, layout), laid_out(loss, layout))
        want = pi_step.pi_step(want, index, loss, **options)
    pi = pi_weight(state, rule).double() / n
    torch.testing.assert_close(pi, want, rtol=3e-6, atol=0)
    assert pi.sum().item() == pytest.approx(1, abs=1e-6)


@settings(max_examples=EXAMPLES)
@given(
    st.lists(
        st.lists(st.integers(0, 5), max_size=3).map(tuple) | st.tuples(st.integers(0, 5000)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from((F32, F64)),
    VALUES,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_also_steps(shapes, dtype, kind, half, amsgrad, decoupled, seed):
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "alpha": 0.7}
    options |= {"weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    params = [values("normal", shape, seed + i, dtype) for i, shape in enumerate(shapes)]
    states = [also_step.AlsoState.start(p) for p in params]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(3)]
    bases = [p.clone() for p in params] if half else []
    steps = [torch.zeros((), dtype=torch.int64) for _ in params]
    for round_ in range(3):
        grads = [values(kind, p.shape, seed + 9 * round_, dtype) for p in params]
        for p, g in zip(params, grads, strict=True):
            # Where decay cancels a gradient, Adam makes a step of what rounding leaves of both.
            g[(g.double() + 0.1 * p.double()).abs() < 1e-3] += 1
        wanted = [
            also_step.also_step(p, g, s, half_step=half, amsgrad=amsgrad, **options)
            for p, g, s in zip(params, grads, states, strict=True)
        ]
        most = moments[2] if amsgrad else []
        also_step_(params, grads, *moments[:2], most, bases, steps, **options)
        close = {"rtol": 1e-10, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-5}
        for p, want in zip(params, wanted, strict=True):
            torch.testing.assert_close(p.double(), want, **close)
    assert [int(s) for s in steps] == [state.step for state in states]


def test_every_reference_has_a_property():
    import pkgutil

    known = {"sample_loss", "weighted_loss", "knn", "knn_vote", "pi_step", "also_step"}
    assert {m.name for m in pkgutil.iter_modules(reference.__path__)} == known
