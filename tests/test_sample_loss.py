import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from als_ext.ops import sample_loss
from als_ext.reference.sample_loss import sample_loss as plain

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LOSSES = {
    "cross_entropy": {},
    "smoothing": {"label_smoothing": 0.1},
    "gce": {"loss": "gce", "q": 0.7},
    "sce": {"loss": "sce", "alpha": 0.5, "beta": 1.5, "A": -6.0},
    "mae": {"loss": "mae"},
    "focal": {"loss": "focal", "gamma": 2.0},
    "focal_half": {"loss": "focal", "gamma": 0.5},
    "bootstrap_hard": {"loss": "bootstrap", "kind": "hard", "beta": 0.8},
    "bootstrap_soft": {"loss": "bootstrap", "kind": "soft", "beta": 0.7},
}
losses = pytest.mark.parametrize("keywords", LOSSES.values(), ids=LOSSES)
# Gradients are rounded once to the dtype of the logits: half a unit in the last place, and a little
# for the float32 (or for float16 also the subnormal) arithmetic before.
GRADIENT = {
    F32: {"rtol": 2e-6, "atol": 1e-6},
    BF16: {"rtol": 2**-8, "atol": 1e-6},
    F16: {"rtol": 2**-11 * 1.01, "atol": 1e-6},
    F64: {"rtol": 1e-12, "atol": 1e-13},
}
LOSS = {dtype: {"rtol": 2e-6, "atol": 1e-6} for dtype in (F32, BF16, F16)}
LOSS[F64] = {"rtol": 1e-12, "atol": 1e-13}


def make(rows, classes, device, dtype=F32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=g) * 3).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=g)
    return logits.to(device), target.to(device), torch.randn(rows, generator=g).to(device)


def gradient(function, logits, grad_losses):
    """Losses and d(losses . grad_losses)/dlogits."""
    z = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    values = function(z)
    (grad,) = torch.autograd.grad(values, z, grad_losses.to(values.dtype))
    return values.detach(), grad


def check(logits, target, grad_losses, **keywords):
    """Ours against the float64 reference: losses, and gradients with one factor a row."""
    got, got_grad = gradient(lambda z: sample_loss(z, target, **keywords), logits, grad_losses)
    want, want_grad = gradient(lambda z: plain(z, target, **keywords), logits.double(), grad_losses)
    dtype = logits.dtype
    assert got.dtype == (F64 if dtype == F64 else F32)
    assert got_grad.dtype == dtype
    torch.testing.assert_close(got.double(), want, equal_nan=True, **LOSS[dtype])
    torch.testing.assert_close(got_grad.double(), want_grad, equal_nan=True, **GRADIENT[dtype])


@losses
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(1, 1), (3, 2), (67, 10), (130, 33), (9, 1000), (5, 1027), (3, 6145), (2, 70_001)],
)
def test_agrees_with_float64_reference(rows, classes, keywords, device):
    check(*make(rows, classes, device), **keywords)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("classes", [16_385, 50_257, 128_256, 600_001])
def test_long_rows_on_cuda(classes, dtype):
    """Blocks that share a row add up what class weights and probabilities bring as well."""
    logits, target, grad = make(4, classes, "cuda", dtype)
    real = F64 if dtype == F64 else F32
    class_weight = torch.rand(classes, device="cuda", dtype=real)
    dense = torch.rand(4, classes, device="cuda", dtype=real)
    dense /= dense.sum(dim=1, keepdim=True)
    for keywords in LOSSES.values():
        check(logits, target, grad, class_weight=class_weight, **keywords)
    check(logits, dense, grad, class_weight=class_weight, label_smoothing=0.2)


@losses
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_blocks_of_every_shape_and_instruction_set(dtype, level, keywords, cpu_level):
    """Below 16 classes 64 rows are transposed; above, rows are padded to whole vectors."""
    cpu_level(level)
    for classes in (2, 15, 16, 17, 33):
        for rows in (1, 64, 65, 130):
            check(*make(rows, classes, "cpu", dtype), **keywords)


