import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from als_ext.ops import sample_loss, weighted_loss
from als_ext.ops.sample_loss import prepare
from als_ext.reference.weighted_loss import weighted_loss as plain

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LOSSES = {
    "cross_entropy": {},
    "smoothing": {"label_smoothing": 0.1},
    "gce": {"loss": "gce", "q": 0.7},
    "sce": {"loss": "sce", "alpha": 0.5, "beta": 1.5, "A": -6.0},
    "mae": {"loss": "mae"},
    "focal": {"loss": "focal", "gamma": 2.0},
    "bootstrap_hard": {"loss": "bootstrap", "kind": "hard", "beta": 0.8},
    "bootstrap_soft": {"loss": "bootstrap", "kind": "soft", "beta": 0.7},
}
losses = pytest.mark.parametrize("keywords", LOSSES.values(), ids=LOSSES)
GRADIENT = {  # rounded once to the dtype of the logits
    F32: {"rtol": 2e-6, "atol": 1e-6},
    BF16: {"rtol": 2**-8, "atol": 1e-6},
    F16: {"rtol": 2**-11 * 1.01, "atol": 1e-6},
    F64: {"rtol": 1e-12, "atol": 1e-13},
}


def make(rows, classes, device, dtype=F32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=g) * 3).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=g)
    real = F64 if dtype == F64 else F32
    weight = torch.randn(rows, generator=g).to(real)
    return logits.to(device), target.to(device), weight.to(device)


def run(function, logits, target, weight, factor=1.0, **keywords):
    """Total, losses and both gradients of factor * total."""
    z, w = logits.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    total, values = function(z, target, w, **keywords)
    grads = torch.autograd.grad(total * factor, (z, w))
    return total.detach(), values.detach(), *grads


@losses
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (67, 10), (9, 1000), (3, 5000)])
def test_agrees_with_float64_reference(rows, classes, dtype, keywords, device):
    logits, target, weight = make(rows, classes, device, dtype)
    got = run(weighted_loss, logits, target, weight, **keywords)
    want = run(plain, logits.double(), target, weight.double(), **keywords)
    real = F64 if dtype == F64 else F32
    assert [t.dtype for t in got] == [real, real, dtype, real]
    for a, b in zip((got[0], got[1], got[3]), (want[0], want[1], want[3]), strict=True):
        torch.testing.assert_close(a.double(), b, **GRADIENT[real])
    torch.testing.assert_close(got[2].double(), want[2], **GRADIENT[dtype])


@losses
@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_same_bits_as_sample_loss(classes, keywords, device):
    """The general path, whose backward starts from the saved sums."""
    logits, target, weight = make(20, classes, device)
    got = run(weighted_loss, logits, target, weight, **keywords)

    def composed(z, target, w, **keywords):
        values = sample_loss(z, target, **keywords)
        return (w * values).sum(), values

    want = run(composed, logits, target, weight, **keywords)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert torch.equal(a, b)


LONG = [16_385, 20_000, 32_000, 50_257, 128_256, 200_003, 1_000_003]  # one to many blocks a row


