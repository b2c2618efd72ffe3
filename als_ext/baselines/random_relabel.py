"""Relabel random samples: the control of als-lc's choice of suspects."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from als_ext.correction import CorrectionResult
from als_ext.correction.correct import correct
from als_ext.methods import Also, Correcting, Task
from als_ext.runtime import derived_seed


class RandomRelabel(Correcting, Also, name="random-relabel"):
    """als-lc, but as many RANDOM samples are relabelled as it would suspect, by the same vote.

    Each correction finds als-lc's suspects, trusted voters and k; then the suspects are forgotten
    but for their number s, and the first s samples of an order drawn once from the seed get what
    the trusted voters near them say. What als-lc gains over this is owed to whom it suspects.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._given = task.labels.clone()
        generator = torch.Generator().manual_seed(derived_seed(task.config.seed, "suspects"))
        self._rank = torch.randperm(len(task.labels), generator=generator)

    def correction(self, epoch: int) -> CorrectionResult[Tensor]:
        """A correction of random suspects."""
        task, x = self.task, self.task.embeddings()
        given, current = self._given.to(x.device), task.labels.to(x.device)
        scores = self.scores().double()
        found = correct(x, given, current, scores, task.num_classes, task.config.correction)
        suspect = self._rank.to(x.device) < found.suspect.sum()
        new = torch.where(suspect & (found.winner >= 0), found.winner, given)
        changed = new != current
        self.optimizer.weights.reset_(changed.nonzero()[:, 0])
        return replace(found, suspect=suspect, new_label=new, changed=changed)
