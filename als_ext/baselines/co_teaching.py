"""Co-teaching (Han et al., NeurIPS 2018, arXiv 1804.06872): two networks pick for each other."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from als_ext.methods import ERM, Task
from als_ext.ops._checks import check_float, check_int
from als_ext.runtime import derived_seed, seeded


@dataclass(frozen=True)
class CoTeachingSettings:
    """Settings of :class:`CoTeaching`.

    Args:
        noise_rate: tau in [0, 1], the share of wrong labels. The method has to be told.
        num_gradual: T_k, epochs until the share tau is dropped, >= 1. None takes the source's 10,
            or half of the epochs where that is less: its own runs have 200.
        exponent: c > 0 in T^c / T_k.
    """

    noise_rate: float | None = None
    num_gradual: int | None = None
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if self.noise_rate is None:
            raise ValueError(
                "noise_rate: expected the share of wrong labels, which co-teaching needs, got none"
            )
        check_float("noise_rate", self.noise_rate, low=0.0, high=1.0)
        if self.num_gradual is not None:
            check_int("num_gradual", self.num_gradual, low=1)
        check_float("exponent", self.exponent, low=0.0, open_low=True)


class CoTeaching(ERM, name="co-teaching"):
    r"""Each network trains on the samples of a batch that have the smallest losses in the other.

    Algorithm 1 of the source: of a batch of B the share

    .. math:: R(T) = 1 - \tau \min(T^c / T_k, 1)

    is kept after T finished epochs, at least one sample, and the step is on the mean of the losses
    of the kept ones. The second network is a copy of the model whose layers drew other initial
    weights by their ``reset_parameters``; the first one predicts.

    Raises:
        ValueError: a model without a layer that has ``reset_parameters``.

    Note:
        noise_rate is knowledge that the other methods do not get. Memory and time are twice those
        of ERM. Equal losses are taken in the order of the batch; no host synchronisation, since
        the number of the kept is known in advance.
    """

    Settings = CoTeachingSettings

    def __init__(self, task: Task) -> None:
        self.peer = _reinitialised(task.model, task.config.seed)
        self.epoch = 0  # finished ones
        super().__init__(task)

    def make_optimizer(self) -> Optimizer:
        """One Adam over both networks: it treats each parameter for itself."""
        config = self.task.config
        return torch.optim.Adam(
            chain(self.task.model.parameters(), self.peer.parameters()),
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def kept(self, batch: int) -> int:
        """How many samples of a batch are trained on in this epoch."""
        settings = self.settings
        gradual = settings.num_gradual or min(10, max(1, self.task.config.epochs // 2))
        forget = settings.noise_rate * min(self.epoch**settings.exponent / gradual, 1.0)
        return max(1, int((1.0 - forget) * batch))

    def step(self, x: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """One step of both networks; the losses are those of the first."""
        with self.amp.autocast():
            logits, peer_logits = self.task.model(x), self.peer(x)
        losses, peer_losses = self.losses(logits, label), self.losses(peer_logits, label)
        kept = self.kept(len(label))
        total = (small_loss_weight(peer_losses, kept) * losses).sum()
        total = total + (small_loss_weight(losses, kept) * peer_losses).sum()
        self.optimizer.zero_grad()
        self.amp.backward_and_step(total, self.optimizer)
        return losses.detach()

    def after_epoch(self, epoch: int, losses: Tensor) -> dict[str, Any]:
        """The share of the next epoch."""
        self.epoch = epoch
        return {}

    def train_mode(self) -> None:
        """Both networks."""
        super().train_mode()
        self.peer.train()

    def eval_mode(self) -> None:
        """Both networks."""
        super().eval_mode()
        self.peer.eval()

    def state_dict(self) -> dict[str, Any]:
        """The second network and the epoch as well."""
        return {**super().state_dict(), "peer": self.peer.state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it."""
        super().load_state_dict(state)
        self.peer.load_state_dict(state["peer"])
        self.epoch = state["epoch"]


def small_loss_weight(losses: Tensor, kept: int) -> Tensor:
    """[B]: 1 / kept for the ``kept`` smallest losses, 0 for the others; no gradient."""
    smallest = losses.detach().argsort(stable=True)[:kept]
    return torch.zeros_like(losses).index_fill_(0, smallest, 1.0 / kept)


def _reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose layers draw their weights anew, alike on all devices."""
    device = next(model.parameters()).device
    peer = copy.deepcopy(model).cpu()
    layers = [m for m in peer.modules() if callable(getattr(m, "reset_parameters", None))]
    if not layers:
        raise ValueError(
            "model: expected layers with reset_parameters(), from which co-teaching draws its "
            f"second network, got {type(model).__name__} without any"
        )
    # Not the seed itself: the model may have been drawn from it, and the peer would be equal.
    with seeded(derived_seed(seed, "peer")):
        for layer in layers:
            layer.reset_parameters()  # type: ignore[operator]
    return peer.to(device)
