"""Label correction over the epochs of a training run, with its history and undo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from als_ext.correction._inputs import (
    Array,
    check_length,
    read_embeddings,
    read_labels,
    read_scores,
)
from als_ext.correction.config import CorrectionConfig
from als_ext.correction.correct import correct
from als_ext.correction.decisions import Decisions, labels_digest
from als_ext.correction.history import RelabelHistory, empty_history
from als_ext.correction.result import CorrectionResult
from als_ext.correction.rows import HERE, Rows, SpreadRows
from als_ext.distributed.processes import Facts, Processes
from als_ext.ops._checks import check_int

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_Inputs = tuple[Tensor, Tensor | None, Tensor | None]  # embeddings, scores, guess


class LabelCorrector:
    """Corrects the labels of a data set step by step while a model trains on them.

    Each step decides about the *original* labels with :func:`correct_labels` and the newest
    embeddings: a relabel that later evidence no longer supports is taken back by itself, and no
    step votes with labels that an earlier one made.

    Args:
        labels: [n] integers in [0, num_classes), torch or numpy; copied.
        num_classes: number of classes, >= 1; None: the highest label + 1.
        config: settings; the defaults where None.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: no labels, a label out of range.

    Note:
        A step takes the memory of :func:`correct_labels` and is not meant for CUDA graphs. State is
        kept on the device of ``labels``, the history on the host.

    Example:
        >>> import torch
        >>> from als_ext import LabelCorrector
        >>> generator = torch.Generator().manual_seed(0)
        >>> truth = torch.arange(200) % 2
        >>> x = torch.randn(200, 8, generator=generator) + 4 * truth[:, None]
        >>> given = truth.clone()
        >>> given[:40] = 1 - given[:40]
        >>> corrector = LabelCorrector(given, 2, CorrectionConfig(metric="l2"))
        >>> result = corrector.step(x, epoch=3)
        >>> int((corrector.labels == truth).sum()), len(corrector.history)
        (200, 40)
        >>> undone = corrector.undo()
        >>> bool((corrector.labels == given).all())
        True
    """

    def __init__(
        self,
        labels: Array,
        num_classes: int | None = None,
        config: CorrectionConfig | None = None,
    ) -> None:
        if config is not None and not isinstance(config, CorrectionConfig):
            raise TypeError(f"config: expected a CorrectionConfig, got {type(config).__name__}")
        device = labels.device if isinstance(labels, Tensor) else torch.device("cpu")
        self._original, self._num_classes = read_labels(labels, num_classes, device)
        self._labels = self._original.clone()
        self._pinned = torch.zeros_like(self._original, dtype=torch.bool)
        self._config = CorrectionConfig() if config is None else config
        self._history = empty_history()
        self._steps = 0
        self._standing: list[int] = []  # steps that undo() can still take back
        self._changed_share = float("nan")

    def __len__(self) -> int:
        return self._original.shape[0]

    def __repr__(self) -> str:
        changed = int((self._labels != self._original).sum())
        return f"LabelCorrector(n={len(self)}, steps={self._steps}, relabelled={changed})"

    @property
    def labels(self) -> Tensor:
        """A copy of the labels now, [n] int64."""
        return self._labels.clone()

    @property
    def original(self) -> Tensor:
        """A copy of the labels as given, [n] int64."""
        return self._original.clone()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self._num_classes

    @property
    def config(self) -> CorrectionConfig:
        """The settings."""
        return self._config

    @property
    def history(self) -> RelabelHistory:
        """Every change so far, undone ones and undos included."""
        return self._history

    @property
    def converged(self) -> bool:
        """Whether the last step changed less than ``stop_share`` of the labels."""
        return self._changed_share < self._config.stop_share

    def step(
        self,
        embeddings: Array,
        scores: Array | None = None,
        epoch: int | None = None,
        guess: Array | None = None,
        group: ProcessGroup | None = None,
        *,
        votes_only: bool = False,
    ) -> CorrectionResult[Tensor]:
        """Correct the labels with new embeddings.

        Args:
            embeddings: [n, D] floating, of the samples in the order of the labels, the model in
                eval mode.
            scores: [n] finite numbers, the higher the more suspect; of samples relabelled before
                they are not heard. None: the neighbours alone decide.
            epoch: recorded in the history, >= 0; None: the number of the step.
            guess: [n] integers in [0, num_classes), a classifier's opinion of the true labels, in
                place of the first guess from neighbourhoods. Not from one that was fitted to the
                given labels: it would confirm them. Not with given suspects.
            votes_only: whether votes alone decide, given labels being no evidence beyond the first
                guess: for mistakes that gather where classes meet. Not with given suspects, not
                with scores.
            group: processes that have the rows of embeddings, scores and guess between them, in
                their order. Each has a corrector of all labels that saw the same steps, and all of
                them call this. None: all rows are here.

        Returns:
            The result, ``old_label`` being the labels before this step. The samples of which the
            trainer must reset the weight are ``result.changed``. With a group it is about the rows
            here; the corrector has all labels.

        Raises:
            TypeError: an argument of another type or dtype.
            ValueError: as :func:`correct_labels`, correctors of a group that differ; on an error
                the labels stay as they were.
            RuntimeError: a process of the group is gone.
        """
        if epoch is None:
            epoch = self._steps
        read = partial(self._read, embeddings, scores, epoch, guess, votes_only)
        if group is None:
            (x, score, opinion), rows = read(len(self)), HERE
        else:
            (x, score, opinion), rows = self._read_together(
                Processes(group), read, {"epoch": epoch, "votes_only": votes_only}
            )
        start, _ = rows.span(len(x))
        own = slice(start, start + len(x))
        current = self._labels[own].to(x.device)
        result = correct(
            x,
            self._original[own].to(x.device),
            current,
            score,
            self._num_classes,
            self._config,
            guess=opinion,
            votes_only=votes_only,
            rows=rows,
        )
        if self._pinned.any():
            pinned = self._pinned[own].to(x.device)
            kept = torch.where(pinned, current, result.new_label)
            result = replace(result, new_label=kept, changed=kept != current)
        device = self._labels.device
        share, margin, label = (
            rows.everywhere(part).to(device)
            for part in (result.share, result.margin, result.new_label)
        )
        at = (label != self._labels).nonzero()[:, 0]
        self._record(at, self._labels[at], label[at], self._steps, epoch, share, margin)
        self._labels = label.clone()
        self._standing.append(self._steps)
        self._steps += 1
        self._changed_share = at.numel() / len(self)
        return result

    def _read(
        self,
        embeddings: Array,
        scores: Array | None,
        epoch: int,
        guess: Array | None,
        votes_only: bool,
        n: int | None = None,
    ) -> _Inputs:
        """Arguments of a step, checked; of n rows, or of any number of them."""
        check_int("epoch", epoch, low=0)
        if votes_only and self._config.suspects != "auto":
            raise ValueError(
                f"votes_only: expected False with suspects={self._config.suspects!r}, got True"
            )
        if votes_only and scores is not None:
            raise ValueError("scores: expected None with votes_only=True, got some")
        x = read_embeddings(embeddings, least=0 if n is None else 2)
        if n is not None:
            check_length("embeddings", x, n)
        rows, device = len(x), x.device
        score = None if scores is None else read_scores(scores, rows, device)
        if guess is None:
            return x, score, None
        if self._config.suspects != "auto":
            raise ValueError(
                f"guess: expected None with suspects={self._config.suspects!r}, got labels"
            )
        least = min(rows, 1)
        opinion, _ = read_labels(guess, self._num_classes, device, least=least, name="guess")
        check_length("guess", opinion, rows)
        return x, score, opinion

    def _read_together(
        self, processes: Processes, read: Callable[[], _Inputs], arguments: Facts
    ) -> tuple[_Inputs, Rows]:
        """Arguments of this process, checked in all; so is that the correctors are the same."""
        found: list[_Inputs] = []

        def check() -> tuple[Facts, Facts]:
            x, score, opinion = read()
            found.append((x, score, opinion))
            settings: Facts = {"columns of embeddings": x.shape[1], "settings": self._config}
            settings |= {"scores given": score is not None, "guess given": opinion is not None}
            settings |= {"num_classes": self._num_classes, **arguments}
            settings["steps before this one"] = self._steps
            for name, state in (
                ("original labels", self._original),
                ("labels", self._labels),
                ("pinned samples", self._pinned),
            ):
                settings[name] = labels_digest(state)
            return settings, {"rows": len(x)}

        rows = [fact["rows"] for fact in processes.agree(check)]
        if sum(rows) != len(self):
            raise ValueError(
                f"embeddings: expected {len(self)} rows over all processes, got {sum(rows)}"
            )
        if sum(rows) < 2:
            raise ValueError(
                f"embeddings: expected at least 2 rows over all processes, got {sum(rows)}"
            )
        return found[0], SpreadRows(processes, rows)

    def undo(self, index: Array | int | None = None, *, pin: bool = False) -> Tensor:
        """Take back the last step, or give samples their original labels.

        Args:
            index: None: the last step that was not undone; labels that something else has changed
                since stay, and so do pinned ones. An int or integers, torch or numpy, positions in
                [0, n): these samples.
            pin: whether these samples keep their labels in all later steps.

        Returns:
            [m] int64, the samples whose labels changed.

        Raises:
            TypeError: ``index`` of another type.
            ValueError: a position out of range, or no step to undo.
        """
        if index is None:
            if not self._standing:
                raise ValueError("undo: expected a step to take back, got none")
            step = self._standing.pop()
            made = (self._history.step == step) & (self._history.epoch >= 0)
            at = self._history.sample[made].to(self._labels.device)
            old = self._history.old[made].to(at.device)
            new = self._history.new[made].to(at.device)
            standing = (self._labels[at] == new) & ~self._pinned[at]
            touched, at, target = at, at[standing], old[standing]
        else:
            step = self._steps - 1
            touched = self._positions(index)
            differs = torch.zeros_like(self._pinned)
            differs[touched] = True
            at = (differs & (self._labels != self._original)).nonzero()[:, 0]
            target = self._original[at]
        self._set(at, target, step)
        if pin:
            self._pinned[touched] = True
        return at

    def decide(self, decisions: Decisions) -> Tensor:
        """Take over what a person decided; these samples keep their labels in all later steps.

        Args:
            decisions: from :func:`als_ext.correction.read_decisions`.

        Returns:
            [m] int64, the samples whose labels changed, ascending.

        Raises:
            ValueError: the decisions belong to other labels; nothing is changed then.
        """
        decided = decisions.apply(self._original, self._num_classes, self._labels)
        at = (decided != self._labels).nonzero()[:, 0]
        self._set(at, decided[at], self._steps - 1)
        self._pinned[decisions.row.to(self._pinned.device)] = True
        return at

    def state_dict(self) -> dict[str, Any]:
        """Everything but the settings; tensors, numbers and lists only."""
        return {
            "original": self._original.clone(),
            "labels": self._labels.clone(),
            "pinned": self._pinned.clone(),
            "history": {f.name: getattr(self._history, f.name) for f in fields(RelabelHistory)},
            "num_classes": self._num_classes,
            "steps": self._steps,
            "standing": list(self._standing),
            "changed_share": self._changed_share,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: a key is missing, or the state belongs to other labels.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"state: expected the keys of state_dict(), got none of {missing}")
        n, classes = state["original"].shape[0], state["num_classes"]
        if (n, classes) != (len(self), self._num_classes):
            raise ValueError(
                f"state: expected {len(self)} labels of {self._num_classes} classes, "
                f"got {n} of {classes}"
            )
        device = self._labels.device
        if not torch.equal(state["original"].to(device), self._original):
            raise ValueError("state: expected the same original labels, got others")
        self._labels = state["labels"].to(device, copy=True)
        self._pinned = state["pinned"].to(device, copy=True)
        self._history = RelabelHistory(**{k: v.cpu() for k, v in state["history"].items()})
        self._steps = state["steps"]
        self._standing = list(state["standing"])
        self._changed_share = state["changed_share"]

    def _positions(self, index: Array | int) -> Tensor:
        if isinstance(index, np.ndarray):
            index = torch.from_numpy(index)
        if isinstance(index, bool) or not isinstance(index, (int, Tensor)):
            raise TypeError(f"index: expected an int or int64 tensor, got {type(index).__name__}")
        at = torch.as_tensor(index, device=self._labels.device).reshape(-1)
        if at.dtype == torch.bool or at.is_floating_point() or at.is_complex():
            raise TypeError(f"index: expected an integer dtype, got {at.dtype}")
        wrong = (at < 0) | (at >= len(self))
        if wrong.any():
            raise ValueError(
                f"index: expected positions in [0, {len(self)}), got {int(at[wrong][0])}"
            )
        return at.long()

    def _set(self, at: Tensor, target: Tensor, step: int) -> None:
        """Give samples labels that no step of the corrector found."""
        missing = torch.full((len(self),), float("nan"))
        self._record(at, self._labels[at], target, step, -1, missing, missing)
        self._labels[at] = target

    def _record(
        self,
        at: Tensor,
        old: Tensor,
        new: Tensor,
        step: int,
        epoch: int,
        share: Tensor,
        margin: Tensor,
    ) -> None:
        """Append one entry a position of ``at``; ``share`` and ``margin`` are of all samples."""
        sample = at.cpu()
        entry = RelabelHistory(
            step=torch.full_like(sample, step),
            epoch=torch.full_like(sample, epoch),
            sample=sample,
            old=old.cpu(),
            new=new.cpu(),
            share=share.cpu()[sample],
            margin=margin.cpu()[sample],
        )
        self._history = RelabelHistory(
            **{
                f.name: torch.cat([getattr(self._history, f.name), getattr(entry, f.name)])
                for f in fields(RelabelHistory)
            }
        )
