"""Early-learning regularisation (Liu et al., NeurIPS 2020, arXiv 2007.00151)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from als_ext.methods import ERM, Task
from als_ext.ops._checks import check_float

_FLOOR = 1e-4  # of a probability, in the source's code: keeps 1 - <t, p> away from 0


@dataclass(frozen=True)
class ElrSettings:
    """Settings of :class:`ELR`; the source has none for MNIST, so these are its CIFAR-10 ones.

    Args:
        lam: lambda >= 0 before the regulariser. 3 is the source's for symmetric noise on
            CIFAR-10 (1 for asymmetric noise, 7 on CIFAR-100).
        beta: in [0, 1], of the running average. 0.7 is the source's for symmetric noise on
            CIFAR-10 (0.9 for asymmetric noise and on CIFAR-100).
    """

    lam: float = 3.0
    beta: float = 0.7

    def __post_init__(self) -> None:
        check_float("lam", self.lam, low=0.0)
        check_float("beta", self.beta, low=0.0, high=1.0)


class ELR(ERM, name="elr"):
    r"""Cross entropy and a pull towards what the network said before it learned the wrong labels.

    The loss L_ELR of the source with its temporal ensembling, p_i the softmax of sample i:

    .. math:: t_i \leftarrow \beta t_i + (1 - \beta) p_i, \qquad
              \frac1B \sum_i \left( -\log p_{i, y_i} + \lambda \log(1 - \langle p_i, t_i \rangle)
              \right)

    As in its code p is clamped to [1e-4, 1 - 1e-4] in the regulariser (rescaled to sum 1 in t),
    t starts at 0 and takes in p_i before it is used, and no gradient flows through it.

    Note:
        Memory: t is float32 [n, C] on the device. The losses that are reported are the cross
        entropies alone.
    """

    Settings = ElrSettings

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.target = torch.zeros(len(task.labels), task.num_classes, device=task.device)

    def step(self, x: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """Take in the predictions of the batch, then one step."""
        with self.amp.autocast():
            logits = self.task.model(x)
        losses = self.losses(logits, label)
        probability = logits.float().softmax(1).clamp(_FLOOR, 1.0 - _FLOOR)
        now = probability.detach()
        now = now / now.sum(1, keepdim=True)
        target = self.target.index_select(0, index).lerp_(now, 1.0 - self.settings.beta)
        self.target.index_copy_(0, index, target)
        pull = torch.log1p(-(target * probability).sum(1))
        self.optimizer.zero_grad()
        total = (losses + self.settings.lam * pull).mean()
        self.amp.backward_and_step(total, self.optimizer)
        return losses.detach()

    def state_dict(self) -> dict[str, Any]:
        """The running averages as well."""
        return {**super().state_dict(), "target": self.target}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it."""
        super().load_state_dict(state)
        self.target.copy_(state["target"])
