"""Settings of label correction, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from als_ext.ops._checks import check_choice, check_float, check_int

METRICS = ("cosine", "l2")
PRECISIONS = ("exact", "fast")


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """How :func:`correct_labels` and :class:`LabelCorrector` decide.

    Args:
        k: neighbours that vote, >= 1, or "auto": the candidate whose vote agrees most often with
            the given labels (leave-one-out), chosen anew for each vote.
        k_candidates: what "auto" chooses from; those above n - 1 or above the mean class size
            n / num_classes are left out.
        suspects: "auto": samples whose neighbours, the noise channel and the score together give
            their label less than an even chance. "score": samples above Otsu's threshold of the
            scores. A number q in (0, 1): the share q of samples with the highest scores.
        voters: "trusted": samples that are not suspects. "all": every sample.
        metric: "cosine" or "l2", the distance between embeddings.
        rounds: votes of trusted voters after the first vote of all, >= 1. Suspects are found anew
            after each but the last; only ``suspects="auto"`` uses more than one.
        min_share: a relabel needs at least this share of the votes, in [0, 1].
        min_margin: a relabel needs at least this lead over the second class, in [0, 1].
        vote_smoothing: added to every share before two are compared, > 0: the neighbours never
            speak for a label by more than 1 : vote_smoothing.
        score_limit: the most, in nats, that a high score may add to the case against a label,
            >= 0. At 0 a score can only vouch for a label. Above 0 more wrong labels are found where
            the neighbours know little, and more hard but right ones are lost where they know much.
        selection_size: number of samples on which k is chosen, >= 1.
        stop_share: :attr:`LabelCorrector.converged` once a step changes less than this share of the
            labels; the Trainer then makes no more.
        precision: "exact" or "fast", see :func:`als_ext.ops.knn`.
        seed: of the sample on which k is chosen, >= 0.

    Raises:
        TypeError: a field of another type.
        ValueError: a field out of range.

    Example:
        >>> CorrectionConfig(k=20, suspects="score").k
        20
    """

    k: int | str = "auto"
    k_candidates: tuple[int, ...] = (20, 50, 100, 200, 500)
    suspects: str | float = "auto"
    voters: str = "trusted"
    metric: str = "cosine"
    rounds: int = 2
    min_share: float = 0.0
    min_margin: float = 0.0
    vote_smoothing: float = 1e-3
    score_limit: float = 0.0
    selection_size: int = 10_000
    stop_share: float = 5e-3
    precision: str = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k != "auto":
            if isinstance(self.k, str):
                raise ValueError(f"k: expected 'auto' or an int >= 1, got {self.k!r}")
            check_int("k", self.k, low=1)
        if not isinstance(self.k_candidates, tuple) or not self.k_candidates:
            raise TypeError(f"k_candidates: expected a non-empty tuple, got {self.k_candidates!r}")
        for candidate in self.k_candidates:
            check_int("k_candidates", candidate, low=1)
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
        check_float("min_margin", self.min_margin, low=0.0, high=1.0)
        check_float("vote_smoothing", self.vote_smoothing, low=0.0, high=1.0, open_low=True)
        check_float("score_limit", self.score_limit, low=0.0)
        check_int("selection_size", self.selection_size, low=1)
        check_float("stop_share", self.stop_share, low=0.0, high=1.0)
        check_choice("precision", self.precision, PRECISIONS)
        check_int("seed", self.seed, low=0)
