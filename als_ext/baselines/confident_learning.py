"""Confident learning (Northcutt, Jiang, Chuang, JAIR 2021, arXiv 1911.00068), through cleanlab."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from als_ext.baselines._kept import Retrained
from als_ext.config import TrainConfig
from als_ext.methods import Task
from als_ext.ops._checks import check_int
from als_ext.runtime import derived_seed


@dataclass(frozen=True)
class ConfidentLearningSettings:
    """Settings of :class:`ConfidentLearning`.

    Args:
        folds: of the cross-validation, >= 2; 4 are those of the source's experiments.
    """

    folds: int = 4

    def __post_init__(self) -> None:
        check_int("folds", self.folds, low=2)


class ConfidentLearning(Retrained, name="confident-learning"):
    """Cross-validated probabilities, ``cleanlab.filter.find_label_issues``, drop, train again.

    One training a fold, each from the same first weights, gives every sample the probabilities of a
    network that did not see it. cleanlab's defaults decide (``filter_by="prune_by_noise_rate"``),
    and the last training goes without what it found: folds + 1 trainings in all.
    """

    Settings = ConfidentLearningSettings

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        n, folds = len(task.labels), self.settings.folds
        check_int("folds", folds, low=2, high=n)
        # Stratified: in this order samples of a class stand together, and folds take turns.
        generator = torch.Generator().manual_seed(derived_seed(task.config.seed, "folds"))
        order = torch.randperm(n, generator=generator)
        order = order[task.labels.cpu()[order].argsort(stable=True)]
        self._fold = torch.empty_like(order)
        self._fold[order] = torch.arange(n) % folds
        self._probability = torch.zeros(n, task.num_classes)
        self.keep = (self._fold != 0).to(task.device)

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """cleanlab has to be there."""
        super().check(config)
        _find_label_issues()

    @classmethod
    def stages(cls, config: TrainConfig) -> int:
        """One a fold, and the last."""
        return cls.Settings(**config.settings).folds + 1

    def select(self) -> Tensor:
        """The next fold's samples; after the last fold, those without an issue."""
        model = self.task.model
        rows = (self._fold == self.stage).nonzero()[:, 0]
        held_out = self.task.collect(lambda x: model(x).float().softmax(1), rows)
        self._probability[rows] = held_out.cpu()
        following = self.stage + 1
        if following < self.settings.folds:
            return self._fold != following
        issue = _find_label_issues()(
            labels=self.task.labels.cpu().numpy(),
            pred_probs=self._probability.double().numpy(),
            n_jobs=1,  # no processes forked beside torch's threads
        )
        return ~torch.from_numpy(issue)

    def state_dict(self) -> dict[str, Any]:
        """What every training in stages keeps, and the probabilities so far."""
        return {**super().state_dict(), "probability": self._probability}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it."""
        super().load_state_dict(state)
        self._probability = state["probability"]


def _find_label_issues() -> Any:
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as error:
        raise ImportError(
            "confident-learning needs cleanlab: pip install 'als_ext[cleanlab]'"
        ) from error
    return find_label_issues