@pytest.mark.cuda
@losses
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("classes", LONG)
def test_long_rows_on_cuda(classes, dtype, keywords):
    logits, target, weight = make(5, classes, "cuda", dtype)
    target[1] = -100
    logits[2, ::3] = -float("inf")
    target[2] = 1
    if keywords.get("label_smoothing"):
        logits[2] = 0  # else its loss is infinite
    got = run(weighted_loss, logits, target, weight, **keywords)
    want = run(plain, logits.double(), target, weight.double(), **keywords)
    for a, b in zip((got[0], got[1], got[3]), (want[0], want[1], want[3]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=4e-6)
    # Nearly all elements are far below 1e-6: what they may lack is measured by the row's mean.
    allowed = 4e-6 * want[2].abs().mean(dim=1, keepdim=True) + (2**-25 if dtype == F16 else 0)
    allowed = allowed + (4e-6 + {F32: 0, BF16: 2**-8, F16: 2**-11}[dtype]) * want[2].abs()
    if keywords.get("kind") == "soft":  # p (log p + H) and p, which cancel
        p = logits.double().softmax(dim=1)
        log_term = torch.special.entr(p)  # -p log p, 0 at 0
        terms = p + log_term + p * log_term.sum(dim=1, keepdim=True)
        allowed = allowed + 1e-6 * (weight.double() * (target >= 0))[:, None].abs() * terms
    assert ((got[2].double() - want[2]).abs() <= allowed).all()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("classes", [5000, 50_257, 128_256])
def test_the_bits_of_a_long_row_are_its_own_on_cuda(classes, dtype):
    """Wherever it begins in memory and in the batch; forward and backward of sample_loss, too."""
    logits, target, weight = make(7, classes + 1, "cuda", dtype)
    target %= classes
    view = logits[:, 1:]
    got = run(weighted_loss, view, target, weight)
    same = run(weighted_loss, view.contiguous(), target, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))
    for i in range(7):
        alone = run(weighted_loss, view[i : i + 1], target[i : i + 1], weight[i : i + 1])
        assert torch.equal(alone[1], got[1][i : i + 1])
        assert torch.equal(alone[2], got[2][i : i + 1])
    z = view.detach().clone().requires_grad_()
    values = sample_loss(z, target)
    assert torch.equal(values.detach(), got[1])
    assert torch.equal(torch.autograd.grad(values, z, weight)[0], got[2])


