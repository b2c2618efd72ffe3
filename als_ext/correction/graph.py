"""The exact neighbour graph of a data set, and means over its neighbourhoods."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from als_ext import ops

_BLOCK = 1 << 22  # elements looked at in one go: 16 MiB of float32


class Graph:
    """The k nearest neighbours of every row, the row itself left out.

    Args:
        x: [n, D] float32.
        k: neighbours, in [1, n - 1].
        metric: "cosine" or "l2".
        precision: "exact" or "fast", see :func:`als_ext.ops.knn`.

    Attributes:
        distance: [n, k] float32, ascending.
        indices: [n, k] int64.
    """

    def __init__(self, x: Tensor, k: int, metric: str, precision: str) -> None:
        self.distance, self.indices = ops.knn(
            x, x, k, metric=metric, exclude_self=True, precision=precision
        )

    def __len__(self) -> int:
        return self.indices.shape[0]

    def blocks(self, width: int) -> Iterator[slice]:
        """Rows in pieces such that ``width`` numbers a row stay few."""
        step = max(1, _BLOCK // max(1, width))
        for start in range(0, len(self), step):
            yield slice(start, start + step)

    def total(self, values: Tensor, k: int) -> Tensor:
        """Sum of ``values`` [n, b] over each row and its k nearest neighbours, [n, b]."""
        out = torch.empty_like(values)
        for rows in self.blocks(k):
            near = self.indices[rows, :k].contiguous()
            out[rows] = F.embedding_bag(near, values, mode="sum") + values[rows]
        return out

    def mean(self, values: Tensor, k: int) -> Tensor:
        """Mean of ``values`` [n, b] over each row and its k nearest neighbours, [n, b]."""
        return self.total(values, k).div_(k + 1)

    def alike(self, label: Tensor, k: int) -> float:
        """Share of the k nearest neighbours, over all rows, with the label of the row."""
        same = torch.zeros((), dtype=torch.int64, device=label.device)
        for rows in self.blocks(k):
            same += (label[self.indices[rows, :k]] == label[rows, None]).sum()
        return int(same) / (len(self) * k)

    def unanimous(self, label: Tensor, voter: Tensor, k: int) -> Tensor:
        """Whether all k nearest neighbours of a row vote for its label, bool [n]."""
        out = torch.empty_like(label, dtype=torch.bool)
        for rows in self.blocks(k):
            out[rows] = (voter[self.indices[rows, :k]] == label[rows, None]).all(dim=1)
        return out

    def votes(self, rows: slice, label: Tensor, num_classes: int, k: int) -> Tensor:
        """How many of the k nearest neighbours of these rows have each label, int64 [rows, C].

        A label of -1 does not vote.
        """
        near = label[self.indices[rows, :k]]
        row = torch.arange(near.shape[0], device=near.device)[:, None]
        cell = (row * num_classes + near)[near >= 0]
        count = torch.bincount(cell, minlength=near.shape[0] * num_classes)
        return count.view(near.shape[0], num_classes)
