"""The ways of training that the Trainer knows. A new one is a subclass with a name."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from als_ext.augment import RandomAffine, RandomShift
from als_ext.config import TrainConfig
from als_ext.embedding import make_embedder
from als_ext.metrics import Record
from als_ext.ops import sample_loss, weighted_loss
from als_ext.optim import ALSO
from als_ext.runtime import Amp


class Collect(Protocol):
    """Applies a function to training samples, in eval mode and without gradients."""

    def __call__(self, function: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> Tensor:
        """What the function gives for inputs [B, ...], joined, on the device.

        Args:
            function: of inputs [B, ...].
            rows: int64 [r], the samples to take, in that order; None takes all, in order.
        """


@dataclass(frozen=True)
class Task:
    """What a method works on.

    Args:
        model: the network, on ``device``.
        config: the settings of the run.
        num_classes: number of classes.
        labels: int64 [n], the live labels: a method that corrects writes into them.
        device: where batches come and losses go.
        collect: applies a function of inputs [B, ...] to training samples, see :class:`Collect`.
        clean: inputs [m, ...] and labels int64 [m] that are known to be right, on ``device``; None
            where nobody gave any.
        clean_index: int64 [m] on ``device``, where these samples are in the training set; None
            where nobody said.
        images: whether the samples are floating images [C, H, W], H and W >= 12.
        kept: int64 [m] on the device of ``labels``, samples whose labels no correction may change;
            None where there are none.
        augment: makes the views to train on; None where the samples themselves are trained on.
    """

    model: nn.Module
    config: TrainConfig
    num_classes: int
    labels: Tensor
    device: torch.device
    collect: Collect
    clean: tuple[Tensor, Tensor] | None = None
    clean_index: Tensor | None = None
    images: bool = False
    kept: Tensor | None = None
    augment: RandomShift | RandomAffine | None = None

    def embeddings(self) -> Tensor:
        """Embeddings float32 [n, D] of all training samples, in order, on ``device``."""
        return self.collect(make_embedder(self.model, self.config.embedding))


@dataclass(frozen=True)
class NoSettings:
    """A method without settings of its own."""


METHODS: dict[str, type[Method]] = {}
"""The methods by name."""


class Method(ABC):
    """What happens with a batch and after an epoch; one instance trains one model once.

    Subclasses are registered by name: ``class Mine(Method, name="mine")``; one without a name is
    only there to derive from. What only they know is set in a frozen dataclass that checks itself,
    ``Settings``, from ``TrainConfig.settings``.
    """

    name: ClassVar[str]
    corrects: ClassVar[bool] = False  # whether it needs embeddings and may change labels
    trains: ClassVar[bool] = True  # whether there are steps; without, an epoch is after_epoch alone
    needs_clean: ClassVar[bool] = False  # whether it needs samples whose labels are known
    takes_clean: ClassVar[bool] = False  # whether it uses them where there are some
    takes_also: ClassVar[bool] = False  # whether it is for ``TrainConfig.also``
    augments: ClassVar[bool] = False  # whether it trains on random views unless told otherwise
    Settings: ClassVar[type[Any]] = NoSettings

    def __init_subclass__(cls, name: str | None = None, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if name is None:
            return
        # Running a notebook's cell again makes the same class again.
        same = f"{cls.__module__}.{cls.__qualname__}"
        if name in METHODS and f"{METHODS[name].__module__}.{METHODS[name].__qualname__}" != same:
            raise ValueError(f"name: expected one that is free, got {name!r} again")
        cls.name = name
        METHODS[name] = cls

    def __init__(self, task: Task) -> None:
        self.task = task
        self.settings = self.Settings(**task.config.settings)
        self.amp = Amp(task.config.amp, task.device)
        self.optimizer = self.make_optimizer()

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Raise TypeError or ValueError for settings that the method cannot work with."""
        known = {field.name for field in dataclasses.fields(cls.Settings)}
        for setting in config.settings:
            if setting not in known:
                raise ValueError(
                    f"settings: expected those of {cls.name} "
                    f"({', '.join(sorted(known)) or 'it has none'}), got {setting!r}"
                )
        cls.Settings(**config.settings)
        if config.also and not cls.takes_also:
            raise ValueError(
                f"also: expected none for {cls.name}, which has no ALSO, got {dict(config.also)}"
            )

    def epochs(self) -> int:
        """Epochs of the whole run; more than ``config.epochs`` where it trains more than once."""
        return self.task.config.epochs

    def learns_labels(self, epoch: int) -> bool:
        """Whether this epoch, from 1, trains the classifier: then its test accuracy is measured."""
        return True

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self.task.config.lr_at(step, steps_per_epoch)

    def inputs(self, x: Tensor) -> Tensor:
        """What a step gets for the inputs [B, ...] of a batch."""
        return x if self.task.augment is None else self.task.augment(x)

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C] of inputs, in eval mode: the largest is the predicted class."""
        scores: Tensor = self.task.model(x)
        return scores

    @abstractmethod
    def make_optimizer(self) -> Optimizer:
        """The optimizer of ``task.model``; the Trainer sets its learning rate each step."""

    @abstractmethod
    def step(self, x: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """Train on a batch without waiting for the device.

        Args:
            x: [B, ...], what :meth:`inputs` made of the inputs.
            label: int64 [B].
            index: int64 [B], positions of the samples in the training set.

        Returns:
            The losses, float32 [B], detached.
        """

    def after_epoch(self, epoch: int, losses: Tensor) -> Record:
        """Work between epochs, in eval mode; ``losses`` [n] are the samples' latest.

        Returns:
            Entries for the epoch's metrics.
        """
        return {}

    def train_mode(self) -> None:
        """Put the model into training."""
        self.task.model.train()

    def eval_mode(self) -> None:
        """Put the model into evaluation."""
        self.task.model.eval()

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, beside the model's weights and the labels."""
        return {"optimizer": self.optimizer.state_dict(), "amp": self.amp.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.amp.load_state_dict(state["amp"])

    def report(self) -> dict[str, Tensor] | None:
        """Per-sample tensors [n] about the labels: ``suspect`` of filters, and of corrections
        ``share`` and ``margin`` as well; None for a method that judges no label."""
        return None

    def neighbours(self) -> Tensor | None:
        """int32 [s, up to 8], the nearest neighbours of each suspect of :meth:`report`, in order,
        nearest first; None where there are none to tell."""
        return None


class ERM(Method, name="erm"):
    """Empirical risk minimisation: the mean loss, Adam. The baseline."""

    def make_optimizer(self) -> Optimizer:
        """Adam, the optimizer family of ALSO."""
        config = self.task.config
        return torch.optim.Adam(
            self.task.model.parameters(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def losses(self, logits: Tensor, label: Tensor) -> Tensor:
        """Cross entropy, float32 [B]."""
        return sample_loss(logits, label)

    def step(self, x: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """One step on the mean of the losses."""
        with self.amp.autocast():
            logits = self.task.model(x)
        losses = self.losses(logits, label)
        self.optimizer.zero_grad()
        self.amp.backward_and_step(losses.mean(), self.optimizer)
        return losses.detach()


# Arguments of ALSO that the config has elsewhere, or that are for several processes.
_NOT_ALSO = {"params", "n", "lr", "weight_decay", "group", "batch_size", "repeats"}


class Also(Method, name="also"):
    """ALSO (arXiv 2508.16734): the loss of each sample weighted by the learned pi."""

    takes_also = True
    optimizer: ALSO

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """``also`` may hold what the config says nowhere else."""
        super().check(config)
        known = inspect.signature(ALSO).parameters.keys() - _NOT_ALSO
        for name in config.also:
            if name not in known:
                raise ValueError(f"also: expected some of {', '.join(sorted(known))}, got {name!r}")

    def make_optimizer(self) -> Optimizer:
        """ALSO over all training samples."""
        config = self.task.config
        return ALSO(
            self.task.model.parameters(),
            n=len(self.task.labels),
            lr=config.lr,
            weight_decay=config.weight_decay,
            **config.also,
        )

    def step(self, x: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """One step on the weighted loss, of the parameters and of pi."""
        with self.amp.autocast():
            logits = self.task.model(x)
        total, losses = weighted_loss(logits, label, self.optimizer.loss_weight(index))
        losses = losses.detach()
        self.optimizer.zero_grad()
        self.amp.backward_and_step(total, self.optimizer, index=index, losses=losses)
        return losses

    def scores(self) -> Tensor:
        """How suspect the labels are, [n]: log pi, with the sign of the direction."""
        return self.optimizer.weights.scores()

    def train_mode(self) -> None:
        """The model holds theta at the half point."""
        super().train_mode()
        self.optimizer.train()

    def eval_mode(self) -> None:
        """The model holds theta itself."""
        super().eval_mode()
        self.optimizer.eval()


class Relabels(NamedTuple):
    """A correction of n labels; all tensors on one device."""

    label: Tensor  # int64 [n], after it
    suspect: Tensor  # bool [n], whether the label was in question
    share: Tensor  # float32 [n], votes for the winner
    margin: Tensor  # float32 [n], its lead
    neighbours: Tensor | None = None  # int64 [n, k], nearest first, for people to look at


_SHOWN = 8  # neighbours of a suspect that are kept for people to look at


class Correcting(Method):
    """Corrections of the labels: after ``warmup`` epochs, then every ``period`` but for the last.

    They end once one changes less than ``correction.stop_share`` of the labels. To be derived from
    before the class that trains: ``class Mine(Correcting, ERM, name="mine")``.
    """

    corrects = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._converged = False
        self._report: dict[str, Tensor] | None = None
        self._neighbours: Tensor | None = None

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """At least one correction has to fit in."""
        super().check(config)
        if config.warmup >= config.epochs:
            raise ValueError(
                f"epochs: expected more than warmup={config.warmup} for {cls.name}, "
                f"got {config.epochs}"
            )

    def due(self, epoch: int) -> bool:
        """Whether a correction comes after this epoch, if they have not ended."""
        config = self.task.config
        after = epoch - config.warmup
        return after >= 0 and epoch < config.epochs and after % config.period == 0

    @abstractmethod
    def relabels(self, epoch: int) -> Relabels:
        """One correction of ``task.labels``, which it leaves as they are."""

    def relabelled(self, index: Tensor) -> None:
        """What else changes with the labels of the samples int64 [m], on ``task.device``."""

    def after_epoch(self, epoch: int, losses: Tensor) -> Record:
        """Correct the labels if it is time."""
        if self._converged or not self.due(epoch):
            return {}
        stop_share = self.task.config.correction.stop_share
        labels, kept = self.task.labels, self.task.kept
        label, suspect, share, margin, neighbours = self.relabels(epoch)
        label = label.to(labels.device, copy=True)
        if kept is not None:
            label[kept] = labels[kept]
        changed = (label != labels).nonzero()[:, 0]
        labels.copy_(label)
        self.relabelled(changed.to(self.task.device))
        self._converged = len(changed) / len(labels) < stop_share
        self._report = {"share": share.cpu(), "margin": margin.cpu(), "suspect": suspect.cpu()}
        if neighbours is not None:
            # Of suspects alone, and narrow: they are part of every later checkpoint.
            self._neighbours = neighbours[suspect, :_SHOWN].to("cpu", torch.int32)
        return {"suspects": int(suspect.sum())}

    def state_dict(self) -> dict[str, Any]:
        """What the class that trains keeps, and the last report."""
        return {
            **super().state_dict(),
            "converged": self._converged,
            "report": self._report,
            "neighbours": self._neighbours,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it."""
        super().load_state_dict(state)
        self._converged = state["converged"]
        self._report = state["report"]
        self._neighbours = state.get("neighbours")  # checkpoints once had none

    def report(self) -> dict[str, Tensor] | None:
        """share, margin and suspect [n] of the last correction."""
        return self._report

    def neighbours(self) -> Tensor | None:
        """Those of the last correction."""
        return self._neighbours
