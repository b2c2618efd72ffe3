"""MentorNet PD and DD (Jiang et al., ICML 2018, arXiv 1712.05055): a network weights the samples.

Where the paper leaves something open, the code that its authors published decides
(github.com/google/mentornet).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from als_ext.baselines._mentor import PERCENT, Mentor, fit, new_mentor, predefined_mentor
from als_ext.config import TrainConfig
from als_ext.methods import ERM, Task
from als_ext.metrics import Record
from als_ext.ops._checks import check_float

EARLY = 17  # percent of the run with the first rate of example dropout; the burn-in of DD


@dataclass(frozen=True)
class MentorNetSettings:
    """Settings of :class:`MentorNetPD` and :class:`MentorNetDD`.

    Args:
        percentile: in [0, 1], of the losses of a batch; it is what a loss is compared with. 0.7 is
            the default of the published code; its scripts give each noise rate another one (20, 40,
            80 %: PD 0.75, 0.75, 0.5; DD 0.8, 0.6, 0.5).
        decay: in [0, 1], of the moving average of that percentile over the steps.
        early_dropout: share of a batch, in [0, 1], that is left out at random in the first 17
            percent of the run.
        dropout: that share after it.
    """

    percentile: float = 0.7
    decay: float = 0.5
    early_dropout: float = 0.5
    dropout: float = 0.05

    def __post_init__(self) -> None:
        for name in ("percentile", "decay", "early_dropout", "dropout"):
            check_float(name, getattr(self, name), low=0.0, high=1.0)


class MentorNetPD(ERM, name="mentornet-pd"):
    r"""The mean of v_i f_i, with v_i from a network that learned a predefined curriculum.

    Its features are the loss f_i, f_i minus the moving average of the batch's percentile of losses,
    and the percent of the run that is over. It learned (``predefined_curriculum``): every
    sample in the first 18 percent, then those below the average (self-paced learning), at the end
    weights that fall linearly above it. A random share of each batch is left out.

    Note:
        The curriculum does not depend on the data; its network is fitted once a process, in some
        1.5 s of one CPU core before the clock of a run starts. Deviations from the published code:
        Adam and the learning rates of all methods here, and weight decay is not scaled by the mean
        of v.
    """

    Settings = MentorNetSettings

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.mentor = self.make_mentor().to(task.device)
        self.average = torch.zeros((), device=task.device)
        self.steps = 0

    def make_mentor(self) -> Mentor:
        """The network that weights the samples, on the CPU."""
        return copy.deepcopy(predefined_mentor())

    def percent(self) -> int:
        """How much of the run is over, 0, ..., 99."""
        config = self.task.config
        total = config.epochs * math.ceil(len(self.task.labels) / config.batch_size)
        return PERCENT * self.steps // total

    def middle(self, losses: Tensor) -> Tensor:
        """The percentile of losses [B], the nearest of them."""
        return losses.sort().values[round(self.settings.percentile * (len(losses) - 1))]

    def weights(self, losses: Tensor) -> Tensor:
        """The v [B] of a batch by its losses [B], before any is left out."""
        logit: Tensor = self.mentor(losses, losses - self.average, self.percent())
        return logit.sigmoid()

    @torch.no_grad()
    def take_in(self, losses: Tensor) -> Tensor:
        """Note the losses [B] of a batch; the weights [B] of its samples, 0 where left out."""
        settings, batch = self.settings, len(losses)
        self.average.lerp_(self.middle(losses), 1.0 - settings.decay)
        early = self.percent() < EARLY
        rate = settings.early_dropout if early else settings.dropout
        out = torch.randperm(batch, device=losses.device)[int(batch * (1.0 - rate)) :]
        weight = self.weights(losses).index_fill(0, out, 0.0)
        self.steps += 1
        return weight

    def step(self, x: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """One step on the weighted mean of the losses."""
        with self.amp.autocast():
            logits = self.task.model(x)
        losses = self.losses(logits, label)
        weight = self.take_in(losses.detach())
        self.optimizer.zero_grad()
        self.amp.backward_and_step((weight * losses).mean(), self.optimizer)
        return losses.detach()

    def state_dict(self) -> dict[str, Any]:
        """The network, the moving average and the steps as well."""
        own = {"mentor": self.mentor.state_dict(), "average": self.average, "steps": self.steps}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it."""
        super().load_state_dict(state)
        self.mentor.load_state_dict(state["mentor"])
        self.average.copy_(state["average"])
        self.steps = state["steps"]


class MentorNetDD(MentorNetPD, name="mentornet-dd"):
    r"""The mean of v_i f_i, with v_i from a network that learned which labels are right.

    In a burn-in of 17 percent of the run, rounded up to whole epochs, all v_i are 1. Then the
    network learns [given label = true label] from the features of the clean samples: their losses
    against the labels that they were given, as the epoch's steps saw them, and these minus their
    percentile. From then on it weights the batches, with the percent of the run held there.

    Raises:
        ValueError: clean samples without their positions in the training set, a single epoch.

    Note:
        The published code learns the network in a run of its own and holds the epoch at the end of
        the burn-in; here it learns at that end, in the run that uses it. The given labels and the
        losses of the clean samples come from the training set, so their positions are needed.
    """

    needs_clean = True

    def __init__(self, task: Task) -> None:
        if task.clean_index is None:
            raise ValueError(
                "clean: expected the positions of the clean samples in the training set as its "
                "third element, which mentornet-dd needs, got none"
            )
        super().__init__(task)
        self.learned_at: int | None = None  # percent of the run

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """There has to be an epoch after the burn-in."""
        super().check(config)
        if config.epochs < 2:
            raise ValueError(
                f"epochs: expected >= 2 for mentornet-dd, of which the first is its burn-in, "
                f"got {config.epochs}"
            )

    def make_mentor(self) -> Mentor:
        """A network that has learned nothing yet."""
        return new_mentor(self.task.config.seed)

    def weights(self, losses: Tensor) -> Tensor:
        """1 in the burn-in, then what the network says."""
        if self.learned_at is None:
            return torch.ones_like(losses)
        logit: Tensor = self.mentor(losses, losses - self.average, self.learned_at)
        return logit.sigmoid()

    def after_epoch(self, epoch: int, losses: Tensor) -> Record:
        """Teach the network at the end of the burn-in."""
        config = self.task.config
        if self.learned_at is not None or PERCENT * epoch < EARLY * config.epochs:
            return {}
        self.learned_at = self.percent()
        index, labels = self.task.clean_index, self.task.labels
        assert index is not None
        assert self.task.clean is not None
        given = labels[index.to(labels.device)].to(index.device)
        loss = losses[index].cpu()
        mentor = self.mentor.cpu()
        fit(
            mentor,
            (loss, loss - self.middle(loss), torch.full((len(loss),), self.learned_at)),
            (given == self.task.clean[1]).float().cpu(),
            steps=100,  # of 500, 60 clean blobs were memorised: AUC on the others 0.92, not 0.97
            batch=min(len(loss), 256),
            generator=torch.Generator().manual_seed(config.seed),
        )
        self.mentor = mentor.to(self.task.device)
        return {}

    def state_dict(self) -> dict[str, Any]:
        """When the network learned, as well."""
        return {**super().state_dict(), "learned_at": self.learned_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it."""
        super().load_state_dict(state)
        self.learned_at = state["learned_at"]
