"""What a run measures: label metrics, and one record an epoch in JSONL and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from als_ext.io import atomic_write_text, named_errors

Record = dict[str, int | float | None]

FIELDS = (
    "epoch",  # 1-based number of finished epochs
    "lr",  # learning rate of the epoch's last step; null for a method without steps
    "train_loss",  # mean loss of the epoch's samples, nats: against the labels in use, or of views
    # in epochs without labels; null without steps
    "test_accuracy",
    "label_accuracy",  # share of the labels in use that are right; null without true labels
    "changed",  # labels that differ from the given ones after this epoch
    "suspects",  # samples suspected by this epoch's correction; null where there was none
    "evidence",  # 1 if als-lc took given labels for evidence in it, 0 if not; null for others
    "seconds",  # training time since the start of the run, pauses between resumes left out
)


FILES = ("metrics.jsonl", "metrics.csv")


def _share(part: Tensor, whole: Tensor) -> float | None:
    total = int(whole.sum())
    return int((part & whole).sum()) / total if total else None


def label_metrics(given: Tensor, corrected: Tensor, true: Tensor | None) -> Record:
    r"""Measure a correction of labels against the true ones.

    .. math:: \text{precision} = \frac{|\{i: \hat y_i \ne \tilde y_i, \hat y_i = y_i\}|}
              {|\{i: \hat y_i \ne \tilde y_i\}|}, \qquad
              \text{recall} = \frac{|\{i: \tilde y_i \ne y_i, \hat y_i = y_i\}|}
              {|\{i: \tilde y_i \ne y_i\}|}

    with the given labels :math:`\tilde y`, the corrected :math:`\hat y` and the true :math:`y`.

    Args:
        given: int64 [n], the labels before.
        corrected: int64 [n], the labels after.
        true: int64 [n], or None where nobody knows them.

    Returns:
        label_accuracy_before, label_accuracy_after, relabel_precision (of the changed labels the
        share now right), relabel_recall (of the wrong labels the share now right), each in [0, 1];
        None where it is undefined: true labels unknown, no label changed, or no label wrong.

    Example:
        >>> given, true = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 1])
        >>> label_metrics(given, torch.tensor([0, 0, 1, 0]), true)["relabel_precision"]
        0.5
    """
    if true is None:
        names = ("label_accuracy_before", "label_accuracy_after", "relabel_precision")
        return dict.fromkeys((*names, "relabel_recall"))
    everything = torch.ones_like(true, dtype=torch.bool)
    right = corrected == true
    return {
        "label_accuracy_before": _share(given == true, everything),
        "label_accuracy_after": _share(right, everything),
        "relabel_precision": _share(right, corrected != given),
        "relabel_recall": _share(right, given != true),
    }


def detection_metrics(detected: Tensor, given: Tensor, true: Tensor) -> Record:
    r"""Measure a search for wrong labels.

    .. math:: P = \frac{|D \cap W|}{|D|}, \qquad R = \frac{|D \cap W|}{|W|}, \qquad
              F_1 = \frac{2 |D \cap W|}{|D| + |W|}, \qquad
              W = \{i: \tilde y_i \ne y_i\}

    with the detected samples :math:`D`, the given labels :math:`\tilde y` and the true :math:`y`.

    Args:
        detected: bool [n], samples whose label is taken to be wrong.
        given: int64 [n], the labels given.
        true: int64 [n].

    Returns:
        detection_precision, detection_recall, detection_f1, each in [0, 1], None where there is
        nothing to divide by; and detected, the number of them.

    Example:
        >>> given, true = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 1])
        >>> detection_metrics(torch.tensor([True, True, False, False]), given, true)["detection_f1"]
        0.5
    """
    wrong = given != true
    hits, sizes = int((detected & wrong).sum()), int(detected.sum()) + int(wrong.sum())
    return {
        "detection_precision": _share(wrong, detected),
        "detection_recall": _share(detected, wrong),
        "detection_f1": 2 * hits / sizes if sizes else None,
        "detected": int(detected.sum()),
    }


class MetricsWriter:
    """Keeps ``metrics.jsonl`` and ``metrics.csv`` of a folder: one line an epoch.

    Opening rewrites both from ``history``, so lines of an epoch that a killed run had written, but
    not saved in its checkpoint, are gone before that epoch is run again.

    Args:
        folder: where the files are; it must exist.
        history: the records to start from.
    """

    def __init__(self, folder: str | os.PathLike[str], history: Sequence[Record] = ()) -> None:
        self._json, self._csv = (Path(folder) / name for name in FILES)
        lines = "".join(map(self._json_line, history))
        rows = ",".join(FIELDS) + "\n" + "".join(map(self._csv_line, history))
        atomic_write_text(self._json, lines, overwrite=True)
        atomic_write_text(self._csv, rows, overwrite=True)

    def append(self, record: Record) -> None:
        """Add a record (keys: ``FIELDS``) to both files."""
        for path, line in ((self._json, self._json_line), (self._csv, self._csv_line)):
            with named_errors(path), path.open("a", encoding="utf-8", newline="") as file:
                file.write(line(record))

    @staticmethod
    def _json_line(record: Record) -> str:
        return json.dumps(record, allow_nan=False) + "\n"

    @staticmethod
    def _csv_line(record: Record) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(record.get(name) for name in FIELDS)
        return text.getvalue()
