"""weighted_loss: the weighted sum of the losses of a batch, with its gradient in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from als_ext.ops._autograd import DirectCall, runs_eagerly
from als_ext.ops._checks import check_tensor, has_values
from als_ext.ops.sample_loss import (
    FLOATS,
    accumulation_dtype,
    check_vmap,
    explain,
    flatten,
    left_to_operator,
    prepare,
)


def weighted_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    **loss_parameters: Any,
) -> tuple[Tensor, Tensor]:
    r"""Compute the weighted sum of the losses of a batch, and the losses.

    .. math:: \text{total} = \sum_i w_i L_i, \qquad
              \frac{\partial\,\text{total}}{\partial z_i} = w_i \frac{\partial L_i}{\partial z_i},
              \qquad \frac{\partial\,\text{total}}{\partial w_i} = L_i

    with :math:`L` of :func:`sample_loss`. The weights are known before the losses (they are those
    of ALSO, arXiv 2508.16734), so one kernel reads the logits once and writes the weighted gradient
    once; backward only multiplies it by the incoming scalar.

    Args:
        logits: [B, C] as in :func:`sample_loss`.
        target: [B] or [B, C] as in :func:`sample_loss`.
        weight: [B] floating, any values; used in float32 (float64 for float64 logits). May require
            a gradient.
        loss: a loss of :func:`sample_loss`.
        label_smoothing: as in :func:`sample_loss`.
        ignore_index: as in :func:`sample_loss`.
        class_weight: as in :func:`sample_loss`; a factor beside ``weight``.
        **loss_parameters: as in :func:`sample_loss`.

    Returns:
        total, a scalar, and losses [B], both float32 (float64 for float64 logits). ``total`` is
        what people call ``backward`` on. ``losses`` is without gradient, for a π step, a log or a
        selection; :func:`sample_loss` gives losses with one.

    Raises:
        TypeError: as :func:`sample_loss`.
        ValueError: as :func:`sample_loss`, and for weights that do not fit.
        RuntimeError: a derivative of the gradient is asked for (``create_graph=True``);
            ``(weight * sample_loss(...)).sum()`` has one.

    Note:
        Gradients flow to ``logits``, in its dtype, and to ``weight``. Without a gradient to logits
        none is computed. The sum is taken in float64 in a fixed order, so the result is
        deterministic, and on the CPU independent of the number of threads. A weight of 0 times an
        infinite loss is NaN, as in IEEE arithmetic. Works in ``torch.compile`` with fullgraph,
        under ``torch.vmap`` (flattened to one call, one total a slice), with ``retain_graph`` and
        in CUDA graphs; under autocast logits are taken as they come. A CUDA graph of the backward
        pass alone multiplies in place what the forward pass has kept, at every replay once more:
        capture both passes, or backward with ``retain_graph=True``. Memory: the gradient is
        allocated by the forward pass, and ``logits`` need not stay alive. For float16 logits it is
        kept in float32 until backward brings the factor of a GradScaler.
        ``torch.func.grad`` does not work over PyTorch's registered custom operators.

    Example:
        >>> import torch
        >>> from als_ext.ops import weighted_loss
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]], requires_grad=True)
        >>> total, losses = weighted_loss(logits, torch.tensor([0, 2]), torch.tensor([0.5, 0.25]))
        >>> total.backward()
        >>> losses
        tensor([0.2395, 3.0949])
        >>> logits.grad
        tensor([[-0.1065,  0.0533,  0.0533],
                [ 0.0113,  0.2274, -0.2387]])
    """
    arguments = prepare(
        logits, target, loss, label_smoothing, ignore_index, class_weight, loss_parameters
    )
    if not (left_to_operator(weight) and left_to_operator(logits) and runs_eagerly()):
        _check_weight(weight, logits)
    need_grad = logits.requires_grad and torch.is_grad_enabled()
    accumulation = accumulation_dtype(logits)
    if weight.dtype != accumulation:
        _check_weight(weight, logits)
        weight = weight.to(accumulation)
    total: Tensor
    losses: Tensor
    try:
        total, losses, _ = _call(
            *arguments[:2],
            weight,
            *arguments[2:],
            [],
            need_grad,
            differentiable=need_grad or weight.requires_grad,
        )
    except RuntimeError:
        explain(arguments, loss)
        _check_weight(weight, logits)
        raise
    return total, losses


def _check_weight(weight: Tensor, logits: Tensor) -> None:
    check_tensor("weight", weight, shape=(logits.shape[0],), dtypes=FLOATS, like=logits)


@torch.library.register_fake("als_ext::weighted_loss")
def _fake(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    class_weight: Tensor | None,
    loss: int,
    parameters: Sequence[float],
    label_smoothing: float,
    ignore_index: int,
    batch: Sequence[int],
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], accumulation_dtype(logits)
    kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    return (
        logits.new_empty(batch, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows if need_grad else 0, logits.shape[1], dtype=kept),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, losses, grad = output
    # Losses are the callers' to change, but for a gradient to the weights.
    ctx.save_for_backward(losses if ctx.needs_input_grad[2] else None, grad)
    ctx.mark_non_differentiable(losses, grad)
    ctx.set_materialize_grads(False)
    ctx.inputs = inputs[0].dtype, inputs[8], inputs[9]


def _backward(ctx: Any, grad_total: Tensor | None, _: None, __: None) -> tuple[Tensor | None, ...]:
    if grad_total is None:
        return (None,) * 10
    if torch.is_grad_enabled():  # the kept gradient is a number: its derivative would be lost
        raise RuntimeError(
            "weighted_loss: the gradient has no derivative (create_graph=True); "
            "(weight * sample_loss(...)).sum() has one"
        )
    losses, grad = ctx.saved_tensors
    dtype, batch, need_grad = ctx.inputs
    needs = ctx.needs_input_grad
    grad_logits = grad_weight = None
    if needs[0]:
        if not need_grad:
            raise RuntimeError("weighted_loss: called with need_grad=False")
        # The kept tensor, unless it is needed again, becomes the result: nobody sees it. The factor
        # is looked at where it is: that of total.backward() is 1, and then nothing is multiplied.
        direct = getattr(ctx, "direct", False) and not batch and has_values(grad_total)
        if direct and grad.dtype is dtype:
            grad_logits = grad.clone() if _keeps_graph() else grad
            with torch._C._AutoDispatchBelowAutograd():
                torch.ops.als_ext.weighted_loss_scale_.default(grad_logits, grad_total)
            torch.autograd.graph.increment_version(grad_logits)
        else:
            grad_logits = _scaled(grad, grad_total, batch, dtype)
    if needs[2]:
        grad_weight = _scaled(losses, grad_total, batch, losses.dtype)
    return grad_logits, None, grad_weight, None, None, None, None, None, None, None


# Whether backward runs with retain_graph: then what forward has kept must stay as it is.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(rows: Tensor, factor: Tensor, batch: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Rows of each total times its factor, in ``dtype``; bfloat16 rows do not round the factor."""
    if not batch and rows.dtype is factor.dtype and has_values(factor):
        return torch.mul(rows, factor, out=rows.new_empty(rows.shape, dtype=dtype))  # one kernel
    totals = math.prod(batch)
    by_total = rows.reshape(totals, rows.shape[0] // totals, *rows.shape[1:])
    scaled = by_total * factor.reshape(totals, *(1,) * rows.dim())
    return scaled.to(dtype).reshape(rows.shape)


@torch.library.register_fake("als_ext::weighted_loss_scale_")
def _fake_scale(grad_logits: Tensor, factor: Tensor) -> None:
    return None


torch.library.register_autograd("als_ext::weighted_loss", _backward, setup_context=_setup_context)
_call = DirectCall(torch.ops.als_ext.weighted_loss.default, _setup_context, _backward)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    size = info.batch_size
    logits, target, weight = (flatten(args[i], in_dims[i], size) for i in range(3))
    *constants, batch, need_grad = args[3:]
    check_vmap(in_dims[3])
    need_grad = need_grad or (logits.requires_grad and torch.is_grad_enabled())
    total, losses, grad = torch.ops.als_ext.weighted_loss.default(
        logits, target, weight, *constants, [size, *batch], need_grad
    )
    grad_rows = grad.shape[0] // size
    return (
        total,
        losses.reshape(size, logits.shape[0] // size),
        grad.reshape(size, grad_rows, logits.shape[1]),
    ), (0, 0, 0)


torch.library.register_vmap("als_ext::weighted_loss", _vmap)
