"""Deterministic stratified splits, and the whole numbers of samples they need."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["apportion", "stratified_split"]


def apportion(sizes: npt.NDArray[np.int64], rate: float) -> npt.NDArray[np.int64]:
    """Whole numbers near ``rate · sizes`` that add up to exactly ``round(rate · sum(sizes))``.

    Largest-remainder method (Hamilton): every group gets the floor of its share, the rest goes one
    by one to the largest fractional parts, ties to the lower group.

    Args:
        sizes: ``int64 [C]``, group sizes, at least 0.
        rate: share to take of every group, in [0, 1].

    Returns:
        ``int64 [C]``; each entry differs from ``rate · size`` by less than 1 and is at most
        ``size``.

    Example:
        >>> import numpy as np
        >>> from als_ext.data.splits import apportion
        >>> apportion(np.array([5, 5, 5]), 0.5)
        array([3, 3, 2])
    """
    shares = rate * sizes.astype(np.float64)
    counts = np.floor(shares).astype(np.int64)
    missing = round(rate * int(sizes.sum())) - int(counts.sum())
    # lexsort is stable: the first key that differs decides, so equal remainders go to the lower
    # group.
    order = np.lexsort((np.arange(len(sizes)), -(shares - counts)))
    counts[order[:missing]] += 1
    return counts


def stratified_split(
    labels: npt.NDArray[np.int64], test_fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split sample indices into train and test with the same class proportions in both.

    Args:
        labels: ``int64 [n]``, class indices, at least 0.
        test_fraction: share of every class that goes to the test part, in (0, 1).
        seed: seed of the generator that picks the test samples, at least 0.

    Returns:
        ``(train, test)``, ``int64`` indices in ascending order, disjoint, together all of
        ``0..n-1``.

    Raises:
        ValueError: one of the two parts would be empty.

    Example:
        >>> import numpy as np
        >>> from als_ext.data.splits import stratified_split
        >>> train, test = stratified_split(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
        >>> len(train), len(test)
        (6, 2)
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    # Stable sort by class of a random order: within each class the samples are in random order.
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    counts = apportion(sizes, test_fraction)
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(labels)) - np.repeat(starts, sizes)
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[order] = rank < np.repeat(counts, sizes)
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if len(train) == 0 or len(test) == 0:
        raise ValueError(
            f"labels: {len(labels)} samples split into {len(train)} for training and {len(test)} "
            f"for testing; expected at least one of each"
        )
    return train, test
