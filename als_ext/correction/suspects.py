"""Which labels to doubt: the noise channel, evidence from scores, thresholds."""

from __future__ import annotations

import torch
from torch import Tensor

from als_ext.correction.rows import HERE, Rows

_ENOUGH = 100  # samples, to estimate a row of the channel by
_BINS = 50
_SAMPLES_PER_BIN = 100  # fewer, and the measured rate of a bin is mostly chance


def noise_channel(
    label: Tensor,
    given: Tensor,
    num_classes: int,
    sure: Tensor | None = None,
    rows: Rows = HERE,
) -> Tensor:
    """Estimate P(given label = column | true label = row), ``label`` standing for the truth.

    The confusion of the two, rows normalised; 1 / num_classes is added to each count, so that a
    class without samples gets a flat row. Where classes overlap ``label`` is often wrong, which
    looks like noise between them: rows of classes with 100 samples that are ``sure``, bool [n], are
    taken from these alone.
    """

    def confusion(label: Tensor, given: Tensor) -> Tensor:
        cell = label * num_classes + given
        count = rows.sum(torch.bincount(cell, minlength=num_classes**2))
        return count.view(num_classes, num_classes)

    count = confusion(label, given)
    if sure is not None:
        certain = confusion(label[sure], given[sure])
        count = torch.where(certain.sum(dim=1, keepdim=True) >= _ENOUGH, certain, count)
    smooth = count.double() + 1.0 / num_classes
    return smooth / smooth.sum(dim=1, keepdim=True)


class ScoreBins:
    """What a score is worth as evidence against a label: measured, not assumed.

    In bins of equal counts, the rate at which the neighbours contradict the label, against the rate
    of all. With limit 0 a score can only vouch for a label, never condemn it: a high loss also
    marks hard samples, which neighbours get wrong too.

    Args:
        score: [n] float64, finite; the higher, the more suspect. Only its order counts.
        applies: [n] bool, samples whose score belongs to the label in question.
        rows: where the rows are.
    """

    def __init__(self, score: Tensor, applies: Tensor, rows: Rows = HERE) -> None:
        ordered = rows.everywhere(score)[rows.everywhere(applies)].sort().values
        self._n = n = ordered.numel()
        self._bins = bins = max(1, min(_BINS, n // _SAMPLES_PER_BIN))
        self._applies, self._rows = applies, rows
        edge = ordered[torch.arange(1, bins, device=score.device) * n // bins]
        # Equal scores share a bin.
        self._which = torch.searchsorted(edge, score[applies], right=True)

    def evidence(self, disagrees: Tensor, limit: float) -> Tensor:
        """Log-likelihood ratio (nats, float64) of "the label is wrong" given the score.

        Args:
            disagrees: [n] bool, whether the vote contradicts the label.
            limit: upper bound of the result, >= 0.

        Returns:
            [n]; 0 where the score does not apply, and everywhere if there are too few.
        """
        out = torch.zeros_like(disagrees, dtype=torch.float64)
        if self._bins < 2:
            return out
        total = self._count(self._which)
        count = self._count(self._which[disagrees[self._applies]])
        base = (count.sum() / self._n).clamp(1.0 / self._n, 1.0 - 1.0 / self._n)
        rate = (count + base) / (total + 1.0)  # an empty bin says nothing
        ratio = (rate.logit() - base.logit()).clamp_max(limit)
        out[self._applies] = ratio[self._which]
        return out

    def _count(self, which: Tensor) -> Tensor:
        return self._rows.sum(torch.bincount(which, minlength=self._bins)).double()


def score_threshold(score: Tensor, suspects: str | float) -> float:
    """The score from which on a sample is a suspect: Otsu's, or that of the highest share."""
    if isinstance(suspects, str):
        return _otsu_threshold(score)
    n = score.numel()
    top = max(1, round(suspects * n))
    return float(score.sort().values[n - top])


def _otsu_threshold(score: Tensor) -> float:
    """The score from which on a sample is in the upper of two groups (Otsu, 1979).

    Splits where the variance between the groups is largest; inf when all scores are equal.
    """
    s = score.cpu().sort().values  # torch has no deterministic float cumsum on CUDA
    n = s.numel()
    below = torch.arange(1, n, dtype=torch.float64)
    partial = (s - s.mean()).cumsum(0)[:-1]  # sum below the split, around the mean
    between = partial.square() / (below * (n - below))
    between = between.masked_fill(s[1:] == s[:-1], -1.0)  # equal scores are not parted
    if n < 2 or bool((between < 0).all()):
        return float("inf")
    return float(s[int(between.argmax()) + 1])
