"""The plurality of the given labels of the k nearest, and a k that needs no true label."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from als_ext import ops
from als_ext.ops._checks import check_choice, check_int

# A plurality needs the more neighbours, the more labels are wrong.
CANDIDATES = (10, 20, 50, 100, 200, 500)
_SAMPLES = 10_000  # rows on which k is chosen


class Plurality(NamedTuple):
    """What the neighbours of each sample call it."""

    winner: Tensor  # [n] int64
    share: Tensor  # [n] float32, of the votes
    margin: Tensor  # [n] float32, over the second class


def check_k(k: int | str, rows: int | None = None) -> None:
    """Check a number of neighbours: "auto" or an int in [1, rows]."""
    if isinstance(k, str):
        check_choice("k", k, ("auto",))
    else:
        check_int("k", k, low=1, high=rows)


def choose_k(x: Tensor, label: Tensor, num_classes: int, k: int | str, metric: str) -> int:
    """The k itself; for "auto" the candidate whose vote agrees most often with the labels.

    Each sample's own label is left out of its vote, so for labels that are wrong independently of
    the neighbours the agreement grows with the accuracy of the vote. Candidates above the mean
    class size ask strangers and are left out. Ties go to the smaller k.

    Args:
        x: [n, D] float32.
        label: int64 [n] on the same device.
        num_classes: number of classes.
        k: an int or "auto".
        metric: "l2" or "cosine".
    """
    if not isinstance(k, str):
        return k
    n = len(label)
    limit = max(1, min(n - 1, n // num_classes))
    candidates = [c for c in CANDIDATES if c <= limit] or [limit]
    rows = torch.arange(n)
    if n > _SAMPLES:
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:_SAMPLES]
    rows = rows.to(x.device)
    distance, index = ops.knn(x[rows], x, candidates[-1] + 1, metric=metric)
    index = index.masked_fill(index == rows[:, None], -1)  # no vote about itself
    own = label[rows]
    agreement = [
        (ops.knn_vote(distance[:, : c + 1], index[:, : c + 1], label, num_classes)[0] == own).sum()
        for c in candidates
    ]
    return candidates[int(torch.stack(agreement).argmax())]


def plurality(x: Tensor, label: Tensor, num_classes: int, k: int | str, metric: str) -> Plurality:
    """The vote of the k nearest neighbours of every sample, itself left out.

    Args:
        x: [n, D] float32.
        label: int64 [n] on the same device.
        num_classes: number of classes.
        k: neighbours in [1, n - 1], or "auto".
        metric: "l2" or "cosine".
    """
    k = choose_k(x, label, num_classes, k, metric)
    distance, index = ops.knn(x, x, k, metric=metric, exclude_self=True)
    return Plurality(*ops.knn_vote(distance, index, label, num_classes))
