"""Training on some of the samples, and again from the same first weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from als_ext.config import TrainConfig
from als_ext.methods import ERM, Task
from als_ext.metrics import Record
from als_ext.ops import weighted_loss
from als_ext.runtime import Amp


class Kept(ERM):
    """The mean loss over the samples of a mask; the others pass through the network with weight 0.

    Attributes:
        keep: bool [n], the mask; at first all samples.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.keep = torch.ones(len(task.labels), dtype=torch.bool, device=task.device)

    def batch(self, x: Tensor, label: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels and weights >= 0 of a step; the given batch comes first."""
        return x, label, self.keep[index].float()

    def step(self, x: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """One step on the weighted mean of the losses."""
        x, label, weight = self.batch(x, label, index)
        with self.amp.autocast():
            logits = self.task.model(x)
        total, losses = weighted_loss(logits, label, weight / weight.sum().clamp_min(1.0))
        self.optimizer.zero_grad()
        self.amp.backward_and_step(total, self.optimizer)
        return losses[: len(index)]

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and mask."""
        return {**super().state_dict(), "keep": self.keep}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state)
        self.keep = state["keep"].to(self.task.device)


class Retrained(Kept):
    """Training in stages of ``config.epochs`` epochs, each on samples that the last one selected.

    Every stage starts from the same first weights, with a fresh optimizer and the learning rates
    from the beginning.

    Attributes:
        stage: the number of the stage, from 0.
        pool: bool [n], the samples to select from; all of them, unless a subclass takes some out.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.pool = torch.ones_like(self.keep)
        self.stage = 0
        self._first = {name: value.clone() for name, value in task.model.state_dict().items()}
        self._restart = False

    @classmethod
    def stages(cls, config: TrainConfig) -> int:
        """How many there are."""
        return 2

    def epochs(self) -> int:
        """Those of all stages."""
        return self.stages(self.task.config) * self.task.config.epochs

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The schedule of one training, again in each stage."""
        return super().lr_at(step % (self.task.config.epochs * steps_per_epoch), steps_per_epoch)

    @abstractmethod
    def select(self) -> Tensor:
        """Samples of the next stage, bool [n]; called in eval mode at the end of each but the last
        stage."""

    def after_epoch(self, epoch: int, losses: Tensor) -> Record:
        """Select at the end of a stage; the last selection is what is recorded."""
        each, stages = self.task.config.epochs, self.stages(self.task.config)
        if epoch % each or epoch == stages * each:
            return {}
        self.keep = self.select().to(self.task.device) & self.pool
        kept = int(self.keep.sum())
        if not kept:
            raise RuntimeError(f"{self.name}: expected samples to train on again, all were dropped")
        # The epoch's record shows the trained weights: they are replaced after it.
        self._restart = True
        dropped = int(self.pool.sum()) - kept
        return {"suspects": dropped} if epoch + each == stages * each else {}

    def train_mode(self) -> None:
        """Begin the next stage if it is time."""
        if self._restart:
            self._restart = False
            self.stage += 1
            self.task.model.load_state_dict(self._first)
            self.amp = Amp(self.task.config.amp, self.task.device)
            self.optimizer = self.make_optimizer()
        super().train_mode()

    def report(self) -> dict[str, Tensor]:
        """suspect [n]: what the last training goes without."""
        return {"suspect": (self.pool & ~self.keep).cpu()}

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, mask, stage and the first weights."""
        return {**super().state_dict(), "stage": self.stage, "first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it."""
        super().load_state_dict(state)
        self.stage = state["stage"]
        self._first = state["first"]
