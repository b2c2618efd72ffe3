"""Learning an embedding without labels: two views of a sample lie nearer than those of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from als_ext.augment import RandomAffine
from als_ext.ops import sample_loss
from als_ext.runtime import Amp

TEMPERATURE = 0.2
_PROJECTED = 64
# Stronger than for training: what two views do not share, the embedding learns to leave out.
VIEWS = RandomAffine(degrees=25.0, stretch=0.25, shear=0.3, shift=0.12)


class Contrast:
    r"""Contrastive training of an embedding: SimCLR, Chen et al. 2020 (arXiv 2002.05709), eq. 1.

    Of B samples 2 B views are embedded and projected by a network of two layers to unit vectors
    :math:`z`. Each view has to find its partner :math:`p(i)` among the 2 B - 1 others:

    .. math:: \ell_i = -\log \frac{\exp(z_i^\top z_{p(i)} / T)}
              {\sum_{j \ne i} \exp(z_i^\top z_j / T)}, \qquad T = 0.2.

    The projection serves this alone and is thrown away. Views are random affine ones
    (:class:`als_ext.augment.RandomAffine`): the source's colours and crops are for photographs.

    Args:
        parameters: those of the model; the ones that do not lead to the embedding stay.
        embed: inputs [B, ...] to embeddings float32 [B, D], with gradients.
        width: D.
        device: of the model.
        amp: mixed precision of the embedding; the rest is float32.

    Note:
        Memory of a step: the model's activations for 2 B samples and 12 (2 B)² bytes. Draws from
        torch's global generator.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        embed: Callable[[Tensor], Tensor],
        width: int,
        device: torch.device,
        amp: Amp,
    ) -> None:
        self._embed, self._amp = embed, amp
        self.width = width
        self._projector = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, _PROJECTED)
        ).to(device)
        self._optimizer = torch.optim.Adam([*parameters, *self._projector.parameters()], fused=True)

    def step(self, x: Tensor, lr: float) -> Tensor:
        """One step of Adam on the mean loss of the views of ``x`` [B, ...].

        Returns:
            The mean loss of the two views of each sample, float32 [B], detached.
        """
        count = len(x)
        with self._amp.autocast():
            embedding = self._embed(torch.cat([VIEWS(x), VIEWS(x)]))
        z = F.normalize(self._projector(embedding.float()), dim=1)
        itself = torch.eye(2 * count, dtype=torch.bool, device=x.device)
        logits = (z @ z.T / TEMPERATURE).masked_fill(itself, -torch.inf)
        partner = torch.arange(2 * count, device=x.device).roll(count)
        losses = sample_loss(logits, partner)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad()
        self._amp.backward_and_step(losses.mean(), self._optimizer)
        return losses.detach().view(2, count).mean(0)

    def state_dict(self) -> dict[str, Any]:
        """The projection and the optimizer; the model has its own."""
        return {
            "width": self.width,
            "projector": self._projector.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._projector.load_state_dict(state["projector"])
        self._optimizer.load_state_dict(state["optimizer"])
