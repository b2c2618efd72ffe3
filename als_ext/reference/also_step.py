"""Reference of also_step: one parameter, in float64, the two steps written one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class AlsoState:
    """State of one parameter: the point ALSO stands on and Adam's moments there."""

    base: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor
    step: int = 0

    @classmethod
    def start(cls, param: Tensor) -> AlsoState:
        """The state before the first iteration."""
        base = param.detach().double()
        zero = torch.zeros_like(base)
        return cls(base, zero, zero, zero)


def adam_step(
    state: AlsoState,
    point: Tensor,
    g: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    amsgrad: bool,
) -> Tensor:
    """Advance the moments with g; return ``point`` after one step of Adam (``decay``: AdamW's)."""
    state.step += 1
    state.exp_avg = betas[0] * state.exp_avg + (1 - betas[0]) * g
    state.exp_avg_sq = betas[1] * state.exp_avg_sq + (1 - betas[1]) * g * g
    state.max_exp_avg_sq = torch.maximum(state.max_exp_avg_sq, state.exp_avg_sq)
    second_moment = state.max_exp_avg_sq if amsgrad else state.exp_avg_sq
    m_hat = state.exp_avg / (1 - betas[0] ** state.step)
    v_hat = second_moment / (1 - betas[1] ** state.step)
    return (1 - lr * decay) * point - lr * m_hat / (v_hat.sqrt() + eps)


def also_step(
    param: Tensor,
    grad: Tensor,
    state: AlsoState,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    amsgrad: bool = False,
    alpha: float = 1.0,
    half_step: bool = True,
) -> Tensor:
    """Move ``state`` by a main step; return the next half point, or the new base without one."""
    g = grad.double()
    if not decoupled_weight_decay:
        g = g + weight_decay * param.double()
    decay = weight_decay if decoupled_weight_decay else 0.0

    def move(point: Tensor, g: Tensor) -> Tensor:
        return adam_step(state, point, g, lr=lr, betas=betas, eps=eps, decay=decay, amsgrad=amsgrad)

    state.base = move(state.base, g)
    return move(state.base, alpha * g) if half_step else state.base