@losses
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_the_public_function_and_the_operator_have_one_derivative(dtype, keywords, device):
    """Eager calls go round torch.library's autograd, with the formulas registered there."""
    logits, target, weight = make(20, 7, device, dtype)
    got = run(weighted_loss, logits, target, weight, 1 / 3, **keywords)
    arguments = prepare(
        logits,
        target,
        keywords.get("loss", "cross_entropy"),
        keywords.get("label_smoothing", 0.0),
        -100,
        None,
        {k: v for k, v in keywords.items() if k not in ("loss", "label_smoothing")},
    )
    rest = arguments[2:]

    def registered(z, target, w):
        return torch.ops.als_ext.weighted_loss.default(z, target, w, *rest, [], True)[:2]

    want = run(registered, logits, target, weight, 1 / 3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_class_probabilities_and_squared_error(device):
    logits, _, weight = make(30, 11, device)
    target = make(30, 11, device, seed=1)[0]
    for keywords in ({"label_smoothing": 0.1}, {"loss": "squared_error"}):
        got = run(weighted_loss, logits, target.softmax(1), weight, **keywords)
        want = run(plain, logits.double(), target.softmax(1), weight.double(), **keywords)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    got = run(weighted_loss, logits[:, 0], target[:, 0], weight, loss="squared_error")
    want = run(plain, logits[:, 0].double(), target[:, 0], weight.double(), loss="squared_error")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


def test_uniform_weights_give_the_mean_of_torch(device):
    logits, target, _ = make(64, 10, device)
    got = run(weighted_loss, logits, target, torch.full((64,), 1 / 64, device=device))
    z = logits.clone().requires_grad_()
    mean = F.cross_entropy(z, target)
    mean.backward()
    torch.testing.assert_close(got[0], mean.detach())
    torch.testing.assert_close(got[2], z.grad)


@pytest.mark.parametrize("factor", [1.0, -3.0, 0.0, 1024.0])
def test_the_incoming_gradient_is_a_factor(factor, device):
    logits, target, weight = make(9, 7, device)
    one = run(weighted_loss, logits, target, weight)
    scaled = run(weighted_loss, logits, target, weight, factor)
    torch.testing.assert_close(scaled[2], one[2] * factor, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled[3], one[3] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_retain_graph(factor, dtype, device):
    """What forward has kept survives a first backward and whatever its gradients become."""
    logits, target, weight = make(9, 7, device, dtype)
    z, w = logits.requires_grad_(), weight.requires_grad_()
    total, values = weighted_loss(z, target, w)
    kept = values.clone()
    first = torch.autograd.grad(total * factor, (z, w), retain_graph=True)
    wanted = [g.clone() for g in first]
    for g in first:
        g.zero_()
    (total * factor).backward(retain_graph=True)
    z.grad.zero_()  # what optimizer.zero_grad(set_to_none=False) does
    w.grad.zero_()
    (total * factor).backward()
    assert torch.equal(z.grad, wanted[0])
    assert torch.equal(w.grad, wanted[1])
    assert torch.equal(wanted[0], run(weighted_loss, logits, target, weight, factor)[2])
    assert torch.equal(values, kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_the_gradient_of_weight_is_no_alias_of_the_losses(device):
    logits, target, weight = make(9, 7, device)
    weight = weight.requires_grad_() * 1
    total, values = weighted_loss(logits, target, weight)
    kept = values.clone()
    weight.register_hook(lambda g: g.zero_())
    total.backward()
    assert torch.equal(values, kept)


def test_a_graph_that_is_not_kept_hands_its_gradient_over(device):
    """In two runs the gradients are their own, whatever becomes of the first."""
    logits, target, weight = make(9, 7, device)
    z = logits.requires_grad_()
    weighted_loss(z, target, weight)[0].backward()
    first, wanted = z.grad, z.grad.clone()
    z.grad = None
    weighted_loss(z, target, weight)[0].backward()
    first.zero_()
    assert torch.equal(z.grad, wanted)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (9, 7), (300, 1000)])
def test_the_kept_gradient_is_scaled_in_place(shape, dtype, device):
    kept = make(*shape, device, dtype)[0]
    scale = torch.ops.als_ext.weighted_loss_scale_.default
    for factor in (1.0, -3.0, 0.0, 1 / 3):
        factor = torch.tensor(factor, dtype=F64 if dtype == F64 else F32, device=device)
        got, want = kept.clone(), kept.double() * factor.double()  # exact but for F64
        if dtype == BF16:
            want = want.float()  # a float32 product that is rounded once more
        scale(got, factor)
        assert torch.equal(got, want.to(dtype))
    opcheck(scale, (kept, factor))
    with pytest.raises(RuntimeError, match="factor: expected dtype"):
        scale(kept, factor.to(F16))
    with pytest.raises(RuntimeError, match="factor: expected 0 dimensions, got 1"):
        scale(kept, factor.expand(2).contiguous())
    with pytest.raises(RuntimeError, match="grad_logits: expected a contiguous tensor"):
        scale(kept.new_zeros(3, 2).t(), factor)


def test_two_losses_on_one_tensor_and_logits_not_modified(device):
    logits, target, weight = make(9, 7, device)
    z, before = logits.requires_grad_(), logits.detach().clone()
    version = z._version
    total = weighted_loss(z, target, weight)[0] + weighted_loss(z, target, weight, loss="mae")[0]
    total.backward()
    alone = [
        run(weighted_loss, before, target, weight, loss=x)[2] for x in ("cross_entropy", "mae")
    ]
    torch.testing.assert_close(z.grad, alone[0] + alone[1], rtol=1e-6, atol=1e-7)
    assert torch.equal(z, before)
    assert z._version == version


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_small_gradients_reach_a_grad_scaler(dtype, device):
    """weight * gradient is far below float16's range until backward brings the factor."""
    logits, target, weight = make(9, 7, device, dtype)
    weight = weight * 1e-7
    got = run(weighted_loss, logits, target, weight, 2.0**20)
    want = run(plain, logits.double(), target, weight.double(), 2.0**20)
    torch.testing.assert_close(got[2].double(), want[2], rtol=2**-8, atol=1e-7)


def test_without_a_gradient_to_logits_none_is_computed(device):
    logits, target, weight = make(9, 7, device)
    raw = torch.ops.als_ext.weighted_loss.default
    rest = (None, 0, [], 0.0, -100, [])
    assert raw(logits, target, weight, *rest, False)[2].shape == (0, 7)
    total, values = weighted_loss(logits, target, weight)
    assert not total.requires_grad
    with torch.no_grad():
        assert not weighted_loss(logits.requires_grad_(), target, weight)[0].requires_grad
    with pytest.raises(RuntimeError, match="need_grad=False"):
        raw(logits, target, weight, *rest, False)[0].backward()
    assert torch.equal(values, sample_loss(logits.detach(), target))


def test_losses_carry_no_gradient(device):
    logits, target, weight = make(9, 7, device)
    total, values = weighted_loss(logits.requires_grad_(), target, weight.requires_grad_())
    assert total.requires_grad
    assert not values.requires_grad


def test_a_derivative_of_the_gradient_is_refused(device):
    """Not silently zero; sample_loss has one."""
    logits, target, weight = make(4, 5, device, F64)
    z, w = logits.requires_grad_(), weight.requires_grad_()
    with pytest.raises(RuntimeError, match="the gradient has no derivative"):
        torch.autograd.grad(weighted_loss(z, target, w)[0], z, create_graph=True)
    function = lambda z, w: (w * sample_loss(z, target)).sum()  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (z, w))


