"""sample_loss: the loss of every sample of a batch, for use with weights and label correction."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from als_ext.ops._autograd import DirectCall, runs_eagerly
from als_ext.ops._checks import (
    batched_first,
    check_choice,
    check_float,
    check_int,
    check_tensor,
    values_readable,
)
from als_ext.reference.sample_loss import sample_loss as plain_sample_loss


class Range(NamedTuple):
    """A loss parameter: its default and the finite values it may take."""

    default: float
    low: float
    high: float = float("inf")
    open_low: bool = False


# Position = the operator's enum; the order of the parameters is that of the operator as well.
LOSSES: dict[str, dict[str, Range]] = {
    "cross_entropy": {},
    "gce": {"q": Range(0.7, 0.0, 1.0, open_low=True)},
    "sce": {
        "alpha": Range(0.1, 0.0),
        "beta": Range(1.0, 0.0),
        "A": Range(-4.0, -1e30, 0.0),
    },
    "mae": {},
    "focal": {"gamma": Range(2.0, 0.0)},
    "bootstrap_hard": {"beta": Range(0.8, 0.0, 1.0)},
    "bootstrap_soft": {"beta": Range(0.95, 0.0, 1.0)},
    "squared_error": {},
}
SQUARED_ERROR = list(LOSSES).index("squared_error")
NAMES = ("cross_entropy", "gce", "sce", "mae", "focal", "bootstrap", "squared_error")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sample_loss(
    logits: Tensor,
    target: Tensor,
    *,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    **loss_parameters: Any,
) -> Tensor:
    r"""Compute the loss of every sample, differentiable once and twice.

    With :math:`p = \mathrm{softmax}(z)`, :math:`y` the class, :math:`w` the class weights (1
    without them), :math:`\varepsilon` the label smoothing and natural logarithms, ``loss`` is

    * ``cross_entropy``, that of :func:`torch.nn.functional.cross_entropy`:
      :math:`-(1-\varepsilon) w_y \log p_y - \frac{\varepsilon}{C} \sum_c w_c \log p_c`, or with
      class probabilities :math:`t`
      :math:`-\sum_c w_c ((1-\varepsilon) t_c + \frac{\varepsilon}{C}) \log p_c`
    * ``gce`` (q = 0.7), arXiv 1805.07836: :math:`w_y (1 - p_y^q) / q`
    * ``sce`` (alpha = 0.1, beta = 1, A = -4, which stands for log 0), arXiv 1908.06112:
      :math:`-w_y (\alpha \log p_y + \beta A (1 - p_y))`
    * ``mae``, arXiv 1712.09482: :math:`w_y \sum_c |p_c - [c = y]| = 2 w_y (1 - p_y)`
    * ``focal`` (gamma = 2), arXiv 1708.02002: :math:`-w_y (1 - p_y)^\gamma \log p_y`
    * ``bootstrap``, arXiv 1412.6596, with kind = "hard" (beta = 0.8):
      :math:`-w_y (\beta \log p_y + (1-\beta) \log \max_c p_c)`, or kind = "soft" (beta = 0.95):
      :math:`-w_y (\beta \log p_y + (1-\beta) \sum_c p_c \log p_c)`
    * ``squared_error`` (regression): :math:`\frac1D \sum_j (z_j - t_j)^2`, so that the mean over
      the batch is :func:`torch.nn.functional.mse_loss`.

    Args:
        logits: [B, C] float32, float64, bfloat16 or float16, C >= 1, any strides; for squared_error
            [B] or [B, D] predictions.
        target: [B] int64 in [0, C) or ``ignore_index``. For cross_entropy also [B, C] floating
            class probabilities (expected >= 0 with sum 1, not checked); for squared_error floating
            values of the shape of ``logits``. Gets no gradient.
        loss: one of the names above.
        label_smoothing: in [0, 1], of cross_entropy only.
        ignore_index: samples with this target have loss 0 and gradient 0, whatever their logits.
            Only with class indices.
        class_weight: [C] floating weights, not for squared_error. Gets no gradient.
        **loss_parameters: q in (0, 1]; alpha, beta >= 0 and A <= 0 of sce; gamma >= 0; beta in
            [0, 1] and kind of bootstrap. The arg max of the hard bootstrap is a constant, and the
            smallest class where there are several.

    Returns:
        losses [B] float32 (float64 for float64 logits), in nats where the loss is a logarithm. A
        confident sample keeps its relative precision: -log p_y is exact to about 1e-6 relative even
        where p_y rounds to 1.

    Raises:
        TypeError: an argument of another type or dtype, or a parameter that the loss does not have.
        ValueError: shapes, devices or values that do not fit. A class outside [0, C) is named on
            the CPU (as a RuntimeError out of ``torch.compile`` and ``torch.vmap``); on CUDA, where
            looking would wait for the device, the sample has loss NaN and gradient NaN.

    Note:
        A row with +inf, with NaN or of -inf alone has loss NaN; a class of logit -inf has
        probability 0, and what has weight or probability 0 adds nothing to a loss.
        Gradients flow to ``logits`` only, in its dtype, computed in float32 (float64) and rounded
        once. The second derivative is computed by plain PyTorch. Works in ``torch.compile`` with
        fullgraph, under ``torch.vmap`` (flattened to one call) and in CUDA graphs; under autocast
        logits are taken as they come. Deterministic, and on the CPU independent of the number of
        threads. Memory: 3 numbers a sample are kept for backward, next to ``logits``.
        ``torch.func.grad`` does not work over PyTorch's registered custom operators.

    Example:
        >>> import torch
        >>> from als_ext.ops import sample_loss
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
        >>> sample_loss(logits, torch.tensor([0, 2]))
        tensor([0.2395, 3.0949])
        >>> sample_loss(logits, torch.tensor([0, 2]), loss="gce", q=0.5)
        tensor([0.2258, 1.5744])
    """
    arguments = prepare(
        logits, target, loss, label_smoothing, ignore_index, class_weight, loss_parameters
    )
    losses: Tensor
    try:
        losses, _ = _call(*arguments, differentiable=logits.requires_grad)
    except RuntimeError:
        explain(arguments, loss)
        raise
    return losses


class Arguments(NamedTuple):
    """The arguments of the operator, in its order."""

    logits: Tensor
    target: Tensor
    class_weight: Tensor | None
    loss: int
    parameters: list[float]
    label_smoothing: float
    ignore_index: int


def prepare(
    logits: Tensor,
    target: Tensor,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
    class_weight: Tensor | None,
    loss_parameters: dict[str, Any],
) -> Arguments:
    """Check what the user gave and put it as the operators want it.

    Class indices on the CPU are left to the operator, which makes the same checks faster; what it
    refuses, :func:`explain` puts into words.
    """
    eager = runs_eagerly()
    try:
        check = _constants if eager else _constants.__wrapped__
        kind, parameters = check(loss, label_smoothing, ignore_index, **loss_parameters)
    except TypeError:  # unhashable, or not what the argument may be
        kind, parameters = _constants.__wrapped__(
            loss, label_smoothing, ignore_index, **loss_parameters
        )
    if not (
        eager
        and class_weight is None
        and kind != SQUARED_ERROR
        and left_to_operator(target)
        and target.dtype is torch.int64
        and left_to_operator(logits)
    ):
        logits, target, class_weight = _check_tensors(
            logits, target, loss, ignore_index, class_weight
        )
    return Arguments(
        logits, target, class_weight, kind, parameters, float(label_smoothing), ignore_index
    )


def left_to_operator(value: object) -> bool:
    """Whether the CPU operator itself will look at this tensor."""
    return isinstance(value, Tensor) and value.is_cpu


def _check_tensors(
    logits: Tensor, target: Tensor, loss: str, ignore_index: int, class_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    regression = loss == "squared_error"
    one_value = regression and isinstance(logits, Tensor) and logits.dim() == 1
    check_tensor("logits", logits, shape=("B",) if one_value else ("B", "C"), dtypes=FLOATS)
    if not one_value and logits.shape[1] == 0:
        raise ValueError("logits: expected at least one class, got shape " + str([*logits.shape]))
    accumulation = accumulation_dtype(logits)
    if regression or (loss == "cross_entropy" and _is_floating(target)):
        check_tensor("target", target, shape=tuple(logits.shape), dtypes=FLOATS, like=logits)
        _check_constant("target", target)
        if ignore_index != -100:
            raise ValueError(
                f"ignore_index: expected class indices as target, got {target.dtype} values"
            )
        target = target.to(accumulation)
    else:
        check_tensor("target", target, shape=(logits.shape[0],), dtypes=[torch.int64], like=logits)
    if class_weight is not None:
        if regression:
            raise ValueError("class_weight: expected None for loss 'squared_error', got a tensor")
        check_tensor(
            "class_weight", class_weight, shape=(logits.shape[1],), dtypes=FLOATS, like=logits
        )
        _check_constant("class_weight", class_weight)
        class_weight = class_weight.to(accumulation)
    if one_value:
        logits, target = logits.unsqueeze(1), target.unsqueeze(1)
    return logits, target, class_weight


def explain(arguments: Arguments, loss: str) -> None:
    """Raise what is wrong with arguments that the operator has refused, where it can be found."""
    logits, target, class_weight, *_, ignore_index = arguments
    if loss != "squared_error":
        _check_tensors(logits, target, loss, ignore_index, class_weight)
    check_labels(target, logits.shape[1], ignore_index)


@functools.lru_cache(maxsize=64, typed=True)
def _constants(
    loss: str, label_smoothing: float, ignore_index: int, **loss_parameters: Any
) -> tuple[int, list[float]]:
    """Position and parameters of a loss; what does not depend on tensors is checked once."""
    check_choice("loss", loss, NAMES)
    name, parameters = _loss_parameters(loss, loss_parameters)
    check_float("label_smoothing", label_smoothing, low=0.0, high=1.0)
    check_int("ignore_index", ignore_index, low=-(2**63), high=2**63 - 1)
    if label_smoothing and loss != "cross_entropy":
        raise ValueError(
            f"label_smoothing: expected 0 for loss {loss!r} (only cross_entropy has it), "
            f"got {label_smoothing}"
        )
    return list(LOSSES).index(name), parameters


def _loss_parameters(loss: str, given: dict[str, Any]) -> tuple[str, list[float]]:
    """Name in LOSSES and all parameters of a loss, checked."""
    name = loss
    if loss == "bootstrap":
        kind = given.get("kind", "hard")
        check_choice("kind", kind, ("hard", "soft"))
        name = f"bootstrap_{kind}"
    known = LOSSES[name]
    allowed = [*known, *(["kind"] if loss == "bootstrap" else [])]
    for parameter in given:
        if parameter not in allowed:
            names = ", ".join(allowed) or "none"
            raise TypeError(
                f"{parameter}: loss {loss!r} has no such parameter; its parameters: {names}"
            )
    values = []
    for parameter, (default, low, high, open_low) in known.items():
        value = given.get(parameter, default)
        check_float(parameter, value, low=low, high=high, open_low=open_low)
        values.append(float(value))
    return name, values


def _is_floating(target: object) -> bool:
    return isinstance(target, Tensor) and target.is_floating_point()


def _check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name}: expected a tensor without gradient, got requires_grad=True")


def check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Name the first class outside [0, classes), for what the operator has refused."""
    if target.is_floating_point() or not values_readable(target):
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"target: expected values in [0, {classes}) or ignore_index={ignore_index}, "
            f"got {int(target[at])} at position {at}"
        )


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """Dtype of losses, sums and row weights."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.library.register_fake("als_ext::sample_loss")
def _fake(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    loss: int,
    parameters: Sequence[float],
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    rows, dtype = logits.shape[0], accumulation_dtype(logits)
    state_rows = 0 if loss == SQUARED_ERROR else rows
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(state_rows, 3, dtype=dtype)


@torch.library.register_fake("als_ext::sample_loss_backward")
def _fake_backward(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    state: Tensor,
    loss: int,
    parameters: Sequence[float],
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, class_weight, *ctx.constants = inputs
    _, state = output
    ctx.save_for_backward(logits, target, class_weight, state)
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_losses: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_losses is None or not ctx.needs_input_grad[0]:
        return (None,) * 7
    grad = _call_backward(
        grad_losses, *ctx.saved_tensors, *ctx.constants, differentiable=torch.is_grad_enabled()
    )
    return grad, *(None,) * 6


torch.library.register_autograd("als_ext::sample_loss", _backward, setup_context=_setup_context)
_call = DirectCall(torch.ops.als_ext.sample_loss.default, _setup_context, _backward)


def _setup_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_losses, logits, target, class_weight, _, *ctx.constants = inputs
    ctx.save_for_backward(grad_losses, logits, target, class_weight)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the plain PyTorch definition twice: rarely needed, and right at any order."""
    grad_losses, logits, target, class_weight = ctx.saved_tensors
    loss, parameters, label_smoothing, ignore_index = ctx.constants
    name, keywords = plain_arguments(loss, parameters)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [
            t if t.requires_grad else t.detach().requires_grad_() for t in (grad_losses, logits)
        ]
        losses = plain_sample_loss(
            inputs[1],
            target,
            loss=name,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            class_weight=class_weight,
            **keywords,
        )
        (first,) = torch.autograd.grad(losses, inputs[1], inputs[0].to(losses), create_graph=True)
        second = torch.autograd.grad(
            first, inputs, grad, create_graph=create_graph, materialize_grads=True
        )
    return *second, *(None,) * 7


