"""What a correction says about each sample."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from als_ext.correction._pandas import pandas_for

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    *("suspect", "old_label", "new_label", "changed"),
    *("winner", "share", "margin", "log_odds"),
)
ArrayT = TypeVar("ArrayT", Tensor, NDArray[np.generic])


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CorrectionResult(Generic[ArrayT]):
    """The outcome of one correction of n samples, in the caller's library (torch or numpy).

    Attributes:
        suspect: [n] bool, whether the label was under suspicion.
        old_label: [n] int64, the label before.
        new_label: [n] int64, the label after.
        changed: [n] bool, ``new_label != old_label``.
        winner: [n] int64, the likeliest class after the last vote; with given suspects the class
            with the most votes. -1 where nobody voted.
        share: [n] float32 in [0, 1], the winner's share of the votes.
        margin: [n] float32 in [-1, 1], its lead over the best other class.
        log_odds: [n] float32, nats: evidence for the winner against the given label; positive
            speaks against the label. 0 where both are the same or nobody voted. Where votes alone
            decide it is they that speak, not the channel.
        neighbours: [n, k] int64, the nearest neighbours, voters or not, nearest first.
        distances: [n, k] float32, their distances as :func:`als_ext.ops.knn` gives them.
        channel: [C, C] float32, estimated P(given label = column | true label = row).
        guess: [n] int64, the first guess, which the votes started from; None with given suspects.
        k: neighbours asked in each vote.
        survival: estimated share of the given labels that are right, as far as regions are of one
            class; None with given suspects.
        threshold: the score from which on a sample is a suspect; None when the suspects do not come
            from a threshold.
    """

    suspect: ArrayT
    old_label: ArrayT
    new_label: ArrayT
    changed: ArrayT
    winner: ArrayT
    share: ArrayT
    margin: ArrayT
    log_odds: ArrayT
    neighbours: ArrayT
    distances: ArrayT
    channel: ArrayT
    guess: ArrayT | None
    k: int
    survival: float | None
    threshold: float | None

    def __len__(self) -> int:
        return int(self.old_label.shape[0])

    def __repr__(self) -> str:
        text = ", ".join(f"{key}={value}" for key, value in self.summary().items())
        return f"CorrectionResult({text})"

    def summary(self) -> dict[str, int | float | None]:
        """Counts: samples, suspects, changed; k; survival; threshold; mean share of relabels."""
        changed = int(self.changed.sum())
        return {
            "samples": len(self),
            "suspects": int(self.suspect.sum()),
            "changed": changed,
            "k": self.k,
            "survival": self.survival,
            "threshold": self.threshold,
            "mean_share_of_changed": float(self.share[self.changed].mean()) if changed else None,
        }

    def numpy(self) -> CorrectionResult[NDArray[np.generic]]:
        """The same result as numpy arrays, on the host."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.cpu().numpy()
        return CorrectionResult(**values)

    def to_pandas(self) -> pd.DataFrame:
        """One row a sample, without the neighbour lists.

        Raises:
            ImportError: pandas is not installed.
        """
        pd = pandas_for("CorrectionResult.to_pandas")
        host = self.numpy()
        return pd.DataFrame({name: getattr(host, name) for name in _COLUMNS}).rename_axis("sample")