@losses
def test_gradcheck(keywords):
    logits, target, weight = make(4, 5, "cpu", F64)
    target[1] = -100
    class_weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5])
    for extra in ({}, {"class_weight": class_weight}):
        assert torch.autograd.gradcheck(
            lambda z, w: weighted_loss(z, target, w, **keywords, **extra)[0],  # noqa: B023
            (logits.requires_grad_(), weight.requires_grad_()),
        )


@losses
def test_ignored_rows_and_no_rows(keywords, device):
    logits, target, weight = make(9, 7, device)
    logits[0] = float("nan")
    target[:] = -100
    total, values, grad, grad_weight = run(weighted_loss, logits, target, weight, **keywords)
    for zero in (total, values, grad, grad_weight):
        assert (zero == 0).all()
    for empty in run(weighted_loss, logits[:0], target[:0], weight[:0], **keywords):
        assert (empty == 0).all()


def test_layouts(device):
    logits, target, weight = make(12, 42, device)
    for z in (logits[:, 1:], logits[:1].expand(12, 42), logits[::2].repeat(2, 1)[:, ::2]):
        got = run(weighted_loss, z, target % 21, weight)
        contiguous = z.contiguous().clone()
        total, values = weighted_loss(z, target % 21, weight[:1].expand(12))
        assert torch.equal(values, got[1])
        same = run(weighted_loss, contiguous, target % 21, weight)
        assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))
        torch.testing.assert_close(total, values.sum() * weight[0])


def test_total_is_summed_in_float64(device):
    """2^24 and then ones: float32 addition would drop every one of them."""
    rows = 4097
    logits = torch.zeros(rows, 1, device=device)
    target = torch.ones(rows, 1, device=device)
    target[0] = 4096
    total, values = weighted_loss(
        logits, target, torch.ones(rows, device=device), loss="squared_error"
    )
    assert values[0] == 2**24
    assert total == 2**24 + 4096


@pytest.mark.parametrize("rows", [129, 256, 1000, 2048, 4096])
@pytest.mark.parametrize("classes", [1, 10, 100])
def test_total_of_small_batches(rows, classes, device):
    """Which on a GPU the kernel of the losses adds up, in one cluster of blocks."""
    logits, target, weight = make(rows, classes, device)
    if classes == 1:  # every other loss is 0
        target, loss = make(rows, 1, device, seed=1)[0], "squared_error"
    else:
        loss = "cross_entropy"
    total, values = weighted_loss(logits, target, weight, loss=loss)
    products = weight.double() * values.double()
    rounding = 2**-24 * products.sum().abs() + 1e-13 * products.abs().sum()
    assert (total.double() - products.sum()).abs() <= rounding


