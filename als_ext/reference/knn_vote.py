"""Reference of knn_vote, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def knn_vote(
    distance: Tensor,
    index: Tensor,
    label: Tensor,
    num_classes: int,
    *,
    weighting: str = "uniform",
    temperature: float = 0.1,
    ignore_label: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted plurality of labels; arguments and returns of :func:`als_ext.ops.knn_vote`."""
    d = distance.double()
    votes_at_all = (index >= 0) & (index < label.shape[0])
    neighbour = torch.full_like(index, ignore_label)
    neighbour[votes_at_all] = label[index[votes_at_all]]
    voter = (neighbour >= 0) & (neighbour < num_classes) & (neighbour != ignore_label)
    voter &= ~d.isnan()
    d_min = d.masked_fill(~voter, float("inf")).amin(dim=1, keepdim=True) if d.shape[1] else d
    if weighting == "uniform":
        weight = torch.ones_like(d)
    elif weighting == "distance":
        d, d_min = d.clamp_min(0), d_min.clamp_min(0)
        weight = torch.where(d <= d_min, 1.0, d_min / d)
    else:
        weight = torch.where(d <= d_min, 1.0, (-(d - d_min) / temperature).exp())
    weight = weight.masked_fill(~voter, 0.0)
    votes = torch.zeros(d.shape[0], num_classes, dtype=torch.float64, device=d.device)
    votes.scatter_add_(1, neighbour.masked_fill(~voter, 0), weight)
    total = votes.sum(dim=1)
    best, winner = votes.max(dim=1)
    second = votes.topk(2, dim=1).values[:, 1] if num_classes > 1 else torch.zeros_like(best)
    empty = total == 0
    scale = torch.where(empty, 1.0, total)
    return (
        winner.masked_fill(empty, ignore_label),
        (best / scale).float(),
        ((best - second) / scale).float(),
    )
