"""Training where given labels are no evidence: on what is settled, and on views of all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SURE = 0.9  # a probability from which on a prediction is taken for a label


class Targets(NamedTuple):
    """What a batch is trained on; all [B]."""

    label: Tensor  # int64
    plain: Tensor  # float32, weight of the sample as the step got it: 1 or 0
    moved: Tensor  # float32, weight of its view: 1 or 0


class SettledLabels:
    r"""Labels of the samples whose neighbours agree; the others get one when the network is sure.

    The loss of a sample with settled label :math:`c` and view :math:`x'` is
    :math:`-\log p(c \mid x) - \log p(c \mid x')`. The others have that of FixMatch (Sohn et al.
    2020, arXiv 2001.07685, eq. 4), where :math:`p(c \mid x)` is the prediction now, a constant:

    .. math:: L = -[\max_c p(c \mid x) > 0.9] \; \log p(\arg\max_c p(c \mid x) \mid x').

    Args:
        label: [n] int64.
        settled: [n] bool, whether the label of a sample is settled.

    Attributes:
        label: the argument.
    """

    def __init__(self, label: Tensor, settled: Tensor) -> None:
        self.label, self._settled = label, settled

    def targets(self, logits: Tensor, index: Tensor) -> Targets:
        """The targets of these samples [B], with their logits [B, C] now."""
        settled = self._settled[index]
        highest, named = logits.detach().float().softmax(dim=1).max(dim=1)
        label = torch.where(settled, self.label[index], named)
        return Targets(label, settled.float(), (settled | (highest > _SURE)).float())

    def state_dict(self) -> dict[str, Tensor]:
        """All of it."""
        return {"label": self.label, "settled": self._settled}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], device: torch.device) -> SettledLabels:
        """What ``state_dict`` returned."""
        return cls(state["label"].to(device), state["settled"].to(device))