@losses
@pytest.mark.parametrize("dtype", [F64, BF16, F16])
@pytest.mark.parametrize(("rows", "classes"), [(67, 10), (3, 1000), (2, 5000)])
def test_dtypes(rows, classes, dtype, keywords, device):
    check(*make(rows, classes, device, dtype), **keywords)


@losses
def test_class_weight(keywords, device):
    logits, target, grad = make(40, 10, device)
    weight = torch.rand(10, generator=torch.Generator().manual_seed(1)).to(device)
    weight[3] = 0
    check(logits, target, grad, class_weight=weight, **keywords)


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy_is_that_of_torch(probabilities, weighted, smoothing, device):
    logits, target, grad = make(50, 12, device)
    weight = torch.rand(12).to(device) if weighted else None
    if probabilities:
        target = make(50, 12, device, seed=1)[0].softmax(dim=1)
    keywords = {"label_smoothing": smoothing}
    got = gradient(lambda z: sample_loss(z, target, class_weight=weight, **keywords), logits, grad)
    want = gradient(
        lambda z: F.cross_entropy(z, target, weight=weight, reduction="none", **keywords),
        logits,
        grad,
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_class_probabilities(dtype, device):
    logits, _, grad = make(33, 1030, device, dtype)
    target = make(33, 1030, device, seed=1)[0].softmax(dim=1)
    for keywords in ({}, {"label_smoothing": 0.3, "class_weight": torch.rand(1030).to(device)}):
        check(logits, target, grad, **keywords)
    one_hot = F.one_hot(target.argmax(dim=1), 1030).float()
    torch.testing.assert_close(
        sample_loss(logits, one_hot), sample_loss(logits, target.argmax(dim=1)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("shape", [(5,), (5, 1), (7, 33), (2, 5000)])
def test_squared_error(shape, dtype, device):
    g = torch.Generator().manual_seed(0)
    logits, target = (torch.randn(shape, generator=g).to(dtype).to(device) for _ in range(2))
    check(logits, target, torch.randn(shape[0], generator=g).to(device), loss="squared_error")


def test_a_large_gradient_of_odd_size():
    """16 MB and a little: fresh memory that asks for huge pages, which cover no end of it."""
    check(*make(4201, 1001, "cpu"))


def test_squared_error_is_the_mean_over_the_values(device):
    z, t = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)
    torch.testing.assert_close(sample_loss(z, t, loss="squared_error").mean(), F.mse_loss(z, t))


@pytest.mark.parametrize("p", [0.99, 0.999])
def test_bfloat16_gradient_of_a_confident_target(p, device):
    """p - 1 must not be formed in bfloat16, where 0.999 is 1."""
    logits = torch.zeros(1, 3, dtype=BF16, device=device)
    logits[0, 1] = round(math.log(2 * p / (1 - p)), 1)
    _, grad = gradient(
        lambda z: sample_loss(z, torch.tensor([1], device=device)),
        logits,
        torch.ones(1, device=device),
    )
    want = (logits.double().softmax(1) - F.one_hot(torch.tensor([1], device=device), 3)).double()
    torch.testing.assert_close(grad.double(), want, rtol=2**-8, atol=0)


CONFIDENT = {  # loss and slope k of -k (1 - p) at the target, from n = -log p and m = 1 - p
    "cross_entropy": lambda n, m: (n, 1.0),
    "gce": lambda n, m: (-math.expm1(-0.7 * n) / 0.7, math.exp(-0.7 * n)),
    "sce": lambda n, m: (0.5 * n + 9 * m, 0.5 + 9 * (1 - m)),
    "mae": lambda n, m: (2 * m, 2 * (1 - m)),
    "focal": lambda n, m: (m**2 * n, m**2 * (1 + 2 * (1 - m) * n / m)),
    "focal_half": lambda n, m: (m**0.5 * n, m**0.5 * (1 + 0.5 * (1 - m) * n / m)),
    "bootstrap_hard": lambda n, m: (n, 1.0),
}


@pytest.mark.parametrize("name", CONFIDENT)
@pytest.mark.parametrize("margin", [3.0, 12.0, 20.0, 60.0])
def test_confident_samples_keep_their_relative_precision(margin, name, device):
    """float32 has no number between 1 and 1 - 6e-8: 1 - p must come from the other classes."""
    logits = torch.zeros(1, 5, device=device)
    logits[0, 2] = margin
    target, one = torch.tensor([2], device=device), torch.ones(1, device=device)
    got, grad = gradient(lambda z: sample_loss(z, target, **LOSSES[name]), logits, one)
    miss = 4 * math.exp(-margin) / (1 + 4 * math.exp(-margin))
    loss, slope = CONFIDENT[name](-math.log1p(-miss), miss)
    precision = 2e-5 if name.startswith("focal") else 1e-6  # a power of 1 - p
    if loss > 1e-37:  # below, float32 has no normal numbers
        assert got.item() == pytest.approx(loss, rel=precision)
        assert grad[0, 2].item() == pytest.approx(-slope * miss, rel=precision)


@losses
def test_infinite_and_nan_logits(keywords, device):
    logits, target, grad = make(7, 6, device)
    inf = float("inf")
    target = torch.tensor([1, 1, 1, 1, 1, 1, 1], device=device)
    logits[0, [0, 3]] = -inf  # two classes that cannot be
    logits[1, :] = -inf
    logits[1, 1] = 2.0  # one class that must be
    logits[2, :] = -inf
    logits[3, 4] = inf
    logits[4, 4] = float("nan")
    logits[5, 1] = float("nan")
    got, got_grad = gradient(lambda z: sample_loss(z, target, **keywords), logits, grad)
    assert got[2:6].isnan().all()
    assert got_grad[2:6].isnan().all()
    finite = [1, 6] if keywords.get("label_smoothing") else [0, 1, 6]
    if not keywords.get("label_smoothing"):  # smoothing puts weight on classes of probability 0
        assert got[finite].isfinite().all()
    assert got_grad[[0, 1, 6]].isfinite().all()
    assert (got_grad[0, [0, 3]] == 0).all() or keywords.get("label_smoothing")
    assert got[6:] == sample_loss(logits[6:], target[6:], **keywords)


def test_a_target_of_probability_zero(device):
    logits = torch.tensor([[0.0, -float("inf")]], device=device)
    target = torch.tensor([1], device=device)
    one = torch.ones(1, device=device)
    loss, grad = gradient(lambda z: sample_loss(z, target), logits, one)
    assert loss.item() == float("inf")
    assert grad.tolist() == [[1.0, -1.0]]
    loss, grad = gradient(lambda z: sample_loss(z, target, loss="gce", q=0.5), logits, one)
    assert loss.item() == 2.0
    assert grad.tolist() == [[0.0, 0.0]]
    zero = torch.tensor([1.0, 0.0], device=device)  # a class without weight adds nothing
    assert sample_loss(logits, target, class_weight=zero).item() == 0.0
    first = torch.tensor([[1.0, 0.0]], device=device)
    assert sample_loss(logits, first).item() == 0.0


@losses
@pytest.mark.parametrize("ignore", [-100, -1, 3, 2**40])
def test_ignore_index(ignore, keywords, device):
    logits, target, grad = make(70, 5, device)
    target[::3] = ignore
    logits[0] = float("nan")
    got, got_grad = gradient(
        lambda z: sample_loss(z, target, ignore_index=ignore, **keywords), logits, grad
    )
    ignored = target == ignore
    assert (got[ignored] == 0).all()
    assert (got_grad[ignored] == 0).all()
    rest = gradient(
        lambda z: sample_loss(z, target[~ignored], **keywords), logits[~ignored], grad[~ignored]
    )
    assert torch.equal(got[~ignored], rest[0])
    assert torch.equal(got_grad[~ignored], rest[1])


@losses
def test_all_rows_ignored(keywords, device):
    logits, target, grad = make(9, 4, device)
    target.fill_(-100)
    got, got_grad = gradient(lambda z: sample_loss(z, target, **keywords), logits, grad)
    assert (got == 0).all()
    assert (got_grad == 0).all()


@pytest.mark.parametrize("wrong", [-1, 4, 2**40, -(2**62)])
def test_a_class_out_of_range_is_named_on_the_cpu(wrong):
    logits, target, _ = make(6, 4, "cpu")
    target[3] = wrong
    message = (
        rf"target: expected values in \[0, 4\) or ignore_index=-100, got {wrong} at position 3"
    )
    with pytest.raises(ValueError, match=message):
        sample_loss(logits, target)
    with pytest.raises(RuntimeError, match=f"got {wrong} at position 3"):
        torch.vmap(sample_loss)(logits.expand(2, 6, 4), target.expand(2, 6))


@pytest.mark.cuda
@pytest.mark.parametrize("classes", [4, 5000])
def test_a_class_out_of_range_has_loss_nan_on_cuda(classes):
    logits, target, grad = make(6, classes, "cuda")
    target[3] = 2**40
    got, got_grad = gradient(lambda z: sample_loss(z, target), logits, grad)
    assert got.isnan().tolist() == [False, False, False, True, False, False]
    assert got_grad.isnan().all(dim=1).tolist() == [False, False, False, True, False, False]


def layouts(device, dtype):
    base = make(12, 41, device, dtype)[0]
    yield "expanded row", base[:1].expand(12, 41)
    yield "expanded column", base[:, :1].expand(12, 41)
    yield "transposed", make(41, 12, device, dtype)[0].t()
    yield "every other row", make(24, 41, device, dtype)[0][::2]
    yield "every other class", make(12, 82, device, dtype)[0][:, ::2]
    yield "misaligned", make(12, 42, device, dtype)[0][:, 1:]
    yield (
        "aligned rows at an odd offset",
        make(1, 12 * 48 + 1, device, dtype)[0][0, 1:].view(12, 48),
    )
    yield "one class of many", base[:, 3:4]


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@losses
def test_strides_change_nothing(keywords, dtype, device):
    for name, logits in layouts(device, dtype):
        target = torch.arange(12, device=device) % logits.shape[1]
        grad = torch.randn(24, device=device)[::2]
        got = gradient(lambda z: sample_loss(z, target, **keywords), logits, grad)  # noqa: B023
        want = gradient(
            lambda z: sample_loss(z, target, **keywords),  # noqa: B023
            logits.contiguous().clone(),
            grad.contiguous(),
        )
        assert torch.equal(got[0], want[0]), name
        assert torch.equal(got[1], want[1]), name


@losses
def test_no_rows(keywords, device):
    logits, target, grad = make(0, 5, device)
    got, got_grad = gradient(lambda z: sample_loss(z, target, **keywords), logits, grad)
    assert got.shape == (0,)
    assert got_grad.shape == (0, 5)


@losses
def test_logits_are_not_modified_and_two_losses_share_them(keywords, device):
    logits, target, grad = make(8, 10, device)
    before = logits.clone()
    z = logits.requires_grad_()
    version = z._version
    first = sample_loss(z, target, **keywords)
    second = sample_loss(z, target.flip(0), loss="mae")
    (grads,) = torch.autograd.grad((first * grad).sum() + second.sum(), z, retain_graph=True)
    (again,) = torch.autograd.grad((first * grad).sum() + second.sum(), z)
    assert torch.equal(z, before)
    assert z._version == version
    assert torch.equal(grads, again)
    alone = gradient(lambda z: sample_loss(z, target, **keywords), before, grad)[1]
    alone += gradient(lambda z: sample_loss(z, target.flip(0), loss="mae"), before, grad**0)[1]
    torch.testing.assert_close(grads, alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("rows", "classes"), [(5000, 10), (3000, 33), (200, 1000)])
@losses
def test_same_bits_with_any_number_of_threads(rows, classes, keywords):
    logits, target, grad = make(rows, classes, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            function = lambda z: sample_loss(z, target, **keywords)  # noqa: E731
            results.append(gradient(function, logits, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


def test_offsets_beyond_32_bits(tmp_path):
    """Two rows 2^31 + 7 elements apart in a sparse file: no memory but that of the two rows."""
    stride = 2**31 + 7
    storage = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=stride + 10, dtype=torch.bfloat16
    )
    logits = storage.as_strided((2, 10), (stride, 1))
    logits.copy_(make(2, 10, "cpu", BF16)[0])
    target, grad = torch.tensor([3, 7]), torch.tensor([1.0, -2.0])
    got = sample_loss(logits, target)
    assert torch.equal(got, sample_loss(logits.contiguous(), target))
    wanted = gradient(lambda z: sample_loss(z, target), logits.contiguous(), grad)[1]
    state = torch.ops.als_ext.sample_loss(logits, target, None, 0, [], 0.0, -100)[1]
    found = torch.ops.als_ext.sample_loss_backward(
        grad, logits, target, None, state, 0, [], 0.0, -100
    )
    assert torch.equal(found, wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("classes", [1024, 65544])  # rows in registers, a block a row
def test_more_than_2_to_the_31_elements_on_cuda(classes):
    rows = 2**31 // classes + 5
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free memory on the device")
    target = torch.arange(rows, device="cuda") % classes
    factor = torch.linspace(-1, 1, rows, device="cuda")
    logits = torch.empty(rows, classes, dtype=BF16, device="cuda").normal_()
    got = gradient(lambda z: sample_loss(z, target), logits, factor)
    for some in (slice(0, 5), slice(rows - 5, rows)):
        want = gradient(lambda z, y=target[some]: sample_loss(z, y), logits[some], factor[some])
        assert torch.equal(got[0][some], want[0])
        assert torch.equal(got[1][some], want[1])


@pytest.mark.cuda
@pytest.mark.parametrize("classes", [10, 5000])
def test_captured_in_a_cuda_graph(classes):
    logits, target, grad = make(8, classes, "cuda")

    def step():
        return gradient(lambda z: sample_loss(z, target), logits, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    logits.copy_(make(8, classes, "cuda", seed=1)[0])
    graph.replay()
    for a, b in zip(got, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    rows, classes = 2**21 + 5, 1024
    logits = make(1, classes, "cpu")[0].expand(rows, classes)
    target = torch.arange(rows) % classes
    got = sample_loss(logits, target)
    want = sample_loss(logits[:classes], target[:classes])
    assert torch.equal(got[-5:], want[target[-5:]])
    assert torch.equal(got[:classes], want)


def double(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(3))


@losses
def test_gradcheck_and_gradgradcheck(keywords):
    z = double(4, 5).requires_grad_()
    target = torch.tensor([0, 4, -100, 2])
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5])
    for extra in ({}, {"class_weight": weight}):
        function = lambda z: sample_loss(z, target, **keywords, **extra)  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, z, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, z)


def test_gradcheck_of_floating_targets():
    z = double(3, 4).requires_grad_()
    target = double(4, 3).t().softmax(dim=1)
    for keywords in ({"label_smoothing": 0.1}, {"loss": "squared_error"}):
        function = lambda z: sample_loss(z, target, **keywords)  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, z)
        assert torch.autograd.gradgradcheck(function, z)


def test_third_derivative():
    z = double(2, 3).requires_grad_()
    target = torch.tensor([0, 2])

    def derivative(function):
        (first,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), z, create_graph=True)
        return torch.autograd.grad(second.square().sum(), z)[0]

    got = derivative(lambda z: sample_loss(z, target, loss="focal", gamma=2.0))
    want = derivative(lambda z: plain(z, target, loss="focal", gamma=2.0))
    torch.testing.assert_close(got, want)


def samples(device, dtype=F32):
    """Arguments of the raw operator: every loss, layouts, no rows, class weights, ignored rows."""
    logits, target, _ = make(6, 5, device, dtype)
    real = F64 if dtype == F64 else F32
    weight = torch.rand(5, dtype=real, device=device)
    parameters = [[], [0.7], [0.1, 1.0, -4.0], [], [2.0], [0.8], [0.9]]
    for loss, values in enumerate(parameters):
        yield logits, target, None, loss, values, 0.0, -100
    target[2] = -100
    yield logits, target, weight, 0, [], 0.1, -100
    yield logits.t().contiguous().t(), target, weight, 4, [1.5], 0.0, -100
    yield logits[:1].expand(6, 5), target, None, 1, [0.5], 0.0, -100
    yield logits[:, 1:], target.clamp(0, 3), None, 2, [0.1, 1.0, -4.0], 0.0, -100
    yield logits[:0], target[:0], None, 0, [], 0.0, -100
    dense = torch.rand(5, 6, dtype=real, device=device).t()
    yield logits, dense, weight, 0, [], 0.1, -100
    yield logits, dense, None, 7, [], 0.0, -100


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_opcheck(dtype, device):
    op, backward = torch.ops.als_ext.sample_loss.default, torch.ops.als_ext.sample_loss_backward
    few = None if dtype == F32 else 3  # a fake kernel that is wrong about a dtype is so everywhere
    for logits, *rest in itertools.islice(samples(device, dtype), few):
        opcheck(op, (logits.requires_grad_(), *rest))
        values, state = op(logits.detach(), *rest)
        arguments = (torch.randn_like(values), logits.detach(), *rest[:2], state, *rest[2:])
        opcheck(backward.default, arguments)


@pytest.mark.parametrize(
    ("backend", "loss"), [*(("aot_eager", loss) for loss in LOSSES), ("inductor", "smoothing")]
)
def test_compiles_with_fullgraph(backend, loss, device):
    keywords = LOSSES[loss]
    logits, target, grad = make(6, 5, device)
    torch._dynamo.reset()  # or the parametrisations count as recompilations of one function
    function = lambda z: sample_loss(z * 2, target, **keywords)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for a, b in zip(
        gradient(compiled, logits, grad), gradient(function, logits, grad), strict=True
    ):
        assert torch.equal(a, b)


@losses
def test_vmap_is_one_flattened_call(keywords, device):
    logits = make(12, 5, device)[0].reshape(3, 4, 5)
    target = make(12, 5, device)[1].reshape(3, 4)
    function = lambda z, y: sample_loss(z, y, **keywords)  # noqa: E731
    want = torch.stack([function(z, y) for z, y in zip(logits, target, strict=True)])
    assert torch.equal(torch.vmap(function)(logits, target), want)
    moved = torch.vmap(function, in_dims=(1, None))(logits.transpose(0, 1), target[0])
    assert torch.equal(moved, torch.stack([function(z, target[0]) for z in logits]))
    nested = torch.vmap(torch.vmap(function))(logits[:, None], target[:, None])
    assert torch.equal(nested[:, 0], want)


def test_vmap_passes_gradients(device):
    logits = make(12, 5, device)[0].reshape(3, 4, 5).requires_grad_()
    target = make(12, 5, device)[1].reshape(3, 4)
    torch.vmap(sample_loss)(logits, target).sum().backward()
    want = F.cross_entropy(logits.detach().flatten(0, 1).requires_grad_(), target.flatten())
    z = logits.detach().flatten(0, 1).requires_grad_()
    F.cross_entropy(z, target.flatten(), reduction="sum").backward()
    torch.testing.assert_close(logits.grad.flatten(0, 1), z.grad, rtol=1e-5, atol=1e-6)
    assert want.isfinite()


def test_vmap_refuses_a_batch_of_class_weights(device):
    logits, target, _ = make(4, 5, device)
    function = lambda w: sample_loss(logits, target, class_weight=w)  # noqa: E731
    with pytest.raises(ValueError, match="class_weight: expected the same tensor"):
        torch.vmap(function)(torch.rand(3, 5, device=device))


def test_autocast_takes_logits_as_they_come(device):
    inputs, target, grad = make(8, 10, device)
    weight = torch.randn(10, 10, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=BF16):
        logits = inputs @ weight
        values = sample_loss(logits, target)
    assert logits.dtype == BF16
    assert values.dtype == F32
    torch.testing.assert_close(values, sample_loss(logits.float(), target))
    values.backward(grad)
    assert weight.grad.dtype == F32


@pytest.mark.xfail(
    strict=True,
    raises=RuntimeError,
    reason="torch.func.grad over register_autograd (torch #168393)",
)
def test_func_grad():
    logits, target, _ = make(4, 5, "cpu")
    torch.func.grad(lambda z: sample_loss(z, target).sum())(logits)


@losses
def test_no_value_is_looked_at(keywords):
    """Fake tensors have no values: anything like .item() raises."""
    with FakeTensorMode():
        logits = torch.empty(6, 5, requires_grad=True)
        target = torch.empty(6, dtype=torch.int64)
        sample_loss(logits, target, **keywords).sum().backward()
        assert logits.grad.shape == (6, 5)


@pytest.mark.cuda
@losses
def test_no_host_synchronisation_on_cuda(keywords):
    logits, target, grad = make(6, 5, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient(lambda z: sample_loss(z, target, **keywords), logits, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


INT = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, "logits: expected a torch.Tensor, got list"),
        ({"logits": torch.zeros(2)}, ValueError, r"logits: expected shape \[B, C\], got \[2\]"),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits: expected shape \[B, C\]"),
        ({"logits": INT.view(2, 1)}, TypeError, "logits: expected dtype float32.*got int64"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits: expected at least one class"),
        ({"target": [0, 1]}, TypeError, "target: expected a torch.Tensor, got list"),
        ({"target": INT[:1]}, ValueError, r"target: expected shape \[2\], got \[1\]"),
        ({"target": INT.int()}, TypeError, "target: expected dtype int64, got int32"),
        ({"target": torch.zeros(2)}, ValueError, r"target: expected shape \[2, 3\], got \[2\]"),
        (
            {"target": torch.zeros(2, 3), "loss": "gce"},
            ValueError,
            r"target: expected shape \[2\], got \[2, 3\]",
        ),
        (
            {"target": torch.zeros(2, 3, requires_grad=True)},
            ValueError,
            "target: expected a tensor without gradient",
        ),
        (
            {"target": torch.zeros(2, 3), "ignore_index": 1},
            ValueError,
            "ignore_index: expected class indices",
        ),
        ({"target": torch.tensor([0, 3])}, ValueError, "target: .*got 3 at position 1"),
        ({"loss": "hinge"}, ValueError, "loss: expected one of 'cross_entropy'.*got 'hinge'"),
        ({"loss": "gce", "q": 0.0}, ValueError, r"q: expected a finite number in \(0, 1\]"),
        ({"loss": "gce", "q": "1"}, TypeError, "q: expected a number, got str"),
        ({"loss": "gce", "gamma": 1.0}, TypeError, "gamma: loss 'gce' has no such.*parameters: q"),
        ({"q": 0.5}, TypeError, "q: loss 'cross_entropy' has no such parameter.*: none"),
        ({"loss": "sce", "A": 1.0}, ValueError, "A: expected a finite number"),
        ({"loss": "sce", "alpha": float("inf")}, ValueError, "alpha: expected a finite number"),
        ({"loss": "focal", "gamma": float("nan")}, ValueError, "gamma: expected a finite number"),
        ({"loss": "bootstrap", "kind": "firm"}, ValueError, "kind: expected one of 'hard', 'soft'"),
        (
            {"loss": "bootstrap", "q": 1.0},
            TypeError,
            "q: loss 'bootstrap' has no such parameter; its parameters: beta, kind",
        ),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a finite number"),
        ({"loss": "mae", "label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0 for"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an int, got float"),
        ({"class_weight": torch.zeros(2)}, ValueError, r"class_weight: expected shape \[3\]"),
        ({"class_weight": INT}, ValueError, r"class_weight: expected shape \[3\]"),
        (
            {"class_weight": torch.zeros(3, requires_grad=True)},
            ValueError,
            "class_weight: expected a tensor without gradient",
        ),
        (
            {"loss": "squared_error", "target": torch.zeros(2, 3), "class_weight": torch.zeros(3)},
            ValueError,
            "class_weight: expected None",
        ),
        ({"loss": "squared_error"}, ValueError, r"target: expected shape \[2, 3\], got \[2\]"),
        (
            {"logits": torch.zeros(2, 3, device="meta")},
            ValueError,
            "target: expected device 'meta', got 'cpu'",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        sample_loss(**{"logits": torch.zeros(2, 3), "target": INT, **change})
