"""Relabel everyone by the neighbours' vote: als-lc without suspects and without pi."""

from __future__ import annotations

from torch import Tensor

from als_ext.baselines._plurality import plurality
from als_ext.correction import CorrectionResult
from als_ext.methods import ERM, Correcting, Task


class KnnRelabel(Correcting, ERM, name="knn-relabel"):
    """Plain training; at als-lc's epochs EVERY sample gets the plurality label of its k neighbours.

    The neighbours are those of the penultimate embedding, with the metric and the choice of k of
    ``config.correction``, and vote with the given labels. The ablation of the project's method: no
    suspects, no trusted voters, no pi.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._given = task.labels.clone()

    def correction(self, epoch: int) -> CorrectionResult[Tensor]:
        """The vote of all about all."""
        task, x = self.task, self.task.embeddings()
        given, current = self._given.to(x.device), task.labels.to(x.device)
        return plurality(x, given, current, task.num_classes, task.config.correction)
