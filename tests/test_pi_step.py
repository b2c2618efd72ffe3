import functools
import math

import pytest
import torch
from torch.library import opcheck

from als_ext.ops.pi_step import (
    NO_INDEX,
    PiState,
    pi_normalize_,
    pi_rule,
    pi_state,
    pi_step_,
    pi_weight,
    readable,
)
from als_ext.reference.pi_step import pi_step as softmax_step

DEFAULT = {"lr": 1e-3, "decay": 1e-2, "temperature": 1.0, "direction": "max"}


def settings(**changes):
    return {**DEFAULT, **changes}


@pytest.fixture(params=["dense", "lazy"])
def make(request):
    """Makes a state and its rule: every test that takes this runs on dense and lazy states."""

    def make(n, device, *, capacity=64, prior=None, **changes):
        rule = pi_rule(**settings(**changes))
        log_prior = None if prior is None else (prior.double() * n / prior.sum()).log().float()
        where = {} if log_prior is None else {"log_prior": log_prior.to(device)}
        lazy = request.param == "lazy"
        return pi_state(n, rule, capacity=capacity, lazy=lazy, device=device, **where), rule

    return make


def operands(index, loss):
    """index, order and loss as the operator of their device takes them."""
    ordered, order = (index, None) if index.device.type == "cpu" else index.sort(stable=True)
    return ordered, order, loss.double()


def copy(state):
    return PiState(*(None if t is None else t.clone() for t in state))


def same(a, b):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def pi_of(state, rule, **options):
    return pi_weight(state, rule, **options).double().cpu() / state.u.shape[0]


def start(n, prior):
    return torch.full((n,), 1 / n).double() if prior is None else prior.double() / prior.sum()


# ---- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize(
    ("changes", "rtol"),
    [
        ({}, 1e-6),
        ({"direction": "min"}, 1e-6),
        ({"temperature": 1.5}, 1e-6),
        ({"temperature": 3.0, "decay": 0.5, "lr": 0.3, "direction": "min"}, 1e-6),
        ({"decay": 0.0, "lr": 0.01}, 1e-6),  # rho = 1: plain multiplicative weights
        ({"decay": 0.0, "temperature": 2.0}, 1e-6),  # the prior is forgotten
        ({"temperature": 0.999995}, 2e-6),  # just above kappa: c = 2
        ({"lr": 0.5}, 3e-5),  # r spreads over tens: its float32 rounding shows
    ],
)
def test_follows_the_softmax_form_in_float64(make, changes, rtol, with_prior, device, generator):
    n, batch = 257, 64
    prior = torch.rand(n, generator=generator).double() + 0.01 if with_prior else None
    state, rule = make(n, device, prior=prior, **changes)
    want = start(n, prior)
    torch.testing.assert_close(pi_of(state, rule), want, rtol=1e-6, atol=0)
    normalised = None if prior is None else prior / prior.sum()
    for step in range(300):
        index = torch.randint(0, n, (batch,), generator=generator)
        loss = torch.rand(batch, generator=generator) * 5
        pi_step_(state, rule, index.to(device), loss.to(device))
        want = softmax_step(want, index, loss, prior=normalised, **settings(**changes))
        if step % 60 == 59:
            half = softmax_step(want, index, loss, prior=normalised, **settings(**changes))
            torch.testing.assert_close(pi_of(state, rule), want, rtol=rtol, atol=0)
            torch.testing.assert_close(pi_of(state, rule, half=True), half, rtol=rtol, atol=0)
            log_weight = pi_weight(state, rule, log=True).double().cpu()
            torch.testing.assert_close(log_weight, (n * want).log(), rtol=0, atol=3 * rtol)


