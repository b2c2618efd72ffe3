"""The figures of a cell, and their mean and standard deviation over seeds."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from als_ext.compare.store import Result
from als_ext.metrics import Record, detection_metrics
from als_ext.trainer import TrainResult

LAST = 10  # epochs of the mean that the Co-teaching protocol reports
# Figures that are averaged over seeds, in the order of the tables; shares but for the last two.
FIGURES = (
    "test_accuracy",  # after the last epoch
    "test_accuracy_last10",  # mean of the last training's last ten epochs; null if it had fewer
    "test_accuracy_best",  # of its best epoch: chosen by the test labels, so an oracle
    "detection_precision",
    "detection_recall",
    "detection_f1",
    "label_accuracy_before",
    "label_accuracy_after",
    "relabel_precision",
    "relabel_recall",
    "noise_rate",
    "epochs",
    "seconds",
)


def detected(done: TrainResult) -> Tensor | None:
    """bool [n], samples whose given label the method took to be wrong: suspected or changed.

    None for a method that says nothing about labels.
    """
    if done.report is None:
        return None
    changed = done.labels != done.given_labels
    suspect = done.report.get("suspect")
    return changed if suspect is None else changed | suspect.bool()


def cell_figures(done: TrainResult, true: Tensor | None, epochs: int) -> Record:
    """What is measured beside the figures of ``als-ext run``.

    Args:
        done: the training's result.
        true: int64 [n]; None where nobody knows them.
        epochs: of one training. A method that trains more than once is measured in its last one.
    """
    before = max(0, len(done.history) - epochs)
    accuracies = [record["test_accuracy"] for record in done.history[before:]]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    best = max(known, default=None)
    found = detected(done)
    names = ("detection_precision", "detection_recall", "detection_f1", "detected")
    return {
        "test_accuracy_last10": statistics.fmean(known[-LAST:]) if len(known) >= LAST else None,
        "test_accuracy_best": best,
        "best_epoch": None if best is None else 1 + before + accuracies.index(best),
        **(
            dict.fromkeys(names)
            if found is None or true is None
            else detection_metrics(found, done.given_labels, true)
        ),
        "epochs": len(done.history),
    }


@dataclass(frozen=True)
class Average:
    """A figure over seeds.

    Attributes:
        mean: of the seeds in which the figure is defined.
        std: with n - 1; None for a single seed.
        seeds: how many these are.
    """

    mean: float
    std: float | None
    seeds: int


@dataclass(frozen=True)
class Row:
    """What the seeds of one data set, noise and method gave: ``figures`` by name."""

    dataset: str
    noise: str
    method: str
    seeds: int
    figures: dict[str, Average]


def average(values: Sequence[float]) -> Average:
    """Mean and standard deviation of one value or more."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Average(statistics.fmean(values), std, len(values))


def aggregate(results: Iterable[Result]) -> list[Row]:
    """One row for each data set, noise and method with a finished cell, in order of appearance."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        if result["status"] == "done":
            key = (result["dataset"], result["noise"], result["method"])
            groups.setdefault(key, []).append(result)
    return [
        Row(
            *key,
            seeds=len(group),
            figures={
                name: average(values)
                for name in FIGURES
                if (values := [r[name] for r in group if _is_number(r.get(name))])
            },
        )
        for key, group in groups.items()
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # NaN is not
