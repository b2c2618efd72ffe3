"""One training of one method from the settings of a command: ``run`` and ``compare`` share it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from als_ext import __version__
from als_ext.cli.inputs import RunData
from als_ext.config import TrainConfig
from als_ext.methods import METHODS
from als_ext.metrics import Record
from als_ext.models import MLP, build_model
from als_ext.ops._checks import check_choice
from als_ext.runtime import seeded
from als_ext.trainer import Trainer, TrainResult

DEFAULTS: dict[str, Any] = {
    "dataset": "digits",
    "data_dir": None,
    "noise": None,
    "labels": None,
    "decisions": [],
    "method": ["erm", "als-lc"],
    "setting": [],
    "clean_per_class": 0,
    "model": "auto",
    "embedding": None,
    "epochs": None,
    "batch_size": None,
    "lr": None,
    "warmup": None,
    "period": None,
    "seed": 0,
    "device": "auto",
    "amp": "off",
    "augment": "auto",
}
REALISED = "realised"  # as a method's noise_rate: that of the labels
_OF_CONFIG = ("epochs", "batch_size", "lr", "warmup", "period", "seed", "device", "amp", "augment")


def check_methods(names: Collection[str], clean_per_class: int) -> None:
    """Refuse methods that are not there, and those that need a clean subset without one."""
    for name in names:
        check_choice("method", name, METHODS)
        if METHODS[name].needs_clean and not clean_per_class:
            raise ValueError(
                f"clean-per-class: expected >= 1 for {name}, which needs labels known to be right, "
                "got 0"
            )


def told_rate(own: dict[str, Any], noise_rate: float | None) -> dict[str, Any]:
    """A method's own settings, with the noise rate of the labels where they ask for it.

    Raises:
        ValueError: they ask, and nobody knows it.
    """
    if own.get("noise_rate") != REALISED:
        return own
    if noise_rate is None:
        raise ValueError(
            "noise_rate: expected a number where the true labels are unknown, got 'realised'"
        )
    return {**own, "noise_rate": noise_rate}


def train_config(
    name: str, settings: dict[str, Any], own: dict[str, Any], n: int, **more: Any
) -> TrainConfig:
    """The recommended settings for n samples, with those that were given over them."""
    return TrainConfig.recommended(
        n,
        method=name,
        settings=own,
        embedding=settings["embedding"],
        **{key: settings[key] for key in _OF_CONFIG if settings[key] is not None},
        **more,
    )


def make_trainer(
    name: str,
    settings: dict[str, Any],
    own: dict[str, Any],
    data: RunData,
    *,
    out: Path | None,
    progress: bool | Progress | None,
    **more: Any,
) -> Trainer:
    """A Trainer with a new model.

    Args:
        name: the method.
        settings: those of the command, by the names in ``DEFAULTS``.
        own: settings that only the method knows; ``told_rate`` is applied to them.
        data: what will be trained on.
        out: folder of its checkpoint and metrics.
        progress: as for :class:`als_ext.Trainer`.
        more: further arguments of :class:`als_ext.TrainConfig`.

    Raises:
        ValueError: as ``told_rate``; settings that do not fit.
    """
    own = told_rate(own, data.noise_rate)
    config = train_config(name, settings, own, len(data.given_labels), **more)
    with seeded(settings["seed"]):  # every method starts from the same weights
        model = build_model(settings["model"], data.x_train.shape[1:], data.num_classes)
    return Trainer(model, config, num_classes=data.num_classes, out=out, progress=progress)


def use_threads(threads: int | None, trainers: Collection[Trainer]) -> None:
    """Set torch's CPU threads; None leaves them, but for the MLP."""
    if threads is None and all(isinstance(t.model, MLP) for t in trainers):
        threads = 1  # its steps are shorter than waiting for a second thread on a busy machine
    if threads is not None:
        torch.set_num_threads(threads)


def fit(
    trainer: Trainer, data: RunData, clean: tuple[Tensor, Tensor, Tensor] | None, *, resume: bool
) -> TrainResult:
    """Train on the given labels, measured with the true ones where they are known."""
    return trainer.fit(
        data.x_train,
        data.given_labels,
        test=data.test,
        true_labels=data.true_labels,
        clean=clean,
        kept=data.kept,
        resume=resume,
    )


def describe(settings: dict[str, Any], data: RunData, trainer: Trainer) -> dict[str, Any]:
    """What was trained on what."""
    kind, colon, rest = settings["dataset"].partition(":")
    return {
        "version": __version__,
        "dataset": kind + colon + Path(rest).name,
        "samples": len(data.given_labels),
        "noise": data.noise,
        "noise_rate": data.noise_rate,
        "clean_per_class": settings["clean_per_class"],
        "model": type(trainer.model).__name__,
        "epochs": trainer.config.epochs,
        "seed": trainer.config.seed,
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
    }


def figures(done: TrainResult) -> Record:
    """What came of it."""
    return {
        "test_accuracy": done.test_accuracy,
        **done.label_metrics,
        "seconds": round(done.seconds, 3),
        "relabelled": int((done.labels != done.given_labels).sum()),
    }
