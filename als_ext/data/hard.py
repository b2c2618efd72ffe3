"""Noise on the samples that a classifier finds hard (Chen et al. 2021)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

_EPOCHS = 5
_HIDDEN = 256
_BATCH = 128
_LR = 1e-3
_BLOCK = 1 << 14  # samples that are asked about in one go


def hard_noise(
    labels: npt.NDArray[np.int64],
    rate: float,
    num_classes: int,
    features: npt.NDArray[np.floating],
    seed: int,
) -> npt.NDArray[np.int64]:
    r"""The hardest share ``rate`` of the samples get the class they are most easily taken for.

    Algorithm 1 of Chen et al., "Beyond class-conditional assumption", AAAI 2021 (arXiv 2012.05458):
    with the predictions :math:`S_i` of a classifier trained on the right labels, averaged over its
    epochs, sample i has the score :math:`N_i = \max_{j \ne y_i} S_{ij}`; those with the highest get
    the j of that maximum. The classifier here is a network with one hidden layer, Adam, five
    epochs, the same for every data set.

    Args:
        labels: [n] in [0, C).
        rate: share, in [0, 1]; exactly ``round(rate * n)`` labels change.
        num_classes: C.
        features: [n, S]; centred and scaled as a whole, not column by column.
        seed: of first weights and batches.

    Returns:
        [n].
    """
    score = _averaged_predictions(torch.from_numpy(labels), num_classes, features, seed)
    score.scatter_(1, torch.from_numpy(labels)[:, None], -1.0)
    highest, taken_for = score.max(dim=1)
    hardest = highest.argsort(descending=True, stable=True)[: round(rate * len(labels))].numpy()
    noisy = labels.copy()
    noisy[hardest] = taken_for.numpy()[hardest]
    return noisy


def _averaged_predictions(
    labels: Tensor, num_classes: int, features: npt.NDArray[np.floating], seed: int
) -> Tensor:
    """Mean over the epochs of the softmax of all samples, float32 [n, C]."""
    n, width = features.shape
    center, scale = (float(f(dtype=np.float64)) for f in (features.mean, features.std))

    def batch(rows: Tensor) -> Tensor:
        part = (features[rows.numpy()].astype(np.float32) - center) / max(scale, 1e-12)
        return torch.from_numpy(part.astype(np.float32, copy=False))

    f32 = torch.float32  # whatever the default is
    generator = torch.Generator().manual_seed(seed)
    shapes = ((_HIDDEN, width), (num_classes, _HIDDEN))
    weights = [
        (torch.randn(shape, generator=generator, dtype=f32) / shape[1] ** 0.5).requires_grad_()
        for shape in shapes
    ]
    offsets = [torch.zeros(shape[0], dtype=f32, requires_grad=True) for shape in shapes]

    def logits(rows: Tensor) -> Tensor:
        hidden = F.linear(batch(rows), weights[0], offsets[0]).relu()
        return F.linear(hidden, weights[1], offsets[1])

    optimizer = torch.optim.Adam([*weights, *offsets], lr=_LR)
    total = torch.zeros(n, num_classes, dtype=f32)
    with torch.enable_grad():
        for _ in range(_EPOCHS):
            for rows in torch.split(torch.randperm(n, generator=generator), _BATCH):
                optimizer.zero_grad()
                F.cross_entropy(logits(rows), labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.no_grad():
                for rows in torch.split(torch.arange(n), _BLOCK):
                    total[rows] += logits(rows).softmax(dim=1)
    return total / _EPOCHS
