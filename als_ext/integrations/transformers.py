"""Hugging Face Trainer: a loss weighted by ALSO, and a callback that corrects labels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from als_ext import CorrectionConfig
from als_ext.checkpoint import load_checkpoint, save_checkpoint
from als_ext.integrations._items import IndexedItems, Item
from als_ext.integrations._relabel import (
    Relabelling,
    all_processes,
    check_shared,
    evaluating,
)
from als_ext.integrations.also import BatchALSO

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "als_ext.integrations.transformers needs transformers and accelerate: "
        "pip install 'als_ext[transformers]'"
    ) from error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AlsoTrainer", "CorrectionCallback", "IndexedItems", "mean_of_tokens"]

STATE = "als_ext.pt"  # in a checkpoint's folder


class AlsoTrainer(Trainer):
    """A Trainer for classification whose samples are weighted, and optimised, by ALSO.

    The training set is an ``IndexedItems``, so each batch has an entry ``index``, which
    ``compute_loss`` takes out; evaluation is unweighted and needs none. The optimizer is a
    :class:`als_ext.integrations.also.BatchALSO` with learning rate, betas, epsilon and weight decay
    (decoupled, as in AdamW) of the arguments; ``args.optim`` is not looked at.

    Args:
        *arguments: as of ``transformers.Trainer``.
        also: further arguments of :class:`als_ext.ALSO`, by name.
        **settings: as of ``transformers.Trainer``.

    Raises:
        TypeError: a training set that is no IndexedItems.
        ValueError: ``remove_unused_columns``, which would take the index away, is on; a batch
            without index or labels; a model that gives no logits [B, C]; several processes that do
            not share their weights (``also={"group": None}``, an optimizer of your own).

    Note:
        While it trains the model holds the half point of the optimistic step, but θ itself when it
        is evaluated, at the end of an epoch, in each checkpoint and at the end. ``train`` resumes
        the optimizer, π and the labels of a :class:`CorrectionCallback` from a checkpoint.
        Several processes share π, see docs/scale.md.
    """

    optimizer: Any  # set by Trainer; accelerate wraps it when training begins

    def __init__(self, *arguments: Any, also: Mapping[str, Any] | None = None, **settings: Any):
        super().__init__(*arguments, **settings)
        self._also_settings = {} if also is None else dict(also)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a batch: Trainer divides
        if self.args.remove_unused_columns:
            raise ValueError(
                "args.remove_unused_columns: expected False, as the model does not take the entry "
                "'index' and the Trainer would remove it, got True"
            )
        if self.train_dataset is not None and not isinstance(self.train_dataset, IndexedItems):
            raise TypeError(
                "train_dataset: expected IndexedItems(dataset), whose items have an entry 'index', "
                f"got {type(self.train_dataset).__name__}"
            )
        self.add_callback(_EvaluationPoint())

    @property
    def also(self) -> BatchALSO:
        """The optimizer, without what accelerate wraps around it; ``also.weights`` has π."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(optimizer, BatchALSO):
            raise TypeError(f"optimizer: expected BatchALSO, got {type(optimizer).__name__}")
        return optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> BatchALSO:
        """ALSO over all training samples, with the arguments' settings."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decaying = set(self.get_decay_parameter_names(model))
            groups: list[Item] = [
                {"params": [], "weight_decay": self.args.weight_decay},
                {"params": [], "weight_decay": 0.0},
            ]
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups[name not in decaying]["params"].append(parameter)
            settings = {
                "lr": self.args.learning_rate,
                "betas": (self.args.adam_beta1, self.args.adam_beta2),
                "eps": self.args.adam_epsilon,
                "decoupled_weight_decay": True,
                **self._also_settings,
            }
            groups = [group for group in groups if group["params"]]
            if self.args.world_size > 1:
                samples = self.args.train_batch_size * self.args.gradient_accumulation_steps
                shared = {"group": all_processes(self.args.world_size), "batch_size": samples}
                settings = {**shared, **settings}
            self.optimizer = BatchALSO(groups, n=len(self.train_dataset), **settings)
        n = self.also.weights.n
        if n != len(self.train_dataset):
            raise ValueError(
                f"optimizers: expected n = {len(self.train_dataset)}, one weight a training "
                f"sample, got {n}"
            )
        check_shared(self.also, self.args.world_size)
        return self.also

    def compute_loss(
        self, model: nn.Module, inputs: Item, return_outputs: bool = False, **arguments: Any
    ) -> Any:
        """Training: the weighted loss. Evaluation: the Trainer's own."""
        rest = dict(inputs)
        index = rest.pop("index", None)
        if not model.training:
            return super().compute_loss(model, rest, return_outputs=return_outputs, **arguments)
        label = rest.pop("labels", None)
        for name, value in (("index", index), ("labels", label)):
            if value is None:
                raise ValueError(
                    f"inputs: expected an entry {name!r}, which IndexedItems gives and the data "
                    f"collator has to keep, got {sorted(inputs)}"
                )
        outputs = model(**rest)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if logits.ndim != 2:
            raise ValueError(f"logits: expected shape [B, C], got {list(logits.shape)}")
        smoothing = self.args.label_smoothing_factor
        total, _ = self.also.weighted_loss(logits, label, index, label_smoothing=smoothing)
        return (total, outputs) if return_outputs else total

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **settings: Any) -> Any:
        """As of ``transformers.Trainer``; corrections resume too."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        for callback in self.callback_handler.callbacks if folder else ():
            if isinstance(callback, CorrectionCallback):
                callback.load(folder)
        return super().train(resume_from_checkpoint, *arguments, **settings)


class _EvaluationPoint(TrainerCallback):
    """θ in the model where it is saved; a training step goes back by itself."""

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        if control.should_save:
            optimizer.eval()

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        optimizer.eval()


def mean_of_tokens(model: nn.Module, inputs: Item) -> Tensor:
    """The last hidden state, averaged over the tokens that the attention mask counts.

    Args:
        model: gives ``hidden_states`` when asked for them.
        inputs: a batch without labels and index.

    Returns:
        [B, D].

    Raises:
        ValueError: a model without hidden states [B, T, D].
    """
    states = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None)
    if not states or states[-1].ndim != 3:
        got = "none" if not states else list(states[-1].shape)
        raise ValueError(
            f"embed: expected a function of model and batch, as {type(model).__name__} has no "
            f"hidden states [B, T, D], got {got}"
        )
    last: Tensor = states[-1]
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is None:
        return last.mean(1)
    mask = mask.unsqueeze(2).to(last.dtype)
    return (last * mask).sum(1) / mask.sum(1).clamp_min(1)


class CorrectionCallback(TrainerCallback):
    """Corrects the labels of the training set between epochs.

    After ``warmup`` epochs and then every ``period``, but not after the last and not once a step
    changes fewer than ``config.stop_share`` of the labels. Works with any Trainer; with
    :class:`AlsoTrainer` log π is the score, π of relabelled samples starts again, and checkpoints
    hold the corrector.

    Args:
        dataset: the training set of the Trainer; its labels are replaced.
        num_classes: number of classes, >= 1; None: the highest label + 1.
        warmup: epochs before the first correction, >= 1.
        period: epochs from one to the next, >= 1.
        config: settings of the corrector; None takes the defaults.
        embed: maps (model, batch without labels and index) to embeddings [B, D].
        plain: where ``dataset`` has random augmentation, the same samples in the same order without
            it, as dicts.
        batch_size: samples at a time for embeddings, >= 1.

    Attributes:
        corrector: the :class:`als_ext.LabelCorrector`: labels, history, undo.

    Raises:
        TypeError: a data set that is no IndexedItems.
        ValueError: as the LabelCorrector; a ``plain`` of another length; a Trainer that trains on
            another data set; weights that several processes do not share; fewer samples than
            processes.
    """

    def __init__(
        self,
        dataset: IndexedItems,
        num_classes: int | None = None,
        *,
        warmup: int = 2,
        period: int = 2,
        config: CorrectionConfig | None = None,
        embed: Callable[[nn.Module, Item], Tensor] = mean_of_tokens,
        plain: Dataset[Any] | None = None,
        batch_size: int = 256,
    ) -> None:
        self._relabelling = Relabelling(dataset, num_classes, warmup, period, config, plain)
        self.corrector = self._relabelling.corrector
        self._embed = embed
        self._batch_size = batch_size

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Check that the labels are those that are trained on."""
        if train_dataloader.dataset is not self._relabelling.dataset:
            raise ValueError(
                "dataset: expected the Trainer's own train_dataset, whose labels are corrected, "
                f"got another {type(self._relabelling.dataset).__name__}"
            )

    def on_epoch_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Correct the labels if it is time."""
        epoch = math.ceil(state.epoch - 1e-6)  # of a last one that is cut short, its number
        if not self._relabelling.due(epoch, state.num_train_epochs):
            return
        own = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if isinstance(own, BatchALSO):
            own.eval()
        group = all_processes(args.world_size)
        embeddings = self._embeddings(model, train_dataloader.collate_fn, group)
        self._relabelling.correct(embeddings, own, epoch, group)

    def _embeddings(
        self,
        model: nn.Module,
        collate: Callable[[list[Item]], Item],
        group: ProcessGroup | None,
    ) -> Tensor:
        device = next(model.parameters()).device
        loader = DataLoader(
            Subset(self._relabelling.items, self._relabelling.rows(group)),
            self._batch_size,
            collate_fn=collate,
            generator=torch.Generator(),  # a DataLoader would draw from the global one
        )
        parts = []
        with evaluating(model, group):
            for batch in loader:
                inputs = {k: v.to(device) for k, v in batch.items() if k not in ("labels", "index")}
                parts.append(self._embed(model, inputs).float())
        return torch.cat(parts)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the corrector into the checkpoint's folder."""
        if not args.should_save:
            return
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        save_checkpoint(os.path.join(folder, STATE), self.corrector.state_dict())

    def load(self, folder: str) -> None:
        """Take over corrector and labels from a checkpoint's folder.

        Raises:
            ValueError: a checkpoint without a corrector, or of other labels.
        """
        path = os.path.join(folder, STATE)
        if not os.path.exists(path):
            raise ValueError(
                f"resume_from_checkpoint: expected {STATE}, the corrector's state, in {folder}, "
                "which holds none"
            )
        self._relabelling.load_state_dict(load_checkpoint(path))
