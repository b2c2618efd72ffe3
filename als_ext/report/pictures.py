"""What samples look like: sheets of small images, or rows of numbers, to embed in the page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from als_ext.data import ArrayDataset, load_dataset
from als_ext.report.pack import pack
from als_ext.report.run_folder import RunFolder

_PER_ROW, _PER_SHEET = 32, 1024  # pictures
_PITCH = 8  # JPEG's blocks, colours included: no picture shows those of the one beside it
_QUALITY = 85


def load_source(
    run: RunFolder, dataset: str | None = None, data_dir: str | None = None
) -> ArrayDataset | str:
    """The data set of a run, without any download; or why it cannot be shown.

    Args:
        run: the run.
        dataset: where the data is now, as ``als-ext run --dataset``; None: where it was.
        data_dir: the same of ``--data-dir``.
    """
    spec = str(run.settings.get("dataset")) if dataset is None else dataset
    folder = run.settings.get("data_dir") if data_dir is None else data_dir
    try:
        data = load_dataset(spec, folder, download=False)
    except (ValueError, TypeError, OSError) as error:
        return f"The data set {spec} cannot be read: {error}"
    samples = run.samples
    labels = samples.given if samples.true is None else samples.true
    same = (
        len(data.y_train) == len(samples)
        and np.array_equal(data.y_train.numpy(), labels)
        and np.array_equal(data.train_index.numpy(), samples.index)
        and data.train_files == samples.files
    )
    return data if same else f"The data set {spec} is no longer the one that the run was about."


def picture_rows(samples_x: Tensor, rows: NDArray[np.int64], size: int, features: int) -> Any:
    """What to embed of these samples.

    Args:
        samples_x: float32 [n, C, H, W] or [n, D].
        rows: the samples to show, ascending.
        size: longest side of a picture, pixels.
        features: numbers of a row, where samples are no images.
    """
    x = samples_x[torch.from_numpy(rows)]
    shown = {"rows": pack(rows)}
    if x.ndim == 2:
        values = x[:, :features].contiguous()
        return {
            **shown,
            "kind": "rows",
            "features": values.shape[1],
            "of": x.shape[1],
            "values": pack(values.numpy()),
        }
    tiles, height, width = _tiles(x, size)
    sheets = [
        _sheet(tiles[start : start + _PER_SHEET]) for start in range(0, len(tiles), _PER_SHEET)
    ]
    return {
        **shown,
        "kind": "images",
        "size": [width, height],
        "pitch": [tiles.shape[2], tiles.shape[1]],
        "perRow": _PER_ROW,
        "perSheet": _PER_SHEET,
        "sheets": sheets,
    }


def _tiles(x: Tensor, size: int) -> tuple[NDArray[np.uint8], int, int]:
    """uint8 [r, H, W, 1 or 3], each in the corner of its place, and the size of a picture."""
    if x.shape[1] not in (1, 3):  # alpha is left out, other channels are one grey
        x = x[:, :3] if x.shape[1] == 4 else x.mean(1, keepdim=True)
    longest = max(x.shape[2:])
    if longest > size:
        height, width = (max(1, round(side * size / longest)) for side in x.shape[2:])
        x = F.interpolate(x, (height, width), mode="bilinear", antialias=True, align_corners=False)
    if len(x) and (x.min() < 0 or x.max() > 1):  # no bytes: from the least to the greatest value
        low, high = x.min(), x.max()
        x = (x - low) / (high - low).clamp_min(1e-12)
    height, width = x.shape[2:]
    if x.shape[1] == 3:
        x = F.pad(x, (0, -width % _PITCH, 0, -height % _PITCH), mode="replicate")
    pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return pixels.contiguous().numpy(), height, width


def _sheet(tiles: NDArray[np.uint8]) -> str:
    """A data URI of one image: PNG of grey pictures, JPEG of colours."""
    count, height, width, channels = tiles.shape
    lines = -(-count // _PER_ROW)
    whole = np.zeros((lines * _PER_ROW, height, width, channels), np.uint8)
    whole[:count] = tiles
    grid = whole.reshape(lines, _PER_ROW, height, width, channels).swapaxes(1, 2)
    pixels = grid.reshape(lines * height, _PER_ROW * width, channels)
    file, kind = io.BytesIO(), "PNG" if channels == 1 else "JPEG"
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    image.save(file, kind, quality=_QUALITY, subsampling=0, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
