"""als-lc and als-lc with one part left out at a time, beside each other by ``als-ext compare``.

    python bench/ablation.py --out DIR --data-dir DIR --dataset mnist --noise symmetric:0.8

Takes the options of ``als-ext compare`` but ``--method``, trains every variant, and writes what
that command writes. A variant is a method of its own name, so its cells are told apart.
``without-pretraining`` leaves out what needs an embedding before the first labels as well.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F

from als_ext.als_lc import AlsLc, AlsLcSettings
from als_ext.cli import main
from als_ext.methods import METHODS, Also


@dataclass(frozen=True)
class _NoPretraining(AlsLcSettings):
    pretrain: int | None = 0


class WithoutPretraining(AlsLc, name="without-pretraining"):
    """No epochs without labels: so none of the correction after them, the question whether labels
    are evidence, the channel, the last correction; one learning rate schedule; shifts throughout.
    """

    Settings = _NoPretraining


class WithoutPixels(AlsLc, name="without-pixels"):
    """Neighbours of the first correction by what was learned alone."""

    def _without_labels(self):
        return F.normalize(self.task.embeddings(), dim=1)


class WithoutChannel(AlsLc, name="without-channel"):
    """Corrected labels are trained on, as they are."""

    def _step_through(self, channel, x, index):
        return Also.step(self, x, self.task.labels.to(x.device)[index], index)


class WithoutNeighbours(AlsLc, name="without-neighbours"):
    """What all neighbours agree on is not trained on beside the given labels."""

    def _open(self, result, trust):
        super()._open(result, torch.zeros_like(trust))


class WithoutWeights(AlsLc, name="without-weights"):
    """All samples weigh the same; pi is no score."""

    def __init__(self, task):
        super().__init__(task)
        self.optimizer.loss_weight = lambda index: torch.ones(len(index), device=index.device)

    def scores(self):
        return None


class WithoutShifts(AlsLc, name="without-shifts"):
    """No shifted images."""

    def inputs(self, x):
        return x


class WithoutLater(AlsLc, name="without-later"):
    """One correction before the first step on labels, one after the last, none between."""

    def due(self, epoch):
        return epoch in (self._pretrain, self.epochs())


class WithoutQuestion(AlsLc, name="without-question"):
    """Given labels are always taken for evidence."""

    def _correct_without_labels(self, epoch):
        with mock.patch("als_ext.als_lc.labels_are_evidence", return_value=True):
            return super()._correct_without_labels(epoch)


class WithoutNames(AlsLc, name="without-names"):
    """Clusters are not asked, however many labels are wrong."""

    def _correct_without_labels(self, epoch):
        with mock.patch("als_ext.correction.disputes._NAMED", ()):
            return super()._correct_without_labels(epoch)


VARIANTS = tuple(name for name in METHODS if name.startswith("without-"))

if __name__ == "__main__":  # children with --jobs import this file for its methods
    sys.exit(main(["compare", "--method", ",".join(("als-lc", *VARIANTS)), *sys.argv[1:]]))
