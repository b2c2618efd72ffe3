"""Learning an embedding without labels: two views of a sample lie nearer than those of others."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from als_ext.augment import RandomAffine, RandomDisturbance
from als_ext.data import TensorBatches
from als_ext.embedding import make_embedder
from als_ext.ops import sample_loss
from als_ext.ops._checks import check_choice, check_float, check_int
from als_ext.runtime import AMP_MODES, Amp, half_cosine, reproducible, resolve_device

EPOCHS = 3
TEMPERATURE = 0.2
_PROJECTED = 64
# What two views do not share, the embedding learns to leave out.
_MOVE, _DISTURB = RandomAffine(), RandomDisturbance()


def pretrain(
    model: nn.Module,
    images: Tensor,
    *,
    epochs: int = EPOCHS,
    batch_size: int = 128,
    lr: float = 1e-3,
    layer: str | None = None,
    device: str = "auto",
    amp: str = "off",
    deterministic: bool = True,
    seed: int = 0,
) -> list[float]:
    """Train the embedding of a model on images, in place and without labels.

    What :class:`als_ext.AlsLc` does before it looks at a label, for a loop of your own: then embed
    the images and give the embeddings to :func:`als_ext.correct_labels`.

    Args:
        model: the network.
        images: floating [n, C, H, W], n >= 1; they move to the device as a whole.
        epochs: passes over the images, >= 1.
        batch_size: images a step, >= 2; each is to be told from the others of its batch.
        lr: learning rate of Adam at the start, > 0; it falls to 0 in a half cosine.
        layer: layer whose output is the embedding; None takes the model's own ``embed``.
        device: "auto", "cpu", "cuda" or "cuda:N".
        amp: "off", "bf16" or "f16".
        deterministic: ask torch for deterministic algorithms.
        seed: of batches, views and the projection, >= 0.

    Returns:
        The mean loss of each epoch, nats.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, samples that are no images, a model without an
            embedding.
        RuntimeError: the loss is not finite.

    Note:
        The same bits for the same ``seed``. The global random generators are left as they were; the
        model is left on the device, without gradients, in the modes in which it came.
        :class:`als_ext.AlsLc` compares pixels as well: docs/trainer.md.

    Example:
        >>> import torch
        >>> from als_ext.models import SmallCNN
        >>> losses = pretrain(SmallCNN((1, 12, 12), 10), torch.rand(64, 1, 12, 12), epochs=2)
        >>> len(losses)
        2
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    check_int("epochs", epochs, low=1)
    check_int("batch_size", batch_size, low=2)
    check_int("seed", seed, low=0, high=2**63 - 1)
    check_float("lr", lr, low=0.0, open_low=True)
    check_choice("amp", amp, AMP_MODES)
    place = resolve_device(device)
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images: expected floating [n, C, H, W], got {images.dtype} {list(images.shape)}"
        )
    embed = make_embedder(model, layer)
    nothing = torch.zeros(len(images), dtype=torch.int64, device=place)
    batches = TensorBatches(images.to(place), nothing, batch_size, seed=seed)
    modes = {module: module.training for module in model.modules()}
    model.to(place).train()
    losses: list[float] = []
    with _put_back(modes), reproducible(seed, place, deterministic):
        contrast = Contrast(model.parameters(), embed, place, Amp(amp, place))
        for epoch in range(epochs):
            total = torch.zeros((), dtype=torch.float64, device=place)
            for x, _, _ in batches:
                step = epoch * len(batches) + batches.position - 1
                rate = half_cosine(lr, step, epochs * len(batches))
                total += contrast.step(x, rate).sum(dtype=torch.float64)
            losses.append(float(total) / len(images))
            if not math.isfinite(losses[-1]):
                raise RuntimeError(
                    f"loss: expected a finite mean, got {losses[-1]} in epoch {epoch + 1}"
                )
    model.zero_grad()
    return losses


@contextlib.contextmanager
def _put_back(modes: dict[nn.Module, bool]) -> Iterator[None]:
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def view(images: Tensor) -> Tensor:
    """Images [B, C, H, W] as they might have been as well."""
    return _DISTURB(_MOVE(images))


class Contrast:
    r"""Contrastive training of an embedding: SimCLR, Chen et al. 2020 (arXiv 2002.05709), eq. 1.

    Of B samples 2 B views are embedded and projected by a network of two layers to unit vectors
    :math:`z`. Each view has to find its partner :math:`p(i)` among the 2 B - 1 others:

    .. math:: \ell_i = -\log \frac{\exp(z_i^\top z_{p(i)} / T)}
              {\sum_{j \ne i} \exp(z_i^\top z_j / T)}, \qquad T = 0.2.

    The projection serves this alone and is thrown away. Views are moved and disturbed
    (:mod:`als_ext.augment`): the source's crops, flips and colours are for photographs.

    Args:
        parameters: those of the model; the ones that do not lead to the embedding stay.
        embed: inputs [B, ...] to embeddings float32 [B, D], with gradients.
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
        device: torch.device,
        amp: Amp,
    ) -> None:
        self._parameters, self._embed = list(parameters), embed
        self._device, self._amp = device, amp
        self._width: int | None = None  # D, known with the first batch

    def _start(self, width: int) -> None:
        self._width = width
        self._projector = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, _PROJECTED)
        ).to(self._device)
        trained = [*self._parameters, *self._projector.parameters()]
        self._optimizer = torch.optim.Adam(trained, fused=True)

    def clear(self) -> None:
        """Forget the projection and the optimizer: twice the model's memory."""
        if self._width is not None:
            self._width = None
            del self._projector, self._optimizer

    def step(self, x: Tensor, lr: float) -> Tensor:
        """One step of Adam on the mean loss of the views of ``x`` [B, ...].

        Returns:
            The mean loss of the two views of each sample, float32 [B], detached.
        """
        count = len(x)
        views = torch.cat([view(x), view(x)])
        with self._amp.autocast():
            embedding = self._embed(views)
        if self._width is None:
            self._start(embedding.shape[1])
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
        if self._width is None:
            return {"width": None}
        return {
            "width": self._width,
            "projector": self._projector.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if state["width"] is None:
            return
        self._start(state["width"])
        self._projector.load_state_dict(state["projector"])
        self._optimizer.load_state_dict(state["optimizer"])
