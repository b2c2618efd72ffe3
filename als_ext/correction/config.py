"""Settings of label correction, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from als_ext.ops._checks import check_choice, check_float, check_int

METRICS = ("cosine", "l2")
PRECISIONS = ("exact", "fast")
_VOTERS = 20
_LOCAL = 16


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """How :func:`correct_labels` and :class:`LabelCorrector` decide.

    Args:
        k: neighbours that vote, >= 1, or "auto": 20, fewer where classes are small.
        suspects: "auto": samples whose neighbours, the noise channel and the score together find
            another label likelier. "score": samples above Otsu's threshold of the scores. A number
            q in (0, 1): the share q of samples with the highest scores.
        voters: "trusted": all samples, but for suspects by score. "all": every sample.
        metric: "cosine" or "l2", the distance between embeddings.
        region: neighbours that, with the sample, make the region in which labels are counted for
            the first guess, >= 1.
        spread: neighbours over which the likelihood of the regions is averaged, in this order; each
            >= 1, at least one. The last ones are left out where that predicts hidden labels better.
        rounds: votes after the first guess, >= 1; each votes with the labels of the one before.
        min_share: a relabel needs at least this share of the votes, in [0, 1].
        min_margin: a relabel needs at least this lead over the best other class, in [-1, 1];
            Bayes' rule can prefer a class with fewer votes.
        vote_smoothing: added to every share before two are compared, > 0: the neighbours never
            speak for a label by more than 1 : vote_smoothing.
        score_limit: the most, in nats, that a high score may add to the case against a label,
            >= 0. At 0 a score can only vouch for a label. Above 0 more wrong labels are found where
            the neighbours know little, and more hard but right ones are lost where they know much.
        stop_share: :attr:`LabelCorrector.converged` once a step changes less than this share of the
            labels; the Trainer then makes no more.
        precision: "exact" or "fast", see :func:`als_ext.ops.knn`.

    Raises:
        TypeError: a field of another type.
        ValueError: a field out of range.

    Example:
        >>> CorrectionConfig(k=20, suspects="score").k
        20
    """

    k: int | str = "auto"
    suspects: str | float = "auto"
    voters: str = "trusted"
    metric: str = "cosine"
    region: int = 30
    spread: tuple[int, ...] = (5, 20, 20, 50, 50)
    rounds: int = 6
    min_share: float = 0.0
    min_margin: float = -1.0
    vote_smoothing: float = 1e-3
    score_limit: float = 0.0
    stop_share: float = 5e-3
    precision: str = "exact"

    def __post_init__(self) -> None:
        if self.k != "auto":
            if isinstance(self.k, str):
                raise ValueError(f"k: expected 'auto' or an int >= 1, got {self.k!r}")
            check_int("k", self.k, low=1)
        check_int("region", self.region, low=1)
        if not isinstance(self.spread, tuple) or not self.spread:
            raise TypeError(f"spread: expected a non-empty tuple, got {self.spread!r}")
        for hop in self.spread:
            check_int("spread", hop, low=1)
        if isinstance(self.suspects, str):
            check_choice("suspects", self.suspects, ("auto", "score"))
        else:
            check_float("suspects", self.suspects, low=0.0, high=1.0, open_low=True)
            if self.suspects == 1:
                raise ValueError("suspects: expected a share below 1 (someone must vote), got 1")
        check_choice("voters", self.voters, ("trusted", "all"))
        check_choice("metric", self.metric, METRICS)
        check_int("rounds", self.rounds, low=1)
        check_float("min_share", self.min_share, low=0.0, high=1.0)
        check_float("min_margin", self.min_margin, low=-1.0, high=1.0)
        check_float("vote_smoothing", self.vote_smoothing, low=0.0, high=1.0, open_low=True)
        check_float("score_limit", self.score_limit, low=0.0)
        check_float("stop_share", self.stop_share, low=0.0, high=1.0)
        check_choice("precision", self.precision, PRECISIONS)


def local_neighbours(n: int, num_classes: int) -> int:
    """Neighbours that are mostly of one class and near: a sixteenth of the mean class size."""
    return max(1, min(n - 1, n // (_LOCAL * num_classes)))


def neighbours_that_vote(k: int | str, n: int, num_classes: int) -> int:
    """The k of n samples.

    Raises:
        ValueError: more than the n - 1 others.
    """
    if isinstance(k, str):
        return min(_VOTERS, local_neighbours(n, num_classes))
    if k > n - 1:
        raise ValueError(f"k: expected in [1, {n - 1}] (the other rows), got {k}")
    return k


def neighbourhoods(
    region: int, spread: tuple[int, ...], n: int, num_classes: int
) -> tuple[int, tuple[int, ...]]:
    """``region`` and ``spread``, made smaller where classes are small."""
    limit = local_neighbours(n, num_classes)
    return min(region, limit), tuple(min(hop, limit) for hop in spread)
