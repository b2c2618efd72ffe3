"""What several races need: batches of logits, their ceilings, and errors against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

COPY = "copy of the same bytes"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMIT = {"float32": 2e-6, "bfloat16": 2**-8}  # bfloat16: gradients are rounded once


def batch(
    rows: int, classes: int, dtype: str, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a network that has learnt a little, targets, weights around 1."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, classes, generator=g) * 3).to(DTYPES[dtype]).to(device)
    target = torch.randint(0, classes, (rows,), generator=g).to(device)
    return logits, target, torch.rand(rows, generator=g).add(0.5).to(device)


def some_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of a batch: what float64 arithmetic keeps of a whole one may not fit."""
    return zip(*(t.detach().split(1024) for t in tensors), strict=True)


def copy_of(moved: int, device: torch.device) -> Callable[[], Any]:
    """A copy that moves ``moved`` bytes: reads half of them and writes as many, both in place."""
    elements = max(1, moved // 8)
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def deviation(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    """Largest error of losses (relative to 1 + loss) and gradients (to the row's largest)."""
    loss = ((got[0] - want[0]).abs() / (1 + want[0].abs())).max()
    scale = want[1].abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    return max(loss.item(), ((got[1] - want[1]).abs() / scale).max().item())
