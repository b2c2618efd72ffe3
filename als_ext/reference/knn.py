"""Reference of knn: every distance in float64, a full sort."""

from __future__ import annotations

import torch
from torch import Tensor


def distances(query: Tensor, database: Tensor, *, metric: str = "l2") -> Tensor:
    """[Q, M] float32: float64 sums rounded once; NaN for a row with a NaN or an infinity."""
    x, y = query.double(), database.double()
    bad_x = ~x.isfinite().all(dim=1)
    bad_y = ~y.isfinite().all(dim=1)
    if metric == "ip":
        d = -(x[:, None] * y[None]).sum(dim=2)
    elif metric == "cosine":
        norm_x, norm_y = (x * x).sum(dim=1).sqrt(), (y * y).sum(dim=1).sqrt()
        unit_x = x * (1 / norm_x.where(norm_x > 0, 1))[:, None]
        unit_y = y * (1 / norm_y.where(norm_y > 0, 1))[:, None]
        d = 0.5 * (unit_x[:, None] - unit_y[None]).square().sum(dim=2)
        d = d.masked_fill((norm_x == 0)[:, None] | (norm_y == 0), 1.0)
    else:
        d = (x[:, None] - y[None]).square().sum(dim=2)
    return d.float().masked_fill(bad_x[:, None] | bad_y, float("nan"))


def knn(
    query: Tensor,
    database: Tensor,
    k: int,
    *,
    metric: str = "l2",
    exclude_self: bool = False,
    precision: str = "exact",
) -> tuple[Tensor, Tensor]:
    """k rows of smallest (distance, index); arguments and returns of :func:`als_ext.ops.knn`.

    ``precision`` changes nothing here.
    """
    step = max(1, (1 << 22) // max(1, database.numel()))
    parts: list[tuple[Tensor, Tensor]] = []
    for first in range(0, query.shape[0], step):
        d = distances(query[first : first + step], database, metric=metric)
        order = d.sort(dim=1, stable=True)  # NaN last; equal distances keep the order of the rows
        index = order.indices
        if exclude_self:
            own = torch.arange(first, first + d.shape[0], device=d.device)
            others = index != own[:, None]
            index = index[others].view(d.shape[0], -1)
        index = index[:, :k]
        parts.append((d.gather(1, index), index))
    if not parts:
        return query.new_empty(0, k, dtype=torch.float32), query.new_empty(0, k, dtype=torch.int64)
    return torch.cat([d for d, _ in parts]), torch.cat([index for _, index in parts])
