"""The exact neighbour graph of a data set, and means over its neighbourhoods."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from als_ext.correction.rows import HERE, Rows

_BLOCK = 1 << 22  # elements looked at in one go: 16 MiB of float32


class Graph:
    """The k nearest neighbours of every row, the row itself left out.

    Args:
        x: [n, D] float32.
        k: neighbours, in [1, n - 1].
        metric: "cosine" or "l2".
        precision: "exact" or "fast", see :func:`als_ext.ops.knn`.
        rows: where the rows are; where they are spread, n is the number of those here, in all
            arguments and results, and neighbours are numbered over all of them.

    Attributes:
        distance: [n, k] float32, ascending.
        indices: [n, k] int64.
        rows: as given.
        first: number of the first row here.
        size: how many rows there are in all.
    """

    def __init__(self, x: Tensor, k: int, metric: str, precision: str, rows: Rows = HERE) -> None:
        self.rows = rows
        self.first, self.size = rows.span(len(x))
        self.distance, self.indices = rows.neighbours(x, k, metric, precision)
        self._at, self._fetch = rows.lookup(self.indices)

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
        fetched = self._fetch(values)
        for rows in self.blocks(k):
            near = self._at[rows, :k].contiguous()
            out[rows] = F.embedding_bag(near, fetched, mode="sum") + values[rows]
        return out

    def mean(self, values: Tensor, k: int) -> Tensor:
        """Mean of ``values`` [n, b] over each row and its k nearest neighbours, [n, b]."""
        return self.total(values, k).div_(k + 1)

    def alike(self, label: Tensor, k: int) -> float:
        """Share of the k nearest neighbours, over all rows, with the label of the row."""
        same = torch.zeros((), dtype=torch.int64, device=label.device)
        fetched = self._fetch(label)
        for rows in self.blocks(k):
            same += (fetched[self._at[rows, :k]] == label[rows, None]).sum()
        return int(self.rows.sum(same)) / (self.size * k)

    def unanimous(self, label: Tensor, voter: Tensor, k: int) -> Tensor:
        """Whether all k nearest neighbours of a row vote for its label, bool [n]."""
        out = torch.empty_like(label, dtype=torch.bool)
        fetched = self._fetch(voter)
        for rows in self.blocks(k):
            out[rows] = (fetched[self._at[rows, :k]] == label[rows, None]).all(dim=1)
        return out

    def votes(self, voter: Tensor, num_classes: int, k: int) -> Iterator[tuple[slice, Tensor]]:
        """How many of the k nearest neighbours of a row vote for each label.

        Args:
            voter: [n] int64; -1 does not vote.
            num_classes: C.
            k: neighbours that vote.

        Yields:
            Some rows, and int64 [rows, C].
        """
        fetched = self._fetch(voter)
        for rows in self.blocks(max(k, num_classes)):
            near = fetched[self._at[rows, :k]]
            row = torch.arange(near.shape[0], device=near.device)[:, None]
            cell = (row * num_classes + near)[near >= 0]
            count = torch.bincount(cell, minlength=near.shape[0] * num_classes)
            yield rows, count.view(near.shape[0], num_classes)
