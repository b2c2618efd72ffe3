"""Lightning: a mixin with the weighted loss of ALSO, and a callback that corrects labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from als_ext import CorrectionConfig
from als_ext.data import IndexedDataset
from als_ext.embedding import make_embedder
from als_ext.integrations._relabel import (
    Relabelling,
    all_processes,
    check_shared,
    evaluating,
)
from als_ext.integrations.also import BatchALSO

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise ImportError(
        "als_ext.integrations.lightning needs lightning: pip install 'als_ext[lightning]'"
    ) from error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AlsoMixin", "BatchALSO", "CorrectionCallback"]


class AlsoMixin:
    """Weighted loss for a LightningModule: ``class Net(AlsoMixin, LightningModule)``.

    ``configure_optimizers`` returns a :class:`als_ext.integrations.also.BatchALSO` over all
    training samples, alone or with schedulers, and ``training_step`` returns the loss that
    :meth:`weighted_loss` gives. The index of the samples is part of the batch: wrap the training
    set in :class:`als_ext.data.IndexedDataset`.

    Note:
        While it trains the module holds the half point of the optimistic step. A callback that
        ``configure_callbacks`` adds puts θ in for validation, test and prediction, at the end of an
        epoch and of the training. So checkpoints after an epoch or a validation hold θ; one that is
        written between two steps holds the half point, from which only training should go on.
        In several processes (strategy "ddp") the optimizer needs ``group=dist.group.WORLD`` and
        ``batch_size=``, the most samples of a process in a step; see docs/scale.md.

    Example:
        >>> import torch
        >>> from als_ext.data import IndexedDataset
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> class Net(AlsoMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = torch.nn.Linear(4, 2)
        ...     def training_step(self, batch, batch_idx):
        ...         x, label, index = batch
        ...         return self.weighted_loss(self.head(x), label, index)[0]
        ...     def configure_optimizers(self):
        ...         return BatchALSO(self.parameters(), n=50)
        >>> train_set = IndexedDataset(torch.randn(50, 4), torch.randint(2, (50,)))
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        >>> trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> net = Net()
        >>> trainer.fit(net, torch.utils.data.DataLoader(train_set, batch_size=10))
        >>> net.optimizers(use_pl_optimizer=False).weights.top(3).shape
        torch.Size([3])
    """

    def weighted_loss(
        self, logits: Tensor, label: Tensor, index: Tensor, **loss: Any
    ) -> tuple[Tensor, Tensor]:
        """The loss of a training batch, under the weights of its samples, and the losses.

        Args:
            logits: [B, C] floating.
            label: [B] int64 in [0, C).
            index: [B] int64, the positions of the samples in the training set.
            **loss: further arguments of :func:`als_ext.ops.weighted_loss`.

        Returns:
            The weighted sum of the losses, for ``training_step`` to return, and the losses [B],
            detached.

        Raises:
            TypeError: another optimizer; an argument of another type or dtype.
            ValueError: shapes that do not fit; on the CPU an index outside [0, n).
            RuntimeError: ``configure_callbacks`` was overridden without its ``super()``.
        """
        module: Any = self
        optimizer = module.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, BatchALSO):
            raise TypeError(
                "configure_optimizers: expected one optimizer of type BatchALSO, got "
                f"{type(optimizer).__name__}"
            )
        if not any(isinstance(c, _EvaluationPoint) for c in module.trainer.callbacks):
            raise RuntimeError(
                "configure_callbacks: expected the callbacks of super().configure_callbacks() too, "
                "which put the right parameters in for validation and checkpoints"
            )
        return optimizer.weighted_loss(logits, label, index, **loss)

    def configure_callbacks(self) -> list[Any]:
        """The module's own callbacks, and the one that switches the parameters."""
        base: Any = super()
        others = base.configure_callbacks()
        return [*(others if isinstance(others, Sequence) else [others]), _EvaluationPoint()]


def _also(trainer: Any) -> BatchALSO | None:
    found = [o for o in trainer.optimizers if isinstance(o, BatchALSO)]
    return found[0] if len(found) == 1 else None


class _EvaluationPoint(Callback):
    """θ in the module where it is looked at or saved, the half point where it trains."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, BatchALSO):
                check_shared(optimizer, trainer.world_size)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, BatchALSO):
                optimizer.train()

    def _to_theta(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, BatchALSO):
                optimizer.eval()

    on_train_epoch_end = _to_theta
    on_validation_start = _to_theta
    on_test_start = _to_theta
    on_predict_start = _to_theta


class CorrectionCallback(Callback):
    """Corrects the labels of the training set between epochs.

    After ``warmup`` epochs and then every ``period``, but not after the last and not once a step
    changes fewer than ``config.stop_share`` of the labels. Works with any module; with
    :class:`AlsoMixin` log π is the score, and π of relabelled samples starts again. Checkpoints
    hold the corrector, and a resumed training takes over its labels.

    Args:
        dataset: the training set, items (x, label, index); its labels are replaced.
        num_classes: number of classes, >= 1; None: the highest label + 1.
        warmup: epochs before the first correction, >= 1.
        period: epochs from one to the next, >= 1.
        config: settings of the corrector; None takes the defaults.
        embedding: name of the layer whose output is the embedding; None takes ``module.embed``.
        plain: where ``dataset`` has random augmentation, the same samples in the same order without
            it, as x or as tuples that start with x.
        batch_size: samples at a time for embeddings, >= 1.

    Attributes:
        corrector: the :class:`als_ext.LabelCorrector`: labels, history, undo.

    Raises:
        TypeError: a data set that is no IndexedDataset.
        ValueError: as the LabelCorrector; a ``plain`` of another length; no such layer; a Trainer
            that trains on another data set; weights that several processes do not share; fewer
            samples than processes.

    Note:
        Worker processes of a DataLoader see new labels; what they fetched before keeps the old.
        In several processes each embeds its part of the samples, by its own ``dataset``, and all
        have the labels of one process.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        num_classes: int | None = None,
        *,
        warmup: int = 2,
        period: int = 2,
        config: CorrectionConfig | None = None,
        embedding: str | None = None,
        plain: Dataset[Any] | None = None,
        batch_size: int = 256,
    ) -> None:
        self._relabelling = Relabelling(dataset, num_classes, warmup, period, config, plain)
        self.corrector = self._relabelling.corrector
        self._embedding = embedding
        self._batch_size = batch_size
        self._done = 0  # the last epoch after which was corrected

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Say now what would fail after the first epochs."""
        make_embedder(pl_module, self._embedding)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Resumed from a checkpoint of the end of an epoch: correct if that was not done yet."""
        loader = trainer.train_dataloader
        if isinstance(loader, DataLoader) and loader.dataset is not self._relabelling.dataset:
            raise ValueError(
                "dataset: expected the data set of the Trainer's own DataLoader, whose labels are "
                f"corrected, got another {type(self._relabelling.dataset).__name__}"
            )
        self._correct(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Correct the labels if it is time."""
        self._correct(trainer, pl_module, trainer.current_epoch + 1)

    def _correct(self, trainer: Any, pl_module: Any, epoch: int) -> None:
        epochs = trainer.max_epochs
        unknown = epochs is None or epochs < 0
        if epoch == self._done or not self._relabelling.due(epoch, None if unknown else epochs):
            return
        optimizer = _also(trainer)
        if optimizer is not None:
            optimizer.eval()
        group = all_processes(trainer.world_size)
        embeddings = self._embeddings(trainer, pl_module, group)
        self._relabelling.correct(embeddings, optimizer, epoch, group)
        self._done = epoch

    def _embeddings(self, trainer: Any, pl_module: Any, group: ProcessGroup | None) -> Tensor:
        embed = make_embedder(pl_module, self._embedding)
        precision = trainer.precision_plugin
        generator = torch.Generator()  # a DataLoader would draw from the global one
        items = Subset(self._relabelling.items, self._relabelling.rows(group))
        loader = DataLoader(items, self._batch_size, generator=generator)
        parts = []
        with evaluating(pl_module, group), precision.forward_context():
            for batch in loader:
                x = batch[0] if isinstance(batch, (tuple, list)) else batch
                x = pl_module.transfer_batch_to_device(x, pl_module.device, 0)
                parts.append(embed(precision.convert_input(x)))
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """The corrector's, and when it last stepped; Lightning puts it into checkpoints."""
        return {"corrector": self.corrector.state_dict(), "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over corrector and labels.

        Raises:
            ValueError: the state belongs to other labels.
        """
        self._relabelling.load_state_dict(state_dict["corrector"])
        self._done = state_dict["done"]
