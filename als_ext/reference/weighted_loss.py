"""Reference of weighted_loss, in float64, differentiable by autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from als_ext.reference.sample_loss import sample_loss


def weighted_loss(
    logits: Tensor, target: Tensor, weight: Tensor, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """Total and losses [B] in float64; arguments of :func:`als_ext.ops.weighted_loss`."""
    losses = sample_loss(logits, target, **keywords)
    return (weight.double() * losses).sum(), losses
