"""What callbacks that correct labels between epochs have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from als_ext import ALSO, CorrectionConfig, CorrectionResult, LabelCorrector
from als_ext.data import IndexedDataset
from als_ext.ops._checks import check_int


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module goes back to the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class Relabelling:
    """A :class:`als_ext.LabelCorrector` that writes into a data set, and when it does.

    Args:
        dataset: whose labels are corrected, in place; as given now they are the originals.
        num_classes: number of classes, >= 1; None: the highest label + 1.
        warmup: epochs before the first correction, >= 1.
        period: epochs from one to the next, >= 1.
        config: settings of the corrector; None takes the defaults.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        num_classes: int | None,
        warmup: int,
        period: int,
        config: CorrectionConfig | None,
    ) -> None:
        if not isinstance(dataset, IndexedDataset):
            raise TypeError(
                "dataset: expected an IndexedDataset, whose labels can be replaced, got "
                f"{type(dataset).__name__}"
            )
        check_int("warmup", warmup, low=1)
        check_int("period", period, low=1)
        self.dataset = dataset
        self.warmup, self.period = warmup, period
        self.corrector = LabelCorrector(dataset.labels, num_classes, config)

    def due(self, epoch: int, epochs: int | None) -> bool:
        """Whether labels are corrected after ``epoch``, from 1; ``epochs`` in all, if it is known.

        Not after the last one, which nobody trains after, and not once the corrector converged.
        """
        after = epoch - self.warmup
        last = epochs is not None and epoch >= epochs
        return after >= 0 and after % self.period == 0 and not last and not self.corrector.converged

    def correct(
        self, embeddings: Tensor, optimizer: Optimizer | None, epoch: int
    ) -> CorrectionResult[Tensor]:
        """One step of the corrector; π of relabelled samples starts again.

        Args:
            embeddings: [n, D] floating, in the order of the data set.
            optimizer: of the training; where it is ALSO, its weights give the scores.
            epoch: for the history.
        """
        weights = optimizer.weights if isinstance(optimizer, ALSO) else None
        scores = None if weights is None else weights.scores()
        result = self.corrector.step(embeddings, scores, epoch)
        self.dataset.set_labels(result.new_label)
        if weights is not None:
            weights.reset_(result.changed.nonzero()[:, 0].to(weights.device))
        return result

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the corrector's state, and its labels into the data set."""
        self.corrector.load_state_dict(state)
        self.dataset.set_labels(self.corrector.labels)
