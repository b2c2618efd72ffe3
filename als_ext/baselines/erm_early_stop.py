"""Early stopping on a share of the noisy labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from als_ext.baselines._kept import Kept
from als_ext.data.splits import stratified_split
from als_ext.methods import Task
from als_ext.metrics import Record
from als_ext.ops._checks import check_float
from als_ext.runtime import derived_seed


@dataclass(frozen=True)
class EarlyStopSettings:
    """Settings of :class:`EarlyStop`.

    Args:
        validation_share: share of each class's samples that is held out, in (0, 0.5].
    """

    validation_share: float = 0.1

    def __post_init__(self) -> None:
        check_float("validation_share", self.validation_share, low=0.0, high=0.5, open_low=True)


class EarlyStop(Kept, name="erm-early-stop"):
    """ERM that ends with the weights of the epoch best on held-out NOISY labels.

    The share of the held-out given labels that are predicted orders models as the share of true
    labels would, when the noise is diagonally dominant (Chen et al., AAAI 2021, arXiv 2012.04193).
    All epochs are trained, at the same learning rates as everyone; the first of equal epochs wins.
    """

    Settings = EarlyStopSettings

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        seed = derived_seed(task.config.seed, "validation")
        share = self.settings.validation_share
        _, rows = stratified_split(task.labels.cpu().numpy(), share, seed)
        self._rows = torch.from_numpy(rows)
        self.keep[self._rows.to(task.device)] = False
        self._best: dict[str, Tensor] = {}
        self._accuracy = -1.0

    def after_epoch(self, epoch: int, losses: Tensor) -> Record:
        """Remember the weights if they are the best; after the last epoch, bring the best back."""
        task = self.task
        predicted = task.collect(lambda x: self.predict(x).argmax(1), self._rows)
        right = predicted.cpu() == task.labels.cpu()[self._rows]
        accuracy = int(right.sum()) / len(right)
        if accuracy > self._accuracy:
            self._accuracy = accuracy
            self._best = {name: value.clone() for name, value in task.model.state_dict().items()}
        if epoch == task.config.epochs:
            task.model.load_state_dict(self._best)
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, mask and the best weights so far."""
        return {**super().state_dict(), "best": self._best, "accuracy": self._accuracy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it."""
        super().load_state_dict(state)
        self._best = state["best"]
        self._accuracy = state["accuracy"]
