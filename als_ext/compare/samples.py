"""What the plots need of the training samples of a cell, in one small file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from als_ext.compare.figures import detected
from als_ext.data.arrays import read_npz
from als_ext.io import atomic_open
from als_ext.trainer import TrainResult

SAMPLES_FILE = "samples.npz"
MAP_POINTS = 5000  # more dots than this hide each other
_COMPONENTS = 16  # of the embedding: the plane of the map, and enough for t-SNE


def map_rows(n: int) -> Tensor:
    """int64, the samples of the map: all, or ``MAP_POINTS`` at random, the same every time."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[:MAP_POINTS].sort().values


def principal_components(embedding: Tensor) -> npt.NDArray[np.float32]:
    """float32 [m, <= 16], embeddings [m, D] along their directions of largest variance."""
    from sklearn.decomposition import PCA

    points = embedding.double().cpu().numpy()
    components = PCA(min(_COMPONENTS, *points.shape), random_state=0).fit_transform(points)
    return np.asarray(components, dtype=np.float32)


def save_samples(
    path: Path, done: TrainResult, true: Tensor | None, rows: Tensor, embedding: Tensor
) -> None:
    """Write labels, losses, log pi, suspects, and the map's points.

    Args:
        path: npz file; one that is there is replaced.
        done: the training's result.
        true: int64 [n]; None where nobody knows them.
        rows: int64 [m], samples of the map.
        embedding: [m, D], their embeddings.
    """
    arrays: dict[str, Any] = {
        "given": done.given_labels.int(),
        "labels": done.labels.int(),
        "true": None if true is None else true.int(),
        "loss": done.losses.float(),
        "log_pi": None if done.log_pi is None else done.log_pi.float(),
        "detected": detected(done),
        "map_rows": rows.int(),
        "map": torch.from_numpy(principal_components(embedding)),
    }
    known = {name: value.numpy() for name, value in arrays.items() if value is not None}
    with atomic_open(path, overwrite=True) as file:
        np.savez_compressed(file, **known)


def load_samples(path: Path) -> dict[str, npt.NDArray[Any]] | None:
    """The arrays of :func:`save_samples`; what was not known is left out. None without the file."""
    if not path.is_file():
        return None
    return read_npz(path)
