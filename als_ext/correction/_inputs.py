"""Turns what people bring (tensors, arrays, memory maps) into checked tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from als_ext._library import require_device
from als_ext.ops._checks import check_int

Array = Tensor | NDArray[np.generic]
_BLOCK = 1 << 24  # elements converted or looked at in one go: 64 MiB of float32
_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _blocks(shape: tuple[int, ...]) -> list[slice]:
    rows, columns = shape
    step = max(1, _BLOCK // max(1, columns))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _tensor(name: str, value: object, dims: int) -> Tensor:
    """A tensor that shares the memory of ``value``; of a read-only array, a copy."""
    if not isinstance(value, (Tensor, np.ndarray)):
        raise TypeError(
            f"{name}: expected a torch.Tensor or a numpy.ndarray, got {type(value).__name__}"
        )
    if value.ndim != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {list(value.shape)}")
    if isinstance(value, Tensor):
        return value.detach()
    try:
        return torch.from_numpy(np.require(value, requirements=["C", "W", "A"]))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected numbers, got dtype {value.dtype} ({error})") from error


def read_embeddings(value: object, *, least: int = 2) -> Tensor:
    """Embeddings [n, D] as float32, n >= least; a memory map is read block by block."""
    name, allowed = "embeddings", "expected dtype float16, bfloat16, float32 or float64"
    if isinstance(value, np.ndarray) and value.ndim == 2:
        if value.dtype not in (np.float16, np.float32, np.float64):
            raise TypeError(f"{name}: {allowed}, got {value.dtype}")
        out = torch.empty(value.shape, dtype=torch.float32)
        for rows in _blocks(value.shape):
            out[rows] = torch.from_numpy(np.array(value[rows], dtype=np.float32))
    else:
        tensor = _tensor(name, value, 2)
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name}: {allowed}, got {tensor.dtype}")
        require_device(tensor, name)
        out = tensor.to(torch.float32).contiguous()
    if out.shape[0] < least or out.shape[1] < 1:
        raise ValueError(
            f"{name}: expected at least {least} rows and 1 column (a sample needs a neighbour), "
            f"got shape {list(out.shape)}"
        )
    for rows in _blocks(out.shape):
        bad = ~out[rows].isfinite().all(dim=1)
        if bad.any():
            row = rows.start + int(bad.nonzero()[0])
            raise ValueError(f"{name}: expected finite float32 values, row {row} holds NaN or inf")
    return out


def read_labels(
    value: object,
    num_classes: int | None,
    device: torch.device,
    *,
    least: int = 1,
    name: str = "labels",
) -> tuple[Tensor, int]:
    """Labels [n] as int64 (a copy), n >= least, and the number of classes; 0 without any label."""
    tensor = _tensor(name, value, 1)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype, got {tensor.dtype}")
    if tensor.numel() < least:
        raise ValueError(f"{name}: expected at least one label, got none")
    labels = tensor.to(device=device, dtype=torch.int64, copy=True)
    if num_classes is None:
        num_classes = int(labels.max()) + 1 if labels.numel() else 0
    else:
        check_int("num_classes", num_classes, low=1)
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected values in [0, {num_classes}), got {int(labels[at])} at position {at}"
        )
    return labels, num_classes


def read_scores(value: object, n: int, device: torch.device) -> Tensor:
    """Scores [n] as float64, finite."""
    tensor = _tensor("scores", value, 1)
    check_length("scores", tensor, n)
    if tensor.dtype not in _FLOATS + _INTEGERS:
        raise TypeError(f"scores: expected real numbers, got {tensor.dtype}")
    scores = tensor.to(device=device, dtype=torch.float64)
    bad = ~scores.isfinite()
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"scores: expected finite values, got {float(scores[at])} at position {at}"
        )
    return scores


def read_mask(name: str, value: object, n: int, device: torch.device) -> Tensor:
    """A bool mask [n]."""
    tensor = _tensor(name, value, 1)
    check_length(name, tensor, n)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool mask, got {tensor.dtype}")
    return tensor.to(device)


def check_length(name: str, tensor: Tensor, n: int) -> None:
    """One entry a sample."""
    if tensor.shape[0] != n:
        raise ValueError(f"{name}: expected {n} entries (one a row), got {tensor.shape[0]}")
