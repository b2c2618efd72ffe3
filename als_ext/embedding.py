"""Embeddings: a model's own ``embed``, the output of a named layer, or principal components."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 4096  # rows in float64 at a time


def make_embedder(model: nn.Module, layer: str | None = None) -> Callable[[Tensor], Tensor]:
    """A function from inputs [B, ...] to embeddings float32 [B, D].

    Args:
        model: the network.
        layer: name of a submodule (``model.get_submodule``) whose output, flattened, is the
            embedding; None takes ``model.embed``.

    Returns:
        The function. With a layer it runs the whole model and keeps what the layer gave.

    Raises:
        ValueError: no such layer, or no layer named and a model without ``embed``.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> make_embedder(model, "0")(torch.zeros(5, 4)).shape
        torch.Size([5, 3])
    """
    if layer is None:
        own = getattr(model, "embed", None)
        if not callable(own):
            raise ValueError(
                f"embedding: expected the name of a layer, got None for {type(model).__name__}, "
                "which has no function embed(x)"
            )
        return lambda x: _flat(own(x))
    names = dict(model.named_modules())
    if not layer or layer not in names:
        known = ", ".join(filter(None, names))
        raise ValueError(f"embedding: expected one of the layers {known}; got {layer!r}")

    def embed(x: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            kept.append(output)

        handle = model.get_submodule(layer).register_forward_hook(keep)
        try:
            model(x)
        finally:
            handle.remove()
        if len(kept) != 1 or not isinstance(kept[0], Tensor):
            raise ValueError(
                f"embedding: expected layer {layer!r} to give one tensor a forward pass, "
                f"got {len(kept)} outputs"
                + (f" of type {type(kept[0]).__name__}" if kept else " (it is not called)")
            )
        return _flat(kept[0])

    return embed


def _flat(embedding: Tensor) -> Tensor:
    return embedding.flatten(1).float()


def principal_axes(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and the first ``count`` eigenvectors [D, P] of the covariance of rows x [n, D].

    In float64, block by block; D x D in memory.
    """
    parts = torch.split(x, _BLOCK)
    mean = sum((part.double().sum(0) for part in parts), start=x.new_zeros((), dtype=torch.float64))
    mean = mean / len(x)
    scatter = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in parts:
        centred = part.double() - mean
        scatter.addmm_(centred.T, centred)
    vectors = torch.linalg.eigh(scatter).eigenvectors  # ascending
    return mean, vectors.flip(1)[:, :count].contiguous()


def project(x: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """Coordinates float32 [n, P] of inputs [n, ...] on axes [D, P]."""
    parts = torch.split(x.flatten(1), _BLOCK)
    return torch.cat([((part.double() - mean) @ axes).float() for part in parts])