def test_a_step_by_hand(make, device):
    """lr = decay = 1 halves log pi + log prior + g; sqrt(1/2 1/2 4) : sqrt(1/2 1/2) = 2 : 1."""
    state, rule = make(2, device, lr=1.0, decay=1.0)
    index, loss = torch.tensor([0]), torch.tensor([math.log(4.0)])
    pi_step_(state, rule, index.to(device), loss.to(device))
    got = pi_weight(state, rule).tolist()
    assert got == pytest.approx([4 / 3, 2 / 3], rel=1e-6)
    half = pi_weight(
        state, rule, half=True
    ).tolist()  # sqrt(2/3 1/2 4) : sqrt(1/3 1/2) = sqrt(8) : 1
    assert half == pytest.approx([2 * 8**0.5 / (1 + 8**0.5), 2 / (1 + 8**0.5)], rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 8191, 8192, 8193, 20_011])
@pytest.mark.parametrize("with_prior", [False, True])
def test_every_size_of_the_pass(make, n, with_prior, device, generator):
    prior = torch.rand(n, generator=generator).double() + 0.01 if with_prior else None
    state, rule = make(n, device, prior=prior, lr=0.5)
    state.u.add_(torch.randn(n, generator=generator).mul(3).to(device))
    pi_normalize_(state, rule)
    want = pi_of(state, rule)
    logits = state.u.double().cpu() + (0.0 if prior is None else (n * start(n, prior)).log())
    torch.testing.assert_close(want, logits.softmax(0), rtol=2e-6, atol=0)
    index = torch.randint(0, n, (50,), generator=generator)
    loss = torch.randn(50, generator=generator)
    pi_step_(state, rule, index.to(device), loss.to(device))
    normalised = None if prior is None else prior / prior.sum()
    for half in (False, True):
        want = softmax_step(want, index, loss, prior=normalised, **settings(lr=0.5))
        got = pi_of(state, rule, half=half)
        torch.testing.assert_close(got, want, rtol=4e-6, atol=0)
        assert got.sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("level", ["avx2", "baseline"])
def test_every_instruction_set(make, level, with_prior, cpu_level, generator):
    cpu_level(level)
    test_every_size_of_the_pass(make, 20_011, with_prior, torch.device("cpu"), generator)


def test_a_hundred_thousand_steps(make, device, generator):
    n, steps = 50, 100_000 if device.type == "cpu" else 2_000
    state, rule = make(n, device, capacity=4, lr=0.02)
    index = torch.randint(0, n, (97, 4), generator=generator)
    loss = torch.rand(97, 4, generator=generator).round(decimals=3)
    gradient = torch.zeros(97, n).double().scatter_add_(1, index, loss.double()) * 0.02
    index, loss = index.to(device), loss.to(device)
    batches = [operands(*batch) for batch in zip(index, loss, strict=True)]
    run = torch.ops.als_ext.pi_step_.default  # the operator alone: 100,000 Python checks are slow
    for step in range(steps):
        run(*state, *batches[step % 97], None, *rule)
    # The same sum in closed form: r = sum over s of rho^(steps - s) step g_s.
    powers = torch.tensor(rule.rho, dtype=torch.float64) ** torch.arange(steps, 0, -1).double()
    r = torch.zeros(n).double()
    for k in range(97):
        r += powers[k::97].sum() * gradient[k]
    got = pi_of(state, rule)
    torch.testing.assert_close(got, r.softmax(0), rtol=5e-6, atol=0)
    assert got.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert (got >= 0).all()


def test_a_slow_decay_is_not_lost(make, device):
    """1 - rho = 1e-8 is below half an ulp of float32: a stored r would never shrink."""
    state, rule = make(2, device, lr=1e-4, decay=1e-4, capacity=1)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    pi_step_(state, rule, one, torch.full((1,), 2e4, device=device))
    before = pi_weight(state, rule, log=True).double().diff().item()
    none = one[:0]
    steps = 20_000
    for _ in range(steps):
        torch.ops.als_ext.pi_step_.default(*state, *operands(none, none), None, *rule)
    after = pi_weight(state, rule, log=True).double().diff().item()
    assert after / before - 1 == pytest.approx(math.expm1(-steps * 1e-8), rel=0.01)


