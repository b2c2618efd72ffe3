"""also_step: the fused main and half step of ALSO over a list of parameters (private)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def also_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    bases: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    alpha: float = 1.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""Make the main step of iteration t and the half step of iteration t + 1 in one pass.

    .. math:: g = \nabla / s + \lambda\,\theta_{1/2}, \qquad
              \theta \leftarrow \mathrm{AdamStep}(\theta, g), \qquad
              \theta_{1/2} \leftarrow \mathrm{AdamStep}(\theta, \alpha g)

    ALSO, arXiv 2508.16734, "optimistic"; both steps advance the moments. Without ``bases`` it is
    one step of Adam (AdamW with ``decoupled_weight_decay``) on ``params``. The optimizer
    :class:`als_ext.ALSO` prepares the lists; nothing is checked here but what protects memory.

    Args:
        params: P tensors of any shape, dense without overlap, all float32, float64, bfloat16 or
            float16, on one device; :math:`\theta_{1/2}`, what the model holds. Changed.
        grads: like ``params``, :math:`\nabla`. Only read.
        exp_avgs: first moments; sizes and strides of ``params``, float32 (float64 for float64
            parameters), as all state. Changed.
        exp_avg_sqs: second moments. Changed.
        max_exp_avg_sqs: largest second moments (AMSGrad), or empty. Changed.
        bases: :math:`\theta`, or empty for no half step. Changed.
        steps: P tensors [] int64, the moment advances so far. Changed: + 2 (+ 1 without ``bases``).
        lr: step size of both steps, a number or a [] float tensor.
        betas: decay of the moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: :math:`\lambda`, >= 0; inside the gradient, taken at the half point.
        decoupled_weight_decay: AdamW's form instead: each step first shrinks its starting point
            by 1 - lr * weight_decay.
        alpha: factor of the gradient in the half step.
        grad_scale: [] or [1] float32, s, or None for 1.
        found_inf: [] or [1] float32; not 0: nothing changes at all.

    Raises:
        RuntimeError: lists that do not fit each other; parameters that require grad, with grad
            mode on.

    Note:
        No gradient. No host synchronisation on CUDA; may be captured in a CUDA graph (a number as
        ``lr`` is then fixed, a tensor is read at every replay). Deterministic. No memory beyond its
        arguments. Traffic: 36 bytes a float32 parameter, 28 without ``bases``.

    Example:
        >>> import torch
        >>> from als_ext.ops.also_step import also_step_
        >>> theta = torch.ones(3)
        >>> base, m, v = theta.clone(), torch.zeros(3), torch.zeros(3)
        >>> step = torch.zeros((), dtype=torch.int64)
        >>> also_step_([theta], [torch.ones(3)], [m], [v], [], [base], [step],
        ...            lr=0.1, betas=(0.9, 0.999), eps=1e-8)
        >>> base, theta, step
        (tensor([0.9000, 0.9000, 0.9000]), tensor([0.8000, 0.8000, 0.8000]), tensor(2))
    """
    if not params:
        return
    if torch.is_grad_enabled() and any(p.requires_grad for p in params):
        raise RuntimeError("params: a step on tensors that require grad needs torch.no_grad()")
    device = params[0].device
    lr_tensor = None
    if isinstance(lr, Tensor):
        lr_tensor, lr = lr.to(device, torch.float64, non_blocking=True), 0.0
    if grad_scale is not None:
        grad_scale = grad_scale.to(device, torch.float32, non_blocking=True)
    if found_inf is not None:
        found_inf = found_inf.to(device, torch.float32, non_blocking=True)
    torch.ops.als_ext.also_step_.default(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        bases,
        steps,
        lr_tensor,
        lr,
        betas[0],
        betas[1],
        eps,
        weight_decay,
        decoupled_weight_decay,
        alpha,
        grad_scale,
        found_inf,
    )
    # A graph recorded before the step must not be walked backward after it.
    torch.autograd.graph.increment_version(params)


@torch.library.register_fake("als_ext::also_step_")
def _fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    bases: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    alpha: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    return None