def test_same_bits_with_any_number_of_threads():
    logits, target, weight = make(3000, 10, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(weighted_loss, logits, target, weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def samples(device, dtype=F32):
    logits, target, weight = make(6, 5, device, dtype)
    real = weight.dtype
    z = logits.requires_grad_()
    yield z, target, weight, None, 0, [], 0.0, -100, [], True
    yield z, target, weight.requires_grad_(), None, 1, [0.5], 0.0, -100, [], True
    yield z.detach(), target, weight, None, 5, [0.9], 0.0, -100, [], False
    yield z[:0], target[:0], weight[:0], None, 6, [0.9], 0.0, -100, [], True
    class_weight = torch.rand(5, dtype=real, device=device)
    yield z.t().contiguous().t(), target, weight, class_weight, 0, [], 0.1, -100, [3], True
    yield z[:1].expand(6, 5), target, weight, None, 4, [2.0], 0.0, -100, [3, 2], True
    dense = torch.rand(5, 6, dtype=real, device=device).t()
    yield z, dense, weight[:1].expand(6), None, 7, [], 0.0, -100, [1], True


@pytest.mark.parametrize("dtype", [F32, F16])
def test_opcheck(dtype, device):
    for arguments in samples(device, dtype):
        opcheck(torch.ops.als_ext.weighted_loss.default, arguments)


@pytest.mark.parametrize("loss", ["cross_entropy", "smoothing", "bootstrap_soft"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiles_with_fullgraph(loss, dtype, device):
    torch._dynamo.reset()
    logits, target, weight = make(6, 5, device, dtype)
    compiled = torch.compile(weighted_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    got = run(compiled, logits, target, weight, 1 / 3, **LOSSES[loss])
    want = run(weighted_loss, logits, target, weight, 1 / 3, **LOSSES[loss])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@losses
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_vmap_gives_one_total_a_slice(keywords, dtype, device):
    logits, target, weight = make(12, 5, device, dtype)
    slices = logits.reshape(3, 4, 5), target.reshape(3, 4), weight.reshape(3, 4)
    factors = torch.tensor([1.0, -2.0, 0.5], device=device)

    def mapped(z, y, w):
        total, values = torch.vmap(lambda z, y, w: weighted_loss(z, y, w, **keywords))(z, y, w)
        return (total * factors).sum(), total, values

    z, w = slices[0].clone().requires_grad_(), slices[2].clone().requires_grad_()
    total, totals, values = mapped(z, slices[1], w)
    total.backward()
    for i, factor in enumerate(factors.tolist()):
        alone = run(weighted_loss, *(t[i] for t in slices), factor, **keywords)
        assert torch.equal(totals[i], alone[0])
        assert torch.equal(values[i], alone[1])
        torch.testing.assert_close(
            z.grad[i], alone[2], rtol=1e-6 if dtype == F32 else 2**-7, atol=0
        )
        torch.testing.assert_close(w.grad[i], alone[3])


def test_vmap_over_weights_alone(device):
    logits, target, _ = make(4, 5, device)
    weights = torch.rand(3, 4, device=device)
    totals, values = torch.vmap(weighted_loss, in_dims=(None, None, 0))(logits, target, weights)
    want = sample_loss(logits, target)
    torch.testing.assert_close(totals, weights @ want)
    assert torch.equal(values, want.expand(3, 4))


def test_batched_gradients(device):
    """torch.autograd.grad(is_grads_batched=True), as torch.autograd.functional uses it."""
    logits, target, weight = make(4, 5, device)
    z = logits.requires_grad_()
    total, _ = weighted_loss(z, target, weight)
    factors = torch.tensor([1.0, 3.0], device=device)
    (both,) = torch.autograd.grad(total, z, factors, is_grads_batched=True)
    one = run(weighted_loss, logits, target, weight)[2]
    torch.testing.assert_close(both, torch.stack([one, 3 * one]))


def test_autocast_takes_logits_as_they_come(device):
    inputs, target, weight = make(8, 10, device)
    layer = torch.randn(10, 10, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=BF16):
        total, values = weighted_loss(inputs @ layer, target, weight)
    assert total.dtype == values.dtype == F32
    total.backward()
    assert layer.grad.dtype == F32


@pytest.mark.xfail(
    strict=True,
    raises=RuntimeError,
    reason="torch.func.grad over register_autograd (torch #168393)",
)
def test_func_grad():
    logits, target, weight = make(4, 5, "cpu")
    torch.func.grad(lambda z: weighted_loss(z, target, weight)[0])(logits)


@losses
def test_no_value_is_looked_at(keywords):
    """Fake tensors have no values: anything like .item() raises."""
    with FakeTensorMode():
        logits, weight = torch.empty(6, 5, requires_grad=True), torch.empty(6, requires_grad=True)
        target = torch.empty(6, dtype=torch.int64)
        weighted_loss(logits, target, weight, **keywords)[0].backward()
        assert logits.grad.shape == (6, 5)
        assert weight.grad.shape == (6,)


@pytest.mark.cuda
@losses
def test_no_host_synchronisation_on_cuda(keywords):
    logits, target, weight = make(6, 5, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(weighted_loss, logits, target, weight, **keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [F32, BF16, F16])  # float16 keeps its gradient in float32
@pytest.mark.parametrize("shape", [(8, 10), (300, 10), (8, 5000), (8, 50_257)])
def test_captured_in_a_cuda_graph(shape, dtype):
    """Clusters of blocks too: a small batch and its total, a long row."""
    logits, target, weight = make(*shape, "cuda", dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(weighted_loss, logits, target, weight, 3.0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(weighted_loss, logits, target, weight, 3.0)
    logits.copy_(make(*shape, "cuda", dtype, seed=1)[0])
    want = run(weighted_loss, logits, target, weight, 3.0)
    for _ in range(2):
        graph.replay()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.cuda
def test_a_captured_backward_that_retains_its_graph_can_be_replayed():
    logits, target, weight = make(8, 10, "cuda")
    want = run(weighted_loss, logits, target, weight, 3.0)[2]
    stream, factor = torch.cuda.Stream(), torch.full((), 3.0, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # backward runs on the stream of its forward
        z = logits.requires_grad_()
        total = weighted_loss(z, target, weight)[0]
        torch.autograd.grad(total, z, factor, retain_graph=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            (got,) = torch.autograd.grad(total, z, factor, retain_graph=True)
        for _ in range(2):
            graph.replay()
            assert torch.equal(got, want)


def test_a_class_out_of_range_is_named_on_the_cpu():
    logits, target, weight = make(6, 4, "cpu")
    target[3] = 4
    with pytest.raises(
        ValueError, match=r"target: expected values in \[0, 4\).*got 4 at position 3"
    ):
        weighted_loss(logits, target, weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": [0.5, 1.0]}, TypeError, "weight: expected a torch.Tensor, got list"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight: expected shape \[2\], got \[3\]"),
        ({"weight": torch.zeros(2, 1)}, ValueError, r"weight: expected shape \[2\], got \[2, 1\]"),
        ({"weight": torch.zeros(2).int()}, TypeError, "weight: expected dtype float32.*got int32"),
        ({"weight": torch.zeros(2, device="meta")}, ValueError, "weight: expected device 'cpu'"),
        ({"logits": torch.zeros(2)}, ValueError, r"logits: expected shape \[B, C\], got \[2\]"),
        ({"loss": "hinge"}, ValueError, "loss: expected one of 'cross_entropy'"),
        ({"gamma": 2.0}, TypeError, "gamma: loss 'cross_entropy' has no such parameter"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "logits": torch.zeros(2, 3),
        "target": torch.zeros(2, dtype=torch.int64),
        "weight": torch.zeros(2),
    }
    with pytest.raises(error, match=message):
        weighted_loss(**{**arguments, **change})


def test_losses_are_the_callers_unless_the_weights_need_a_gradient():
    logits = torch.randn(5, 3, requires_grad=True)
    target, weight = torch.tensor([0, 1, 2, 0, 1]), torch.ones(5)
    total, losses = weighted_loss(logits, target, weight)
    losses.clamp_(max=0.1)
    total.backward()
    plain_total = F.cross_entropy(logits, target, reduction="sum")
    torch.testing.assert_close(logits.grad, torch.autograd.grad(plain_total, logits)[0])
    total, losses = weighted_loss(logits, target, weight.requires_grad_())
    losses.clamp_(max=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_tangent_is_refused_and_not_dropped():
    logits, target = torch.randn(2, 3), torch.tensor([0, 1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones(2, 3))
        for call in (
            lambda: weighted_loss(dual, target, torch.ones(2)),
            lambda: weighted_loss(logits, target, dual[:, 0]),
            lambda: sample_loss(dual, target),
        ):
            with pytest.raises(RuntimeError, match="expected arguments without a tangent"):
                call()
        assert sample_loss(logits, target).shape == (2,)
