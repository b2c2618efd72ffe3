import pytest
import torch
from torch.library import opcheck

from als_ext.ops.also_step import also_step_
from als_ext.reference.also_step import AlsoState, also_step

OP = torch.ops.als_ext.also_step_.default
# Tensors of one call: empty, scalar, one element, ragged ends, several chunks on either device.
SHAPES = [(0, 3), (), (1,), (17,), (3, 5, 7), (8192,), (20_001,)]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "alpha": 0.7}
# Rounding of float32 state over five iterations; a reduced-precision parameter rounds once a step.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-6},
    torch.float16: {"rtol": 1e-3, "atol": 1e-6},
}


class Lists:
    """Parameters and state of one call, and how to make it."""

    def __init__(self, shapes, device, dtype=torch.float32, *, half=True, amsgrad=False, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        state = torch.float64 if dtype == torch.float64 else torch.float32
        self.params = [self.draw(shape, dtype) for shape in shapes]
        self.exp_avgs = [torch.zeros_like(p, dtype=state) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p, dtype=state) for p in self.params]
        self.max_exp_avg_sqs = [m.clone() for m in self.exp_avgs] if amsgrad else []
        self.bases = [p.to(state, copy=True) for p in self.params] if half else []
        self.steps = [torch.zeros((), dtype=torch.int64, device=device) for _ in shapes]

    def draw(self, shape, dtype):
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def draw_grads(self):
        return [self.draw(p.shape, p.dtype) for p in self.params]

    def state(self):
        moments = [*self.exp_avgs, *self.exp_avg_sqs, *self.max_exp_avg_sqs]
        return [*self.params, *moments, *self.bases, *self.steps]

    def step(self, grads, **settings):
        also_step_(
            self.params,
            grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.max_exp_avg_sqs,
            self.bases,
            self.steps,
            **{**SETTINGS, **settings},
        )


@pytest.mark.parametrize("half", [True, False], ids=["optimistic", "plain"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True], ids=["l2", "decoupled"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_agrees_with_float64_reference(dtype, decoupled, amsgrad, half, device):
    lists = Lists(SHAPES, device, dtype, half=half, amsgrad=amsgrad)
    states = [AlsoState.start(p) for p in lists.params]
    for _ in range(5):
        grads = lists.draw_grads()
        for p, g in zip(lists.params, grads, strict=True):
            # Where decay cancels a gradient, Adam makes a step of what rounding leaves of both.
            g[(g.double() + SETTINGS["weight_decay"] * p.double()).abs() < 1e-4] += 1
        wanted = [
            also_step(
                p,
                g,
                state,
                **SETTINGS,
                decoupled_weight_decay=decoupled,
                amsgrad=amsgrad,
                half_step=half,
            )
            for p, g, state in zip(lists.params, grads, states, strict=True)
        ]
        lists.step(grads, decoupled_weight_decay=decoupled)
        for i, (got, want) in enumerate(zip(lists.params, wanted, strict=True)):
            torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])
            close = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
            for name in ("exp_avg", "exp_avg_sq"):
                state = getattr(lists, name + "s")[i]
                torch.testing.assert_close(state.double(), getattr(states[i], name), **close)
            if half:
                torch.testing.assert_close(lists.bases[i].double(), states[i].base, **close)
            elif dtype in {torch.bfloat16, torch.float16}:
                states[i].base = got.double()  # the parameter itself is rounded and stepped from
    assert [s.item() for s in lists.steps] == [10 if half else 5] * len(SHAPES)
    assert {s.item() for s in lists.steps} == {states[0].step}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", ["avx2", "baseline"])
def test_every_instruction_set_agrees(level, dtype, cpu_level):
    cpu_level(level)
    test_agrees_with_float64_reference(dtype, False, True, True, torch.device("cpu"))


@pytest.mark.parametrize("decoupled", [False, True], ids=["l2", "decoupled"])
def test_without_bases_it_is_torch_adam(decoupled, device):
    lists = Lists(SHAPES[1:], device, half=False)
    params = [torch.nn.Parameter(p.clone()) for p in lists.params]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(20):
        grads = lists.draw_grads()
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        lists.step(grads, decoupled_weight_decay=decoupled)
    for got, want in zip(lists.params, params, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-6)


