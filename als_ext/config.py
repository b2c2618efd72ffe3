"""The settings of a training run: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from als_ext.augment import MODES as AUGMENT_MODES
from als_ext.correction import CorrectionConfig
from als_ext.ops._checks import check_choice, check_float, check_int, check_type
from als_ext.runtime import AMP_MODES, half_cosine

# What may change between a run and its resumption: none of it changes a result.
RESUME_MAY_CHANGE = frozenset({"checkpoint_seconds", "checkpoint_steps", "num_workers"})

_LARGE = 10_000
_SMALL_RECIPE: dict[str, Any] = {"epochs": 20, "batch_size": 32}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of :class:`als_ext.Trainer`.

    Args:
        method: a name in :data:`als_ext.methods.METHODS`: "erm", "also", "als-lc" or a baseline
            (:mod:`als_ext.baselines`).
        epochs: passes over the training samples, >= 1; those without labels come on top.
        batch_size: samples a step, >= 1.
        lr: peak learning rate of the parameters, > 0.
        lr_schedule: "cosine" (``lr`` in the warm-up, then a half cosine to 0 over the other epochs)
            or "constant". Where the warm-up would take the whole run (which "als-lc" refuses) the
            cosine falls in the second half of it. With "cosine", "als-lc" with epochs without
            labels has one half cosine for these, one for the warm-up and one for the rest.
        weight_decay: L2 coefficient of the parameters, >= 0; 0 in epochs without labels.
        seed: seed of the order of the batches and of torch's global generators, >= 0.
        device: "auto", "cpu", "cuda" or "cuda:N".
        amp: "off", "bf16" (autocast) or "f16" (autocast with a gradient scaler).
        augment: "shift" trains on images shifted by a few whole pixels, "affine" on random affine
            views (:mod:`als_ext.augment`), "none" on the samples as they are, but for views that
            "als-lc" learns from without labels; "auto" is "shift" for "als-lc" where the samples
            are images, floating and of 12 x 12 and more, else "none".
        deterministic: ask torch for deterministic algorithms while training.
        embedding: name of the layer whose output is the embedding (``model.get_submodule``); None
            takes the model's own ``embed`` function.
        also: further arguments of :class:`als_ext.ALSO` for "also" and "als-lc".
        warmup: epochs before the first correction of "als-lc", >= 1; after epochs without labels
            there is one at once, and this is the second.
        period: epochs between corrections, >= 1.
        correction: settings of the :class:`als_ext.LabelCorrector` of "als-lc".
        settings: what only the method knows, by name: the fields of its ``Settings``.
        checkpoint_seconds: seconds between checkpoints inside an epoch, > 0.
        checkpoint_steps: steps between checkpoints inside an epoch; None goes by time alone.
        num_workers: worker processes where the samples are a Dataset.

    Raises:
        TypeError: a setting of another type.
        ValueError: a setting out of its range.

    Example:
        >>> TrainConfig(method="erm", epochs=2).lr
        0.001
    """

    method: str = "als-lc"
    epochs: int = 12
    batch_size: int = 128
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    weight_decay: float = 0.0
    seed: int = 0
    device: str = "auto"
    amp: str = "off"
    augment: str = "auto"
    deterministic: bool = True
    embedding: str | None = None
    also: Mapping[str, Any] = field(default_factory=dict)
    warmup: int = 4
    period: int = 4
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_seconds: float = 60.0
    checkpoint_steps: int | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("method", "device"):
            check_type(name, getattr(self, name), str)
        for name in ("also", "settings"):
            check_type(name, getattr(self, name), Mapping)
        check_type("deterministic", self.deterministic, bool)
        check_type("embedding", self.embedding, str, type(None))
        check_type("correction", self.correction, CorrectionConfig)
        for name in ("epochs", "batch_size", "warmup", "period"):
            check_int(name, getattr(self, name), low=1)
        check_int("seed", self.seed, low=0, high=2**63 - 1)
        check_int("num_workers", self.num_workers, low=0)
        if self.checkpoint_steps is not None:
            check_int("checkpoint_steps", self.checkpoint_steps, low=1)
        for name in ("lr", "checkpoint_seconds"):
            check_float(name, getattr(self, name), low=0.0, open_low=True)
        check_float("weight_decay", self.weight_decay, low=0.0)
        check_choice("lr_schedule", self.lr_schedule, ("cosine", "constant"))
        check_choice("amp", self.amp, AMP_MODES)
        check_choice("augment", self.augment, AUGMENT_MODES)

    @classmethod
    def recommended(cls, n: int, **settings: Any) -> TrainConfig:
        """The recipe for n training samples, with ``settings`` over it.

        From 10,000 samples on it is that of MNIST; below, epochs are short, so there are more. In a
        run of few epochs the warm-up takes at most half of them.
        """
        recipe = {} if n >= _LARGE else _SMALL_RECIPE
        full = cls(**{**recipe, **settings})
        if "warmup" in settings or full.warmup <= full.epochs // 2:
            return full
        return dataclasses.replace(full, warmup=max(1, full.epochs // 2))

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0: a function, so there is no state to save."""
        warmup = self.warmup if self.warmup < self.epochs else self.epochs // 2
        after = step - warmup * steps_per_epoch
        if self.lr_schedule == "constant" or after < 0:
            return self.lr
        rest = (self.epochs - warmup) * steps_per_epoch
        return half_cosine(self.lr, after, rest)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain types, as they stand in a checkpoint."""
        return dataclasses.asdict(self)
