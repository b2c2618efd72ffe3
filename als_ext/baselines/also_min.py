"""Weights that fall with the loss: ALSO's step of pi with the sign turned round."""

from __future__ import annotations

from dataclasses import dataclass

from als_ext.config import TrainConfig
from als_ext.methods import Also
from als_ext.ops._checks import check_float
from als_ext.optim import ALSO

_SOURCE_PATH = 0.01 * 160  # step size and epochs of the authors' code


@dataclass(frozen=True)
class AlsoMinSettings:
    """Settings of :class:`AlsoMin`.

    Args:
        pi_lr: step size of log pi, > 0. None takes 1.6 / epochs: a sample's log pi falls by
            pi_lr times its loss once an epoch, and the source's code makes 160 epochs at 0.01.
        pi_decay: strength of the KL divergence to the uniform weights, >= 0. 0 is multiplicative
            reweighting.
    """

    pi_lr: float | None = None
    pi_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.pi_lr is not None:
            check_float("pi_lr", self.pi_lr, low=0.0, open_low=True)
        check_float("pi_decay", self.pi_decay, low=0.0)


class AlsoMin(Also, name="also-min"):
    r"""Multiplicative reweighting (Bar, Koren, Giryes, arXiv 2102.12192), by ALSO's optimizer.

    .. math:: \pi_i \propto \exp\left(-\gamma \sum_t f_i(\theta_t)\right), \qquad
              \theta \leftarrow \text{step on } \sum_i \pi_i f_i(\theta)

    The same form as KL-regularised self-paced weights: samples that keep a high loss lose their
    say. Where this departs from the source: a sample's loss is that of its training step, not of a
    pass over all samples after each epoch; the weights of a batch are n pi_i / B, not normalised
    over the batch; the optimizer is ALSO (Adam, optimistic), not SGD.
    """

    Settings = AlsoMinSettings

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """What this method sets may not come from ``config.also``."""
        super().check(config)
        if taken := sorted({"direction", "pi_lr", "pi_decay"} & config.also.keys()):
            raise ValueError(
                f"also: expected no {taken[0]} for also-min (its pi_lr and pi_decay are "
                f"settings), got {config.also[taken[0]]!r}"
            )

    def make_optimizer(self) -> ALSO:
        """ALSO in the direction "min"."""
        config, own = self.task.config, self.settings
        return ALSO(
            self.task.model.parameters(),
            n=len(self.task.labels),
            lr=config.lr,
            weight_decay=config.weight_decay,
            direction="min",
            pi_lr=_SOURCE_PATH / config.epochs if own.pi_lr is None else own.pi_lr,
            pi_decay=own.pi_decay,
            **config.also,
        )