def test_one_call_equals_two_calls_of_plain_steps(device):
    """Fused = unfused: the half step is a plain step from the base, on moments that stay."""
    lists = Lists(SHAPES, device)
    plain = Lists(SHAPES, device, half=False)  # same seed: the same parameters
    for _ in range(4):
        grads = lists.draw_grads()
        lists.step(grads, weight_decay=0.0)
        plain.step(grads, weight_decay=0.0)
        bases = [p.clone() for p in plain.params]
        plain.step([SETTINGS["alpha"] * g for g in grads], weight_decay=0.0)
        for got, want in zip(lists.params + lists.bases, plain.params + bases, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        plain.params = bases


def test_grad_scale_divides_the_gradient_before_weight_decay(device):
    scaled, plain = Lists(SHAPES, device), Lists(SHAPES, device)
    grads = plain.draw_grads()
    plain.step(grads)
    kept = [1024 * g for g in grads]
    scaled.step(kept, grad_scale=torch.tensor(1024.0, device=device))
    for got, want in zip(scaled.state(), plain.state(), strict=True):
        assert torch.equal(got, want)  # a power of two scales without rounding
    assert torch.equal(kept[3], 1024 * grads[3])  # gradients are only read


@pytest.mark.parametrize("half", [True, False])
def test_found_inf_leaves_everything_as_it_is(half, device):
    lists = Lists(SHAPES, device, half=half, amsgrad=True)
    lists.step(lists.draw_grads())
    before = [t.clone() for t in lists.state()]
    infinite = [torch.full_like(p, float("inf")) for p in lists.params]
    lists.step(infinite, found_inf=torch.ones(1, device=device))
    for got, want in zip(lists.state(), before, strict=True):
        assert torch.equal(got, want)
    lists.step(lists.draw_grads(), found_inf=torch.zeros((), device=device))
    assert not torch.equal(lists.params[3], before[3])


def test_lr_may_be_a_tensor(device):
    number = Lists(SHAPES, device)
    grads = number.draw_grads()
    number.step(grads, lr=0.25)
    for dtype in (torch.float32, torch.float64):
        tensor = Lists(SHAPES, device)
        tensor.step(grads, lr=torch.tensor(0.25, dtype=dtype))
        for got, want in zip(tensor.state(), number.state(), strict=True):
            assert torch.equal(got, want)


def test_the_number_of_threads_does_not_change_a_bit():
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        lists = Lists([(100_003,), (7,), (65_536,)], torch.device("cpu"))
        for _ in range(2):
            lists.step(lists.draw_grads())
        results.append(lists.state())
    torch.set_num_threads(threads)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


def test_more_tensors_than_one_launch_holds(device):
    lists, single = Lists([(3,)] * 200, device), Lists([(600,)], device)
    single.params[0].copy_(torch.cat(lists.params))
    single.bases[0].copy_(torch.cat(lists.bases))
    grads = lists.draw_grads()
    lists.step(grads)
    single.step([torch.cat(grads)])
    assert torch.equal(torch.cat(lists.params), single.params[0])
    assert all(s.item() == 2 for s in lists.steps)


def test_no_parameters_at_all(device):
    Lists([], device).step([])


def test_misaligned_and_channels_last_memory(device):
    """Storage offsets that no vector load fits, and dense strides that are not row-major."""
    plain = Lists([(33,), (4, 6, 3, 3)], device)
    other = Lists([(33,), (4, 6, 3, 3)], device)
    offset = torch.empty(34, device=device)[1:]
    other.params[0] = offset.copy_(other.params[0])
    grads = plain.draw_grads()
    plain.step(grads)
    other_grads = [grads[0], grads[1].contiguous(memory_format=torch.channels_last)]
    for name in ("params", "exp_avgs", "exp_avg_sqs", "bases"):
        tensors = getattr(other, name)
        tensors[1] = tensors[1].contiguous(memory_format=torch.channels_last)
    other.step(other_grads)
    for got, want in zip(other.state(), plain.state(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert other.params[1].is_contiguous(memory_format=torch.channels_last)


def test_late_bias_correction_and_zero_betas(device):
    lists = Lists([(50,)], device, torch.float64)
    lists.steps[0].fill_(2**40)  # a float32 counter stops at 2^24
    lists.step(lists.draw_grads())
    assert lists.steps[0].item() == 2**40 + 2
    assert lists.params[0].isfinite().all()
    lists = Lists([(50,)], device, torch.float64)
    state, grads = AlsoState.start(lists.params[0]), lists.draw_grads()
    settings = {**SETTINGS, "betas": (0.0, 0.0)}
    want = also_step(lists.params[0], grads[0], state, **settings)
    lists.step(grads, betas=(0.0, 0.0))
    torch.testing.assert_close(lists.params[0], want, rtol=1e-12, atol=1e-14)


def test_a_graph_from_before_the_step_cannot_be_walked_after_it(device):
    lists = Lists([(5,)], device)
    weight = lists.params[0].requires_grad_()
    loss = (weight * weight).sum()
    grads = [torch.ones(5, device=device)]
    with pytest.raises(RuntimeError, match=r"needs torch\.no_grad"):
        lists.step(grads)
    with torch.no_grad():
        lists.step(grads)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def arguments(lists, lr_tensor=None, grad_scale=None, found_inf=None):
    state = (lists.exp_avgs, lists.exp_avg_sqs, lists.max_exp_avg_sqs, lists.bases, lists.steps)
    settings = (lr_tensor, 1e-2, 0.9, 0.99, 1e-8, 0.1, False, 0.7, grad_scale, found_inf)
    return (lists.params, lists.draw_grads(), *state, *settings)


def samples(device):
    shapes = [(17,), (3, 5), ()]
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    yield arguments(Lists(shapes, device))
    yield arguments(Lists(shapes, device, half=False, amsgrad=True), lr_tensor=lr)
    scale = torch.tensor(8.0, device=device)
    yield arguments(Lists(shapes, device, torch.bfloat16, amsgrad=True), None, scale, scale - 8)
    turned = Lists([(3, 5)], device)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "bases"):
        setattr(turned, name, [t.t().contiguous().t() for t in getattr(turned, name)])
    turned.draw_grads = lambda: [torch.ones_like(turned.params[0])]
    yield arguments(turned)
    yield arguments(Lists([(0, 2)], device))


def test_opcheck(device):
    for args in samples(device):
        opcheck(OP, args)


def test_compiles_with_fullgraph(device):
    eager, compiled = Lists(SHAPES, device), Lists(SHAPES, device)
    OP(*arguments(eager))
    torch.compile(OP, fullgraph=True, backend="aot_eager")(*arguments(compiled))
    for got, want in zip(compiled.state(), eager.state(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.cuda
def test_cuda_graph_replays_read_the_lr_tensor():
    device = torch.device("cuda")
    eager, captured = Lists(SHAPES, device), Lists(SHAPES, device)
    grads = eager.draw_grads()
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    start = [t.clone() for t in captured.state()]
    captured.step(grads, lr=lr)
    for t, value in zip(captured.state(), start, strict=True):
        t.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(grads, lr=lr)
    for rate in (0.1, 0.01):
        lr.fill_(rate)
        graph.replay()
        eager.step(grads, lr=rate)
    for got, want in zip(captured.state(), eager.state(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: [torch.ones(3, dtype=torch.int64)]}, "expected float32, float64"),
        ({1: []}, "grads: expected 1 tensors, got 0"),
        ({1: [torch.ones(4)]}, r"grads\[0\]: expected the sizes and strides"),
        ({1: [torch.ones(3, dtype=torch.float64)]}, "grads: expected dtype Float"),
        ({2: [torch.ones(3, dtype=torch.float64)]}, "exp_avgs: expected dtype Float"),
        ({5: [torch.ones(6)[::2]]}, r"bases\[0\]: expected the sizes and strides"),
        ({6: [torch.zeros(2, dtype=torch.int64)]}, "steps: expected one element"),
        ({6: [torch.zeros(())]}, "steps: expected dtype Long"),
        ({7: torch.zeros(2, dtype=torch.float64)}, "lr_tensor: expected one element"),
        ({16: torch.zeros((), dtype=torch.float64)}, "found_inf: expected dtype Float"),
    ],
)
def test_bad_input_never_reaches_memory(change, message):
    args = list(arguments(Lists([(3,)], torch.device("cpu"))))
    for position, value in change.items():
        args[position] = value
    if 0 in change:  # lists that fit an integer parameter
        args[1:6] = [[torch.ones(3, dtype=torch.int64)]] + [[torch.ones(3)]] * 2 + [[], []]
    with pytest.raises(RuntimeError, match=message):
        OP(*args)
    assert args[6][0].sum().item() == 0


def test_bad_input_overlapping_parameter():
    lists = Lists([(3,)], torch.device("cpu"))
    args = list(arguments(lists))
    args[0] = [torch.ones(6)[::2]]
    with pytest.raises(RuntimeError, match="params: expected dense tensors"):
        OP(*args)
