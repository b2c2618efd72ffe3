"""Generalised cross entropy (Zhang, Sabuncu, NeurIPS 2018, arXiv 1805.07836)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from als_ext.methods import ERM
from als_ext.ops import sample_loss
from als_ext.ops._checks import check_float


@dataclass(frozen=True)
class GceSettings:
    """Settings of :class:`GCE`.

    Args:
        q: in (0, 1]: towards 0 the loss becomes cross entropy, 1 is the mean absolute error. 0.7
            is the source's.
    """

    q: float = 0.7

    def __post_init__(self) -> None:
        check_float("q", self.q, low=0.0, high=1.0, open_low=True)


class GCE(ERM, name="gce"):
    """The mean of (1 - p_y^q) / q over the batch: wrong labels, whose p_y stays low, pull less."""

    Settings = GceSettings

    def losses(self, logits: Tensor, label: Tensor) -> Tensor:
        """Generalised cross entropy, float32 [B]."""
        return sample_loss(logits, label, loss="gce", q=self.settings.q)
