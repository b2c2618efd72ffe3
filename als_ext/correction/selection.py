"""The choice of k: the vote that agrees most often with the labels it did not see."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from als_ext import ops


def usable_candidates(candidates: tuple[int, ...], n: int, num_classes: int) -> tuple[int, ...]:
    """Candidates not above n - 1 nor the mean class size; at least one.

    A vote of more neighbours than a class has members asks strangers.
    """
    limit = max(1, min(n - 1, n // num_classes))
    usable = sorted({k for k in candidates if k <= limit})
    return tuple(usable) if usable else (min(limit, min(candidates)),)


class SampleGraph(NamedTuple):
    """Neighbours of some rows among all rows, the row itself left out."""

    rows: Tensor  # [m] int64
    distance: Tensor  # [m, k] float32
    indices: Tensor  # [m, k] int64


def sample_graph(
    embeddings: Tensor, k: int, size: int, seed: int, metric: str, precision: str
) -> SampleGraph:
    """The k neighbours of ``size`` random rows; of all rows where there are no more."""
    n = embeddings.shape[0]
    if size >= n:
        rows = torch.arange(n, device=embeddings.device)
        distance, index = ops.knn(
            embeddings, embeddings, k, metric=metric, exclude_self=True, precision=precision
        )
        return SampleGraph(rows, distance, index)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(n, generator=generator)[:size].to(embeddings.device)
    distance, index = ops.knn(
        embeddings[rows], embeddings, k + 1, metric=metric, precision=precision
    )
    # Self to the end of its row, then off. Among more than k duplicates it may not be listed: then
    # the last neighbour goes.
    order = (index == rows[:, None]).long().argsort(dim=1, stable=True)[:, :k]
    return SampleGraph(rows, distance.gather(1, order), index.gather(1, order))


def choose_k(
    sample: SampleGraph,
    voter: Tensor,
    given: Tensor,
    num_classes: int,
    candidates: tuple[int, ...],
) -> int:
    """The candidate whose vote agrees most often with the given labels; ties: the smaller.

    For labels wrong independently of the neighbours, agreement grows with the accuracy of the
    vote, so no true label is needed.

    Args:
        sample: neighbours of some rows, at least as many as the largest candidate.
        voter: [n] int64, labels of those who vote, -1 for the others.
        given: [n] int64, the given labels.
        num_classes: number of classes.
        candidates: ascending.
    """
    if len(candidates) == 1:
        return candidates[0]
    own = given[sample.rows]
    agreement = [
        (
            ops.knn_vote(sample.distance[:, :k], sample.indices[:, :k], voter, num_classes)[0]
            == own
        ).sum()
        for k in candidates
    ]
    return candidates[int(torch.stack(agreement).argmax())]
