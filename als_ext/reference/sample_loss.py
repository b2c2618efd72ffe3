"""Reference of sample_loss, in float64, differentiable by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def sample_loss(
    logits: Tensor,
    target: Tensor,
    *,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    **parameters: Any,
) -> Tensor:
    """Losses [B] float64; arguments of :func:`als_ext.ops.sample_loss`, every parameter given."""
    z = logits.double()
    if loss == "squared_error":
        squares = (z - target.double()).square()
        return squares if z.dim() == 1 else squares.mean(dim=1)
    classes = z.shape[1]
    w = z.new_ones(classes) if class_weight is None else class_weight.double()
    log_p = z.log_softmax(dim=1)
    if target.is_floating_point():
        t = (1 - label_smoothing) * target.double() + label_smoothing / classes
        return cross_entropy(w * t, log_p)

    ignored = target == ignore_index
    valid = (target >= 0) & (target < classes)
    y = target.where(valid & ~ignored, 0)
    hit = one_hot(y, classes).double()
    if loss == "cross_entropy":
        q = (1 - label_smoothing) * hit + label_smoothing / classes
        losses = cross_entropy(w * q, log_p)
    else:
        losses = w[y] * robust_loss(loss, log_p, hit, **parameters)
    losses = losses.masked_fill(~valid, float("nan"))
    return torch.where(ignored, 0.0, losses)


def cross_entropy(q: Tensor, log_p: Tensor) -> Tensor:
    """Sum of -q log p over the classes, in which q = 0 adds nothing."""
    return -(q * log_p.where(q != 0, 0.0)).sum(dim=1)


def robust_loss(loss: str, log_p: Tensor, hit: Tensor, **parameters: Any) -> Tensor:
    """Losses [B] of class indices: log_p [B, C] log probabilities, hit [B, C] one-hot classes."""
    p = log_p.exp()
    log_p_y = -cross_entropy(hit, log_p)
    if loss == "gce":
        q = float(parameters["q"])
        return -torch.expm1(q * log_p_y) / q
    if loss == "sce":
        alpha, beta, log_zero = (float(parameters[name]) for name in ("alpha", "beta", "A"))
        return -alpha * log_p_y - beta * (p * log_zero * (1 - hit)).sum(dim=1)
    if loss == "mae":
        return (p - hit).abs().sum(dim=1)
    if loss == "focal":
        gamma = float(parameters["gamma"])
        miss = (p * (1 - hit)).sum(dim=1)
        power = torch.where(miss > 0, miss.where(miss > 0, 1.0) ** gamma, float(gamma == 0))
        return -power * log_p_y
    if loss == "bootstrap":
        beta = float(parameters["beta"])
        if parameters["kind"] == "hard":
            other = one_hot(log_p.argmax(dim=1), log_p.shape[1]).double()
        else:
            other = p
        return cross_entropy(beta * hit, log_p) + cross_entropy((1 - beta) * other, log_p)
    raise ValueError(f"loss: expected a loss of class indices, got {loss!r}")
