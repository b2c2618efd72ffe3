"""Training on given labels through a noise channel that depends on where a sample lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from als_ext.correction import CorrectionResult

_CHANNEL_COUNTS = 20  # neighbours that the channel of the class is worth beside those of the place
_BLOCK = 1 << 22  # numbers looked at in one go


class LocalChannel:
    r"""How likely each given label is under each class, from a correction.

    Forward correction (Patrini et al. 2017, arXiv 1609.03683) trains on given labels :math:`y`
    through the channel :math:`T_{cy} = P(\text{given } y \mid \text{true } c)`:

    .. math:: L = -\log \sum_c p(c \mid x)\, v_c, \qquad v_c = T_{cy},

    so scattered mistakes average out and labels that are given stay evidence where neighbours
    cannot tell. Mistakes that depend on the sample are not scattered: where one wrong label rules,
    it would win. Therefore :math:`v_w` of the class :math:`w` that the correction gives the sample
    is counted among its m neighbours of that class, r of them with its given label:

    .. math:: v_w = \frac{r + 20\, T_{wy}}{m + 20}.

    This local row is the project's own choice, and so is what a correction is trusted with: where
    it is, by :math:`\lambda`, the loss is :math:`(1 - \lambda) L - \lambda \log p(w \mid x)`.

    Args:
        result: a correction of n samples.
        given: [n] int64, the given labels.
        winner: [n] int64, the class w of each sample: the correction's, or one that is known.
        trust: [n] float32, lambda in [0, 1].

    Attributes:
        winner: the argument.

    Note:
        Memory: 24 n + 4 C² bytes.
    """

    def __init__(
        self, result: CorrectionResult[Tensor], given: Tensor, winner: Tensor, trust: Tensor
    ) -> None:
        self._given, self.winner, self._trust = given, winner, trust
        self._log_channel = result.channel.log()
        self._local = _local_likelihood(result, given).log()

    def log_likelihood(self, index: Tensor) -> Tensor:
        """log v of these samples [B], float32 [B, C]."""
        log = self._log_channel.T[self._given[index]]
        return log.scatter(1, self.winner[index, None], self._local[index, None])

    def losses(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The losses float32 [B] of these samples, and the targets float32 [B, C].

        Cross entropy with the targets, taken as constants, has the gradient of the losses.
        """
        log = logits.float().log_softmax(dim=1)
        joint = log + self.log_likelihood(index)
        winner, trust = self.winner[index, None], self._trust[index, None]
        target = (joint.softmax(dim=1) * (1.0 - trust)).scatter_add(1, winner, trust)
        through = (1.0 - trust) * joint.logsumexp(dim=1, keepdim=True)
        return -(through + trust * log.gather(1, winner))[:, 0], target

    def state_dict(self) -> dict[str, Any]:
        """All of it, tensors only."""
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> LocalChannel:
        """What ``state_dict`` returned."""
        self = cls.__new__(cls)
        for name, value in state.items():
            setattr(self, name, value.to(device))
        return self


def _local_likelihood(result: CorrectionResult[Tensor], given: Tensor) -> Tensor:
    """v_w above, float32 [n]."""
    winner, near = result.winner, result.neighbours
    out = _CHANNEL_COUNTS * result.channel[winner, given]
    step = max(1, _BLOCK // near.shape[1])
    for start in range(0, len(near), step):
        rows = slice(start, start + step)
        alike = winner[near[rows]] == winner[rows, None]
        seen = alike & (given[near[rows]] == given[rows, None])
        out[rows] = (out[rows] + seen.sum(dim=1)) / (alike.sum(dim=1) + _CHANNEL_COUNTS)
    return out