def test_the_scale_is_folded_into_u_before_it_underflows(make, device, generator):
    state, rule = make(300, device, temperature=4.0, lr=1.0)
    want, folds, smallest = start(300, None), 0, 1.0
    for _ in range(100 if state.sums is None else 2000):  # float64 entries are rewritten later
        index = torch.randint(0, 300, (16,), generator=generator)
        loss = torch.randn(16, generator=generator)
        pi_step_(state, rule, index.to(device), loss.to(device))
        want = softmax_step(want, index, loss, **settings(temperature=4.0, lr=1.0))
        folds += state.scalars[0].item() == 1.0
        smallest = min(smallest, state.scalars[0].item())
    assert folds >= 4
    assert smallest > (1e-13 if state.sums is None else 1e-271)
    torch.testing.assert_close(pi_of(state, rule), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("constant", [40.0, -1000.0])
def test_a_constant_on_all_losses_changes_nothing(make, constant, device, generator):
    n = 200
    (plain, rule), (shifted, _) = (make(n, device, lr=0.1, capacity=n) for _ in range(2))
    for _ in range(50):
        index = torch.randperm(n, generator=generator).to(device)
        loss = torch.rand(n, generator=generator).to(device)
        pi_step_(plain, rule, index, loss)
        pi_step_(shifted, rule, index, loss.double() + constant)
    limit = 10 if plain.sums is None else 1e4  # centred again and again, float64 entries later
    assert plain.scalars[1].abs().item() < limit
    assert shifted.scalars[1].abs().item() < limit + abs(constant) * 0.1
    torch.testing.assert_close(pi_of(shifted, rule), pi_of(plain, rule), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loss_dtypes(make, dtype, device):
    state, rule = make(9, device, lr=1.0)
    index = torch.tensor([3, 3, 8], device=device)
    loss = torch.tensor([0.5, 0.25, 1.0], device=device)
    other = copy(state)
    pi_step_(state, rule, index, loss.to(dtype))
    pi_step_(other, rule, index, loss)
    assert same(state, other)


def test_a_loss_with_a_graph_is_a_constant(make, device):
    state, rule = make(9, device)
    loss = torch.ones(2, device=device, requires_grad=True) * 2
    pi_step_(state, rule, torch.tensor([1, 2], device=device), loss)
    assert not pi_weight(state, rule).requires_grad


# ---- batches ----------------------------------------------------------------------------------


def test_equal_indices_add_up(make, device, generator):
    n = 40
    index = torch.randint(0, 5, (300,), generator=generator).mul(7)
    loss = torch.randint(-64, 64, (300,), generator=generator) / 64  # sums are exact
    total = torch.zeros(n).index_add_(0, index, loss)
    (many, rule), (once, _) = (make(n, device, capacity=300, lr=0.1) for _ in range(2))
    pi_step_(many, rule, index.to(device), loss.to(device))
    every = torch.arange(n, device=device)
    pi_step_(once, rule, every, total.to(device))
    assert torch.equal(many.u, once.u)
    torch.testing.assert_close(many.scalars, once.scalars, rtol=1e-12, atol=1e-14)
    half = [pi_weight(s, rule, every, half=True) for s in (many, once)]
    torch.testing.assert_close(*half, rtol=1e-6, atol=0)


def test_an_empty_batch_is_a_step_without_losses(make, device):
    state, rule = make(5, device, lr=1.0, decay=1.0, capacity=3)
    pi_step_(state, rule, torch.tensor([4], device=device), torch.tensor([4.0], device=device))
    pi_step_(
        state,
        rule,
        torch.empty(0, dtype=torch.int64, device=device),
        torch.empty(0, device=device),
    )
    want = torch.tensor([0.0, 0, 0, 0, 1.0]).double().softmax(0)
    torch.testing.assert_close(pi_of(state, rule), want, rtol=1e-6, atol=0)
    want = torch.tensor([0.0, 0, 0, 0, 0.5]).double().softmax(0)  # and nothing is pending
    torch.testing.assert_close(pi_of(state, rule, half=True), want, rtol=1e-6, atol=0)
    assert (state.pending_index == NO_INDEX).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_losses_that_are_not_finite_are_left_out_and_counted(make, bad, device):
    (state, rule), (clean, _) = (make(6, device, lr=1.0) for _ in range(2))
    index = torch.tensor([0, 5, 0, 2], device=device)
    loss = torch.tensor([1.0, bad, bad, 2.0], dtype=torch.float64, device=device)
    pi_step_(state, rule, index, loss)
    zero = torch.tensor([1.0, 0.0, 0.0, 2.0], device=device)
    pi_step_(clean, rule, index, zero)
    assert state.skipped.item() == 2
    assert clean.skipped.item() == 0
    assert same(state._replace(skipped=clean.skipped), clean)


@pytest.mark.parametrize("direction", ["max", "min"])
def test_huge_finite_losses_never_poison(make, direction, device, generator):
    state, rule = make(300, device, lr=1e3, direction=direction, decay=1e-7)
    for step in range(30):
        index = torch.randint(0, 300, (32,), generator=generator)
        loss = torch.randn(32, generator=generator) * (3e37 if step % 3 else 1.0)
        pi_step_(state, rule, index.to(device), loss.to(device))
        for half in (False, True):
            pi = pi_of(state, rule, half=half)
            assert (pi >= 0).all()
            assert pi.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert state.u.isfinite().all()


@pytest.mark.parametrize("operator", [False, True], ids=["public", "operator"])
def test_indices_outside_are_named_or_left_out(make, operator, device):
    state, rule = make(6, device, lr=1.0)
    index = torch.tensor([2, -1, 6, -1, 2, 2**40], device=device)
    loss = torch.ones(6, device=device)
    if device.type == "cpu":
        before = copy(state)
        if operator:
            error, step = RuntimeError, torch.ops.als_ext.pi_step_.default
            step = functools.partial(step, *state, *operands(index, loss), None, *rule)
            read = torch.ops.als_ext.pi_weight.default
            read = functools.partial(read, *readable(state), index[2:3], *rule, True, False)
        else:
            error, step = ValueError, functools.partial(pi_step_, state, rule, index, loss)
            read = functools.partial(pi_weight, state, rule, index[2:3])
        with pytest.raises(error, match=r"index: expected values in \[0, 6\), got -1 at pos.* 1"):
            step()
        with pytest.raises(error, match=r"index: expected values in \[0, 6\), got 6 at position 0"):
            read()
        assert same(state, before)
        return
    torch.ops.als_ext.pi_step_.default(*state, *operands(index, loss), None, *rule)
    other, _ = make(6, device, lr=1.0)
    pi_step_(other, rule, torch.tensor([2, 2], device=device), loss[:2])
    assert torch.equal(state.u, other.u)
    assert torch.equal(state.scalars, other.scalars)
    got = torch.ops.als_ext.pi_weight.default(*readable(state), index, *rule, True, False)
    assert got.isnan().tolist() == [False, True, True, True, False, True]
    assert got[0] == pi_weight(other, rule, index[:1], half=True)[0]


def test_found_inf_skips_the_whole_step(make, device):
    state, rule = make(50, device, lr=1.0)
    index = torch.tensor([3, 4, 3], device=device)
    loss = torch.tensor([1.0, math.nan, 2.0], device=device)
    pi_step_(state, rule, index, loss)
    before = copy(state)
    for shape in ((), (1,)):
        pi_step_(state, rule, index[:2], loss[:2], torch.ones(shape, device=device))
        assert same(state, before)
    pi_step_(state, rule, index[:2], loss[:2], torch.zeros((), device=device))
    assert not torch.equal(state.u, before.u)
    assert state.skipped.item() == 2


# ---- the same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("with_prior", [False, True])
def test_bits_do_not_depend_on_threads(make, with_prior, generator):
    n = 100_003
    prior = torch.rand(n, generator=generator) + 0.1 if with_prior else None
    index = torch.randint(0, n, (500,), generator=generator)
    loss = torch.rand(500, generator=generator)
    start, rule = make(n, "cpu", capacity=500, prior=prior, lr=3.0, temperature=1e3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            state = copy(start)
            pi_normalize_(state, rule)
            for _ in range(6):  # u is rewritten now and then
                pi_step_(state, rule, index, loss)
            results.append([*state, pi_weight(state, rule), pi_weight(state, rule, half=True)])
    finally:
        torch.set_num_threads(threads)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_order_of_the_batch_does_not_matter(make, device, generator):
    n = 30
    index = torch.randint(0, n, (200,), generator=generator)
    loss = torch.rand(200, generator=generator)
    order = torch.randperm(200, generator=generator)
    (a, rule), (b, _) = (make(n, device, capacity=200, lr=1.0) for _ in range(2))
    pi_step_(a, rule, index.to(device), loss.to(device))
    pi_step_(b, rule, index[order].to(device), loss[order].to(device))
    torch.testing.assert_close(a.pending_grad, b.pending_grad, rtol=1e-14, atol=0)
    torch.testing.assert_close(a.u, b.u, rtol=2e-7, atol=0)


# ---- PyTorch ----------------------------------------------------------------------------------


def samples(make, device):
    for prior in (None, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])):
        for size in (3, 0):
            state, rule = make(5, device, capacity=4, prior=prior)
            index = torch.tensor([4, 0, 4], device=device)[:size]
            loss = torch.tensor([0.5, 1.5, 2.5], device=device)[:size]
            for found_inf in (None, torch.zeros((), device=device)):
                yield state, rule, (*operands(index, loss), found_inf), index


def test_opcheck(make, device):
    for state, rule, batch, index in samples(make, device):
        opcheck(torch.ops.als_ext.pi_step_.default, (*copy(state), *batch, *rule))
        opcheck(torch.ops.als_ext.pi_normalize_.default, (*readable(copy(state)), *rule))
        for where in (
            index,
            index.repeat(2)[::2],
            index[:1].expand(3 if index.shape[0] else 0),
            None,
        ):
            arguments = (*readable(state), where, *rule, True, False)
            opcheck(torch.ops.als_ext.pi_weight.default, arguments)


def test_compiles_with_fullgraph(make, device):
    def step(state, index, loss):
        pi_step_(state, rule, index, loss)
        return pi_weight(state, rule, index), pi_weight(state, rule, half=True)

    state, rule = make(20, device, lr=1.0)
    other = copy(state)
    index = torch.tensor([1, 7, 1], device=device)
    loss = torch.tensor([1.0, 2.0, 3.0], device=device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(state, index, loss), step(other, index, loss), strict=True):
        assert torch.equal(x, y)
    assert same(state, other)


def test_writes_are_seen_by_autograd(make, device):
    state, rule = make(4, device)
    index = torch.tensor([1], device=device)
    before = [t._version for t in state[:5]]
    pi_step_(state, rule, index, torch.ones(1, device=device))
    assert all(t._version > v for t, v in zip(state[:5], before, strict=True))
    scale = torch.ones((), device=device, requires_grad=True)
    product = (state.u * scale).sum()
    pi_step_(state, rule, index, torch.ones(1, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.cuda
def test_captured_in_a_cuda_graph(make, generator):
    state, rule = make(10_000, "cuda", lr=0.1)
    index = torch.randint(0, 10_000, (64,), generator=generator).cuda()
    loss = torch.rand(64, generator=generator).cuda()
    pi_step_(state, rule, index, loss)
    other = copy(state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pi_step_(state, rule, index, loss)
    for _ in range(3):
        graph.replay()
        pi_step_(other, rule, index, loss)
    assert same(state, other)


@pytest.mark.cuda
def test_both_devices_agree(make, generator):
    prior = torch.rand(50_000, generator=generator) + 0.1
    (cpu, rule), (cuda, _) = (make(50_000, d, prior=prior, lr=0.3) for d in ("cpu", "cuda"))
    for _ in range(20):
        index = torch.randint(0, 50_000, (64,), generator=generator)
        loss = torch.rand(64, generator=generator)
        pi_step_(cpu, rule, index, loss)
        pi_step_(cuda, rule, index.cuda(), loss.cuda())
    for half in (False, True):
        torch.testing.assert_close(
            pi_weight(cpu, rule, half=half),
            pi_weight(cuda, rule, half=half).cpu(),
            rtol=1e-6,
            atol=0,
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index": torch.zeros(2, dtype=torch.int32)}, TypeError, "index: expected dtype int64"),
        ({"index": [0, 1]}, TypeError, "index: expected a torch.Tensor, got list"),
        (
            {"index": torch.zeros(1, 2, dtype=torch.int64)},
            ValueError,
            r"index: expected shape \[B\]",
        ),
        ({"loss": torch.zeros(3)}, ValueError, r"loss: expected shape \[2\], got \[3\]"),
        ({"loss": torch.zeros(2, dtype=torch.int64)}, TypeError, "loss: expected dtype float32"),
        ({"found_inf": torch.zeros(2)}, ValueError, r"found_inf: expected shape \[1\], got \[2\]"),
        ({"found_inf": 0.0}, TypeError, "found_inf: expected a torch.Tensor, got float"),
        (
            {"index": torch.tensor([0, 4])},
            ValueError,
            r"index: expected values in \[0, 4\), got 4 at position 1",
        ),
        (
            {"u": lambda dtype: torch.zeros(4).half()},
            TypeError,
            "state.u: expected dtype f.*, got float16",
        ),
        (
            {"u": lambda dtype: torch.zeros(8, dtype=dtype)[::2]},
            ValueError,
            "state.u: expected a contiguous tensor",
        ),
        (
            {"u": lambda dtype: torch.zeros(0, dtype=dtype)},
            ValueError,
            "state.u: expected at least one entry",
        ),
        (
            {"u": lambda dtype: torch.zeros(4, dtype=dtype, requires_grad=True)},
            ValueError,
            "state.u: expected a tensor that does not require grad",
        ),
        ({"scalars": torch.zeros(3).double()}, ValueError, r"state.scalars: expected shape \[4\]"),
        ({"log_prior": torch.zeros(5)}, ValueError, r"state.log_prior: expected shape \[4\]"),
        (
            {
                "pending_index": torch.zeros(1, dtype=torch.int64),
                "pending_grad": torch.zeros(1).double(),
            },
            ValueError,
            "state.pending_index: expected at least 2 entries.* got 1",
        ),
    ],
)
def test_bad_input_is_named(make, change, error, message):
    state, rule = make(4, "cpu", capacity=2)
    change = {k: v(state.u.dtype) if callable(v) else v for k, v in change.items()}
    state = state._replace(**{k: v for k, v in change.items() if k in PiState._fields})
    arguments = {"index": torch.tensor([0, 1]), "loss": torch.ones(2), "found_inf": None}
    arguments |= {k: v for k, v in change.items() if k in arguments}
    with pytest.raises(error, match=message):
        pi_step_(state, rule, **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected a finite number"),
        ({"lr": "1"}, TypeError, "lr: expected a number, got str"),
        ({"decay": math.nan}, ValueError, "decay: expected a finite number"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number"),
        ({"temperature": 0.9}, ValueError, r"temperature: expected more than 1 / \(1 \+ decay"),
        ({"temperature": 0.9, "decay": 0.0}, ValueError, "temperature: expected more than"),
        ({"direction": "up"}, ValueError, "direction: expected one of 'max', 'min', got 'up'"),
    ],
)
def test_bad_settings_are_named(change, error, message):
    with pytest.raises(error, match=message):
        pi_rule(**settings(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"index": torch.zeros(2)},
        {"order": torch.tensor([0, 1])},
        {"sums": torch.zeros(3).double()},
        {"u": torch.zeros(4).bfloat16()},
        {"loss": torch.zeros(3).double()},
        {"scalars": torch.zeros(2).double()},
        {"pending_index": torch.zeros(1, dtype=torch.int64)},
        {"log_prior": torch.zeros(3)},
    ],
)
def test_the_operator_protects_memory(make, change):
    state, rule = make(4, "cpu", capacity=2)
    state = state._replace(**{k: v for k, v in change.items() if k in PiState._fields})
    batch = {"index": torch.tensor([0, 1]), "order": None}
    batch |= {"loss": torch.ones(2).double(), "found_inf": None}
    batch |= {k: v for k, v in change.items() if k in batch}
    with pytest.raises(RuntimeError, match=f"{next(iter(change))}|pending_grad|u:"):
        torch.ops.als_ext.pi_step_.default(*state, *batch.values(), *rule)
