"""Relabel random samples: the control of als-lc's choice of suspects."""

from __future__ import annotations

import torch
from torch import Tensor

from als_ext import ops
from als_ext.correction.correct import correct
from als_ext.methods import Also, Correcting, Relabels, Task
from als_ext.runtime import derived_seed


class RandomRelabel(Correcting, Also, name="random-relabel"):
    """als-lc, but as many RANDOM samples are relabelled as it would suspect.

    Each correction makes als-lc's; then its suspects are forgotten but for their number s, and the
    first s samples of an order drawn once from the seed get the plurality of what its correction
    calls their neighbours. What als-lc gains over this is owed to whom it suspects.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._given = task.labels.clone()
        generator = torch.Generator().manual_seed(derived_seed(task.config.seed, "suspects"))
        self._rank = torch.randperm(len(task.labels), generator=generator)

    def relabels(self, epoch: int) -> Relabels:
        """The vote of als-lc's neighbours about random suspects."""
        task, x = self.task, self.task.embeddings()
        given, current = self._given.to(x.device), task.labels.to(x.device)
        scores = self.scores().double()
        found = correct(x, given, current, scores, task.num_classes, task.config.correction)
        suspect = self._rank.to(x.device) < found.suspect.sum()
        winner, share, margin = ops.knn_vote(
            found.distances, found.neighbours, found.new_label, task.num_classes
        )
        label = torch.where(suspect, winner, given)
        return Relabels(label, suspect, share, margin, found.neighbours)

    def relabelled(self, index: Tensor) -> None:
        """As als-lc does."""
        self.optimizer.weights.reset_(index)
