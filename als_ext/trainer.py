"""The Trainer: one loop around a method, with metrics, checkpoints and exact resuming."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from als_ext.augment import are_images, make_views
from als_ext.checkpoint import (
    check_same_settings,
    load_checkpoint,
    load_model_state,
    save_checkpoint,
)
from als_ext.config import RESUME_MAY_CHANGE, TrainConfig
from als_ext.correction import labels_digest
from als_ext.data import IndexedDataset, TensorBatches, as_labels, as_positions
from als_ext.embedding import make_embedder
from als_ext.io import remove_left_overs
from als_ext.loader import LoaderBatches
from als_ext.methods import METHODS, Task
from als_ext.metrics import FIELDS, FILES, MetricsWriter, Record, label_metrics
from als_ext.ops._checks import check_choice, check_int
from als_ext.progress import ProgressBar
from als_ext.runtime import reproducible, resolve_device, rng_state, set_rng_state
from als_ext.weights import SampleWeights

# The activations of a larger batch are more than malloc keeps: on a CPU each is paged in anew.
_EVAL_BATCH = 256
CHECKPOINT = "checkpoint.pt"
Array = Tensor | NDArray[Any]
_SAVED = (  # in a checkpoint
    *("config", "data", "model", "method", "batches"),
    *("labels", "losses", "history", "rng", "seconds"),
)


def _tensor(name: str, value: Array) -> Tensor:
    """A tensor that shares an array's memory; a copy of a read-only one and of float64."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iufb":
            raise TypeError(f"{name}: expected numbers, got dtype {value.dtype}")
        dtype = np.float32 if value.dtype == np.float64 else value.dtype.newbyteorder("=")
        return torch.from_numpy(np.require(value, dtype=dtype, requirements=["C", "W"]))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor or an array, got {type(value).__name__}")
    return value


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a run gives.

    Attributes:
        labels: int64 [n] on the CPU, the labels after the last epoch.
        given_labels: int64 [n] on the CPU, the labels before the first.
        history: one record an epoch; the keys are ``als_ext.metrics.FIELDS``.
        label_metrics: accuracy of the labels before and after, precision and recall of the
            relabels (:func:`als_ext.metrics.label_metrics`); None where undefined.
        report: per-sample tensors [n] of the last correction: share, margin, suspect; of a filter
            suspect alone; None for a method that judges no label.
        losses: float32 [n] on the CPU, the latest training loss of each sample against the label
            that it had then, nats.
        log_pi: float32 [n] on the CPU, log π after the last epoch, nats; None for a method whose
            optimizer has no :class:`als_ext.SampleWeights`.
        test_accuracy: after the LAST epoch, in [0, 1]; None without test samples.
        seconds: training time, pauses between resumes left out.
        neighbours: int32 [s, up to 8] on the CPU, the nearest neighbours of each suspect of the
            report, in order, nearest first; None for a method that has none to tell.
    """

    labels: Tensor
    given_labels: Tensor
    history: list[Record]
    label_metrics: Record
    report: dict[str, Tensor] | None
    losses: Tensor
    log_pi: Tensor | None
    test_accuracy: float | None
    seconds: float
    neighbours: Tensor | None = None


class Trainer:
    """Train a classifier on labels that may be wrong.

    Args:
        model: maps inputs [B, ...] to logits [B, C]. It is trained in place.
        config: the settings.
        num_classes: C, >= 2.
        out: folder for ``checkpoint.pt``, ``metrics.jsonl`` and ``metrics.csv``; made if it is not
            there. None writes nothing.
        progress: show a bar on stderr; None shows it where stderr is a terminal; a display of rich
            gets it as one more.

    Raises:
        ValueError: an unknown method, device or embedding layer.

    Note:
        A resumed run gives the same bits as an unbroken one on the same machine, torch version and
        number of threads. The training step never waits for the device: losses stay there and are
        read once an epoch. The caller's random generators are left as they were.

    Example:
        >>> import torch
        >>> from als_ext import Trainer, TrainConfig
        >>> x = torch.randn(64, 5)
        >>> model = torch.nn.Linear(5, 2)
        >>> trainer = Trainer(model, TrainConfig(method="erm", epochs=2), num_classes=2)
        >>> result = trainer.fit(x, (x[:, 0] > 0).long(), test=(x, (x[:, 0] > 0).long()))
        >>> len(result.history)
        2
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig | None = None,
        *,
        num_classes: int,
        out: str | os.PathLike[str] | None = None,
        progress: bool | Progress | None = None,
    ) -> None:
        self.config = TrainConfig() if config is None else config
        check_choice("method", self.config.method, METHODS)
        check_int("num_classes", num_classes, low=2)
        self.num_classes = num_classes
        self.device = resolve_device(self.config.device)
        self.model = model
        self._kind = METHODS[self.config.method]
        self._kind.check(self.config)
        if self._kind.corrects:
            make_embedder(model, self.config.embedding)  # says now what would fail after a warm-up
        self._out = None if out is None else Path(out)
        self._progress = progress

    def fit(
        self,
        data: Array | Dataset[Any],
        labels: Array | None = None,
        *,
        test: tuple[Array, Array] | Dataset[Any] | None = None,
        true_labels: Array | None = None,
        plain: Dataset[Any] | None = None,
        clean: tuple[Array, ...] | None = None,
        kept: Array | None = None,
        resume: bool = False,
    ) -> TrainResult:
        """Train for ``config.epochs`` epochs; more where the method says so.

        Args:
            data: inputs [n, ...], a tensor or an array (one of float64 as float32), which move to
                the device as a whole; or a map-style Dataset whose items are x or start with x.
                Whether they are images is seen by the first of them.
            labels: integers [n] in [0, C), the labels to train on, right or wrong; None takes those
                of the Dataset. They are copied.
            test: inputs and labels, or a Dataset of (x, label), for the accuracy after each epoch.
            true_labels: integers [n], only to measure with; None where they are unknown.
            plain: for a Dataset with random augmentation, one of the same samples in the same order
                without it: embeddings are taken from these.
            clean: inputs [m, ...] and labels, integers [m], that are known to be right, for the
                methods that need some; as a third element integers [m], their positions in the
                training set, for those that need to know which they are.
            kept: integers [m], m >= 0, positions of samples whose labels no correction may change,
                because a person decided them.
            resume: go on from ``out/checkpoint.pt``; without that file start from the beginning.

        Returns:
            :class:`TrainResult`.

        Raises:
            FileExistsError: ``out`` holds a checkpoint and ``resume`` is false.
            TypeError: an argument of another type or dtype.
            ValueError: labels or positions out of range or of another length; a checkpoint that is
                damaged or belongs to other data, settings or another model.
            RuntimeError: the training loss is not finite.
        """
        self._set_up(data, labels, test, true_labels, plain, clean, kept)
        saved = self._open(resume)
        self._epochs = self._method.epochs()
        total = self._epochs * len(self._batches)
        with (
            reproducible(self.config.seed, self.device, self.config.deterministic),
            ProgressBar(self.config.method, total, self._progress) as bar,
        ):
            if saved is not None:
                self._restore(saved)
            self._writer = None if self._out is None else MetricsWriter(self._out, self._history)
            self._started = self._saved = time.monotonic()
            self._train(bar, total)
        return self._result()

    def _train(self, bar: ProgressBar, total: int) -> None:
        batches, method = self._batches, self._method
        while batches.epoch < self._epochs:
            epoch = batches.epoch
            method.train_mode()
            if not method.trains:
                batches.set_epoch(epoch + 1)  # nothing is loaded
            for x, label, index in batches if method.trains else ():
                done = epoch * len(batches) + batches.position
                lr = method.lr_at(done - 1, len(batches))
                for group in method.optimizer.param_groups:
                    group["lr"] = lr
                self._losses.index_copy_(0, index, method.step(method.inputs(x), label, index))
                bar.step_to(done)
                self._checkpoint_if_due(done)
            method.eval_mode()
            extra = method.after_epoch(epoch + 1, self._losses)
            bar.note(self._record(epoch + 1, extra))
            method.train_mode()
            self._save()
        method.eval_mode()

    def _set_up(
        self,
        data: Array | Dataset[Any],
        labels: Array | None,
        test: tuple[Array, Array] | Dataset[Any] | None,
        true_labels: Array | None,
        plain: Dataset[Any] | None,
        clean: tuple[Array, ...] | None,
        kept: Array | None,
    ) -> None:
        config, device = self.config, self.device
        if isinstance(data, np.ndarray):
            data = _tensor("data", data)
        source = IndexedDataset(data, labels)
        self._given = as_labels(source.labels, num_classes=self.num_classes)
        n = len(self._given)
        self._true = None
        if true_labels is not None:
            self._true = as_labels(
                true_labels, n=n, num_classes=self.num_classes, name="true_labels"
            )
        self._inputs: tuple[Tensor, ...] | Dataset[Any]
        self._batches: TensorBatches | LoaderBatches
        if isinstance(data, Tensor):
            if plain is not None:
                raise ValueError("plain: expected None where data is a tensor, got a data set")
            data = data.to(device)
            self._inputs = (data,)
            live = self._given.to(device, copy=True)
            self._batches = TensorBatches(data, live, config.batch_size, seed=config.seed)
        else:
            if plain is not None and len(plain) != n:  # type: ignore[arg-type]
                raise ValueError(
                    f"plain: expected the {n} samples of data in the same order, got {len(plain)}"  # type: ignore[arg-type]
                )
            self._inputs = data if plain is None else plain
            self._batches = LoaderBatches(
                source,
                config.batch_size,
                seed=config.seed,
                device=device,
                num_workers=config.num_workers,
            )
        if isinstance(test, tuple):
            test_labels = as_labels(
                test[1], n=len(test[0]), num_classes=self.num_classes, name="test labels"
            )
            test = (_tensor("test inputs", test[0]), test_labels)
        self._test = test
        known, positions = self._check_clean(clean, n)
        decided = None if kept is None or not len(kept) else as_positions(kept, n, name="kept")
        images = self._are_images(data)
        augment = config.augment
        if augment == "auto":
            augment = "shift" if images and self._kind.augments else "none"
        self._method = self._kind(
            Task(
                model=self.model.to(device),
                config=config,
                num_classes=self.num_classes,
                labels=self._batches.labels,
                device=device,
                collect=self._collect,
                clean=known,
                clean_index=positions,
                images=images,
                kept=None if decided is None else decided.to(self._batches.labels.device),
                augment=make_views(augment),
            )
        )
        self._losses = torch.zeros(n, device=device)
        self._history: list[Record] = []
        self._elapsed = 0.0  # seconds of the runs that this one resumes
        self._identity = {
            "samples": n,
            "labels sha256": labels_digest(self._given),
            "epochs in all": self._method.epochs(),
        }
        if known is not None:
            self._identity["clean labels sha256"] = labels_digest(known[1])
        if decided is not None:
            self._identity["kept sha256"] = labels_digest(decided)

    def _check_clean(
        self, clean: tuple[Array, ...] | None, n: int
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """Inputs and labels of the clean samples, and their positions, on the device."""
        if self._kind.needs_clean and (clean is None or not len(clean[0])):
            raise ValueError(
                f"clean: expected samples whose labels are known to be right, which "
                f"{self.config.method} needs, got none"
            )
        if clean is None:
            return None, None
        if len(clean) not in (2, 3):
            raise ValueError(
                f"clean: expected inputs, labels and perhaps positions, got {len(clean)} elements"
            )
        x, labels, *rest = clean
        labels = as_labels(labels, n=len(x), num_classes=self.num_classes, name="clean labels").to(
            self.device
        )
        known = (_tensor("clean inputs", x).to(self.device), labels)
        if not rest:
            return known, None
        positions = as_positions(rest[0], n, name="clean positions")
        if len(positions) != len(x):
            raise ValueError(f"clean positions: expected {len(x)}, got {len(positions)}")
        return known, positions.to(self.device)

    def _are_images(self, data: Tensor | Dataset[Any]) -> bool:
        """Whether the samples are images that can be moved about, by the first of them.

        Of a Dataset it is asked only for a method that wants to know, and as it will be asked for
        all: in the workers, in which it may open its files.
        """
        if isinstance(data, Tensor):
            return are_images(data)
        if not self._kind.augments:
            return False
        with reproducible(self.config.seed, self.device, self.config.deterministic):  # it may draw
            return all(are_images(x) for x, *_ in self._eval_batches(Subset(data, [0])))

    def _open(self, resume: bool) -> dict[str, Any] | None:
        """Check and make the folder; the checkpoint to go on from, if there is one."""
        if self._out is None:
            if resume:
                raise ValueError("resume: expected a folder 'out' to resume from, got None")
            return None
        checkpoint = self._out / CHECKPOINT
        if not resume:
            for name in (CHECKPOINT, *FILES):
                if (self._out / name).exists():
                    raise FileExistsError(
                        f"out: expected a folder without a run, got {self._out} with {name} in "
                        "it; resume it or choose another"
                    )
        self._out.mkdir(parents=True, exist_ok=True)
        remove_left_overs(self._out)
        if not checkpoint.exists():
            return None
        saved = load_checkpoint(checkpoint)
        if missing := [name for name in _SAVED if name not in saved]:
            raise ValueError(f"checkpoint: {checkpoint} is damaged: it lacks {missing[0]!r}")
        return saved

    def embeddings(self) -> Tensor:
        """Embeddings float32 [n, D] of the training samples of ``fit``, in order, on the device."""
        return self._collect(make_embedder(self.model, self.config.embedding))

    @torch.no_grad()
    def _collect(self, function: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> Tensor:
        inputs = self._inputs
        if rows is not None:
            if isinstance(inputs, tuple):
                inputs = tuple(part[rows.to(part.device)] for part in inputs)
            else:
                inputs = Subset(inputs, rows.tolist())
        self._method.eval_mode()
        with self._method.amp.autocast():
            return torch.cat([function(x) for x, *_ in self._eval_batches(inputs)])

    @torch.no_grad()
    def _test_accuracy(self) -> float | None:
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        count = 0
        for x, label in self._eval_batches(self._test):
            with self._method.amp.autocast():
                right += (self._method.predict(x).argmax(1) == label).sum()
            count += len(label)
        return int(right) / count if count else None

    def _eval_batches(
        self, data: tuple[Tensor, ...] | Dataset[Any] | None
    ) -> Iterator[Sequence[Tensor]]:
        if data is None:
            return
        if isinstance(data, tuple):
            for start in range(0, len(data[0]), _EVAL_BATCH):
                yield [part[start : start + _EVAL_BATCH].to(self.device) for part in data]
            return
        generator = torch.Generator()  # a DataLoader draws from it, not from the global one
        for batch in DataLoader(
            data, _EVAL_BATCH, num_workers=self.config.num_workers, generator=generator
        ):
            whole = batch if isinstance(batch, (list, tuple)) else (batch,)
            yield [part.to(self.device) for part in whole]

    def _record(self, epoch: int, extra: Record) -> str:
        """Measure an epoch, note it in the history and the files; one line to show."""
        labels = self._batches.labels.cpu()
        record: Record = dict.fromkeys(FIELDS)
        shown = f"epoch {epoch}/{self._epochs}"
        if self._method.trains:
            loss = float(self._losses.mean())
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"training loss: expected a finite mean, got {loss} in epoch {epoch}"
                )
            record.update(lr=self._method.optimizer.param_groups[0]["lr"], train_loss=loss)
            shown += f": loss {loss:.4f}"
        record.update(
            epoch=epoch,
            test_accuracy=self._test_accuracy() if self._method.learns_labels(epoch) else None,
            label_accuracy=label_metrics(self._given, labels, self._true)["label_accuracy_after"],
            changed=int((labels != self._given).sum()),
            seconds=self._seconds(),
        )
        record.update(extra)
        self._history.append(record)
        if self._writer is not None:
            self._writer.append(record)
        accuracy = record["test_accuracy"]
        return shown if accuracy is None else f"{shown}, test accuracy {accuracy:.4f}"

    def _seconds(self) -> float:
        return self._elapsed + time.monotonic() - self._started

    def _checkpoint_if_due(self, step: int) -> None:
        every = self.config.checkpoint_steps
        late = time.monotonic() - self._saved > self.config.checkpoint_seconds
        if late or (every is not None and step % every == 0):
            self._save()

    def _save(self) -> None:
        """Write all that :meth:`_restore` needs; called in train mode, between two steps."""
        if self._out is None:
            return
        state = {
            "config": self.config.to_dict(),
            "data": self._identity,
            "model": self.model.state_dict(),
            "method": self._method.state_dict(),
            "batches": self._batches.state_dict(),
            "labels": self._batches.labels,
            "losses": self._losses,
            "history": self._history,
            "rng": rng_state(self.device),
            "seconds": self._seconds(),
        }
        save_checkpoint(self._out / CHECKPOINT, state)
        self._saved = time.monotonic()

    def _restore(self, state: dict[str, Any]) -> None:
        check_same_settings(state["config"], self.config.to_dict(), RESUME_MAY_CHANGE)
        check_same_settings(state["data"], self._identity)
        load_model_state(self.model, state["model"])
        self._method.load_state_dict(state["method"])
        self._batches.load_state_dict(state["batches"])
        self._batches.labels.copy_(state["labels"])
        self._losses.copy_(state["losses"])
        self._history = state["history"]
        self._elapsed = state["seconds"]
        set_rng_state(state["rng"], self.device)

    def _result(self) -> TrainResult:
        labels = self._batches.labels.cpu().clone()
        weights: SampleWeights | None = getattr(self._method.optimizer, "weights", None)
        return TrainResult(
            labels=labels,
            given_labels=self._given,
            history=self._history,
            label_metrics=label_metrics(self._given, labels, self._true),
            report=self._method.report(),
            losses=self._losses.cpu(),
            log_pi=None if weights is None else weights.log_pi().cpu(),
            test_accuracy=self._history[-1]["test_accuracy"],
            seconds=self._history[-1]["seconds"] or 0.0,
            neighbours=self._method.neighbours(),
        )