def plain_arguments(loss: int, parameters: Sequence[float]) -> tuple[str, dict[str, Any]]:
    """Name and keywords of the reference for the operator's loss and parameters."""
    full_name = list(LOSSES)[loss]
    name, _, kind = full_name.partition("bootstrap_")
    keywords: dict[str, Any] = dict(zip(LOSSES[full_name], parameters, strict=True))
    return (name, keywords) if not kind else ("bootstrap", {**keywords, "kind": kind})


torch.library.register_autograd(
    "als_ext::sample_loss_backward", _double_backward, setup_context=_setup_double_backward
)
_call_backward = DirectCall(
    torch.ops.als_ext.sample_loss_backward.default, _setup_double_backward, _double_backward
)


def flatten(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """Join the vmapped dimension (or a repetition) with the rows, which come first."""
    return batched_first(tensor, dim, batch).flatten(0, 1)


def check_vmap(class_weight_dim: int | None) -> None:
    """Refuse what one call cannot do."""
    if class_weight_dim is not None:
        raise ValueError("class_weight: expected the same tensor for all of a vmap, got a batch")


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    size = info.batch_size
    logits, target = (flatten(args[i], in_dims[i], size) for i in range(2))
    check_vmap(in_dims[2])
    losses, state = torch.ops.als_ext.sample_loss.default(logits, target, *args[2:])
    rows = logits.shape[0] // size
    state = state.reshape(size, state.shape[0] // size, 3)
    return (losses.reshape(size, rows), state), (0, 0)


def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    size = info.batch_size
    grad_losses, logits, target = (flatten(args[i], in_dims[i], size) for i in range(3))
    check_vmap(in_dims[3])
    grad = torch.ops.als_ext.sample_loss_backward.default(
        grad_losses, logits, target, args[3], flatten(args[4], in_dims[4], size), *args[5:]
    )
    return grad.reshape(size, logits.shape[0] // size, logits.shape[1]), 0


torch.library.register_vmap("als_ext::sample_loss", _vmap)
torch.library.register_vmap("als_ext::sample_loss_backward", _vmap_backward)
