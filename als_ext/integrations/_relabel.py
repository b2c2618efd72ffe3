"""What callbacks that correct labels between epochs have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from als_ext import ALSO, CorrectionConfig, CorrectionResult, LabelCorrector
from als_ext.data import IndexedDataset
from als_ext.distributed.processes import Processes
from als_ext.ops._checks import check_int

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def all_processes(world_size: int) -> ProcessGroup | None:
    """The group of all processes of a trainer; None if there is one alone."""
    return dist.group.WORLD if world_size > 1 else None


def check_shared(optimizer: ALSO, world_size: int) -> None:
    """Refuse weights that each process of a trainer keeps for itself."""
    joint = optimizer.weights.joint
    if world_size != (1 if joint is None else joint.size):
        raise ValueError(
            f"group: expected one of all {world_size} processes, which share their weights "
            "(group=torch.distributed.group.WORLD, batch_size=the most samples of a process in a "
            f"step), got {'none' if joint is None else f'one of {joint.size}'}"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module, group: ProcessGroup | None = None) -> Iterator[None]:
    """Eval mode without gradients; each module goes back to the mode that it had.

    In a group all processes have the first one's buffers meanwhile (running means of batch
    normalisation), as DistributedDataParallel sees to in its own passes.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [] if group is None else [(own, own.clone()) for own in model.buffers()]
    model.eval()
    try:
        with torch.no_grad():
            for buffer, own in buffers:
                # Gloo takes memory for dense, whatever the strides.
                sent = own.clone(memory_format=torch.contiguous_format)
                dist.broadcast(sent, group=group, group_src=0)
                buffer.copy_(sent)
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, own in buffers:
                buffer.copy_(own)


class Relabelling:
    """A :class:`als_ext.LabelCorrector` that writes into a data set, and when it does.

    Args:
        dataset: whose labels are corrected, in place; as given now they are the originals.
        num_classes: number of classes, >= 1; None: the highest label + 1.
        warmup: epochs before the first correction, >= 1.
        period: epochs from one to the next, >= 1.
        config: settings of the corrector; None takes the defaults.
        plain: where ``dataset`` has random augmentation, the same samples in the same order without
            it; None is ``dataset``.

    Attributes:
        items: of these the embeddings are made.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        num_classes: int | None,
        warmup: int,
        period: int,
        config: CorrectionConfig | None,
        plain: Dataset[Any] | None = None,
    ) -> None:
        if not isinstance(dataset, IndexedDataset):
            raise TypeError(
                "dataset: expected an IndexedDataset, whose labels can be replaced, got "
                f"{type(dataset).__name__}"
            )
        check_int("warmup", warmup, low=1)
        check_int("period", period, low=1)
        self.items: Dataset[Any] = dataset if plain is None else plain
        if not isinstance(self.items, Sized) or len(self.items) != len(dataset):
            got = len(self.items) if isinstance(self.items, Sized) else "one without a length"
            raise ValueError(
                f"plain: expected the {len(dataset)} samples of dataset, in its order, got {got}"
            )
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

    def rows(self, group: ProcessGroup | None) -> range:
        """The samples whose embeddings :meth:`correct` wants of this process."""
        n = len(self.dataset)
        if group is None:
            return range(n)
        processes = Processes(group)
        if n < processes.size:
            raise ValueError(
                f"dataset: expected at least a sample for each of {processes.size} processes, "
                f"got {n}"
            )
        first, end = (n * (processes.rank + more) // processes.size for more in (0, 1))
        return range(first, end)

    def correct(
        self,
        embeddings: Tensor,
        optimizer: Optimizer | None,
        epoch: int,
        group: ProcessGroup | None = None,
    ) -> CorrectionResult[Tensor]:
        """One step of the corrector; π of relabelled samples starts again.

        Args:
            embeddings: [m, D] floating, of the samples :meth:`rows`.
            optimizer: of the training; where it is ALSO, its weights give the scores.
            epoch: for the history.
            group: of all processes of the training, which have to call this.

        Raises:
            ValueError: each process has weights of its own.
        """
        if isinstance(optimizer, ALSO):
            check_shared(optimizer, 1 if group is None else Processes(group).size)
        rows = self.rows(group)
        own = slice(rows.start, rows.stop)
        weights = optimizer.weights if isinstance(optimizer, ALSO) else None
        scores = None if weights is None else weights.scores()[own]
        result = self.corrector.step(embeddings, scores, epoch, group=group)
        self.dataset.set_labels(self.corrector.labels)
        if weights is not None:
            changed = result.changed.nonzero()[:, 0] + rows.start
            weights.reset_(changed.to(weights.device))
        return result

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the corrector's state, and its labels into the data set."""
        self.corrector.load_state_dict(state)
        self.dataset.set_labels(self.corrector.labels)
