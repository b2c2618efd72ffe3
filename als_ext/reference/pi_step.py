"""Reference of the pi step, in float64, in the softmax form of its definition."""

from __future__ import annotations

import torch
from torch import Tensor


def pi_step(
    pi: Tensor,
    index: Tensor,
    loss: Tensor,
    *,
    lr: float = 1e-3,
    decay: float = 1e-2,
    prior: Tensor | None = None,
    temperature: float = 1.0,
    direction: str = "max",
) -> Tensor:
    """One step: ``pi`` [n] float64 -> the new ``pi`` [n].

    log pi_i <- (log pi_i + decay lr log prior_i + s lr g_i) / (1 + decay lr), then
    softmax(. / temperature), where g_i is the sum of the batch's finite losses of i and s is +1 for
    "max", -1 for "min". ``prior`` sums to 1; None is uniform.
    """
    n = pi.shape[0]
    log_prior = torch.full_like(pi, 1.0 / n).log() if prior is None else prior.double().log()
    loss = loss.double()
    gradient = torch.zeros_like(pi).index_add_(0, index, loss.where(loss.isfinite(), 0.0))
    sign = 1.0 if direction == "max" else -1.0
    logits = pi.log() + decay * lr * log_prior + sign * lr * gradient
    return torch.softmax(logits / (1.0 + decay * lr) / temperature, dim=0)
