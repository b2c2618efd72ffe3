"""What several races need: batches of logits, their ceilings, and errors against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.race import Counts

COPY = "copy of the same bytes"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMIT = {"float32": 2e-6, "bfloat16": 2**-8}  # bfloat16: gradients are rounded once
BLOCK = 1 << 26  # logits that the float64 reference takes at a time
FLOPS_A_LOGIT = 8  # of a loss with its gradient: subtract, exp, add; again, divide, scale

Block = tuple[slice, Tensor, Tensor]  # rows, their losses, their gradients


def batch(
    rows: int, classes: int, dtype: str, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a network that has learnt a little, targets, weights around 1."""
    g = torch.Generator(device).manual_seed(0)
    place: dict[str, Any] = {"generator": g, "device": device}
    logits = torch.randn(rows, classes, **place).mul_(3).to(DTYPES[dtype])
    target = torch.randint(0, classes, (rows,), **place)
    return logits, target, torch.rand(rows, **place).add(0.5)


def counts(rows: int, classes: int, dtype: str, passes: int) -> Counts:
    """Of ``passes`` over the logits, reads and writes, and what is one number a row."""
    moved = rows * classes * DTYPES[dtype].itemsize * passes + rows * (8 + 4 + 4)
    return Counts(moved, FLOPS_A_LOGIT * rows * classes)


def copy_of(moved: int, device: torch.device) -> Callable[[], Any]:
    """A copy that moves ``moved`` bytes: reads half of them and writes as many, both in place."""
    elements = max(1, moved // 8)
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def exact(
    loss: Callable[..., Tensor], logits: Tensor, target: Tensor, weight: Tensor
) -> Callable[[], Iterator[Block]]:
    """Losses and gradients of their weighted sum in float64, a block of rows at a time."""
    step = max(1, BLOCK // logits.shape[1])

    def block(first: int) -> Block:
        some = slice(first, first + step)
        z = logits[some].detach().double().requires_grad_()
        losses = loss(z, target[some])
        return some, losses.detach(), torch.autograd.grad(losses, z, weight[some].double())[0]

    starts = range(0, logits.shape[0], step)
    if len(starts) == 1:
        once = [block(0)]
        return lambda: iter(once)
    return lambda: map(block, starts)


def deviation(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    """Largest error of losses (relative to 1 + loss) and gradients (to the row's largest)."""
    loss = ((got[0] - want[0]).abs() / (1 + want[0].abs())).max()
    scale = want[1].abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    return _largest(loss, ((got[1] - want[1]).abs() / scale).max())


def losses_off(got: tuple[Tensor, Tensor], want: Iterator[Block]) -> float:
    """:func:`deviation` of losses and gradients from :func:`exact`."""
    parts = [deviation((got[0][some], got[1][some]), (v, slope)) for some, v, slope in want]
    return _largest(*map(torch.tensor, parts))


def total_off(got: tuple[Tensor, Tensor], weight: Tensor, want: Iterator[Block]) -> float:
    """:func:`deviation` of the weighted sum and its gradients from :func:`exact`."""
    total, parts = 0.0, []
    for some, values, slope in want:
        total += (weight[some] * values).sum().item()
        parts.append(deviation((values, got[1][some]), (values, slope)))
    parts.append(abs(got[0].item() - total) / (1 + abs(total)))
    return _largest(*map(torch.tensor, parts))


def _largest(*errors: Tensor) -> float:
    """The largest, and NaN where one is NaN: Python's max would forget it."""
    return torch.stack([error.double() for error in errors]).max().item()
