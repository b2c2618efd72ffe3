"""Label files: JSON, CSV, npy and npz, one integer class for each sample."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from als_ext.data.arrays import read_arrays
from als_ext.io import atomic_open

__all__ = ["as_labels", "as_positions", "read_labels", "write_labels"]

_SUFFIXES = (".json", ".csv", ".npy", ".npz")
_INT64_MAX = 2**63 - 1


def as_labels(
    labels: Tensor | npt.NDArray[np.integer],
    *,
    n: int | None = None,
    num_classes: int | None = None,
    name: str = "labels",
    unit: str = "entry",
) -> Tensor:
    """Check class labels and return them as a new ``int64`` CPU tensor.

    Args:
        labels: integer ``[n]`` tensor or numpy array (not ``bool``), classes in [0,
            ``num_classes``).
        n: length they must have; ``None`` takes any but 0.
        num_classes: number of classes; ``None`` checks only that no label is negative.
        name: what the messages call the labels: an argument or a file.
        unit: what the messages call one label.

    Returns:
        ``int64 [n]``, memory of its own.

    Raises:
        TypeError: not a tensor or array of integers.
        ValueError: wrong number of dimensions, wrong length, label out of range; the message names
            the first one.

    Note:
        Copies a CUDA tensor to the host, so it synchronises: not for a training step.

    Example:
        >>> import numpy as np
        >>> from als_ext.data import as_labels
        >>> as_labels(np.array([2, 0], dtype=np.uint8), num_classes=3)
        tensor([2, 0])
    """
    array = _integers(labels, name, "class labels", "[n]")
    if n is not None and len(array) != n:
        raise ValueError(f"{name}: expected {n} labels, got {len(array)}")
    if len(array) == 0:
        raise ValueError(f"{name}: expected at least one label, got none")
    limit = _INT64_MAX if num_classes is None else num_classes - 1
    wrong = (array < 0) | (array > limit)
    if wrong.any():
        first = int(np.argmax(wrong))
        expected = "at least 0" if num_classes is None else f"in [0, {num_classes})"
        raise ValueError(f"{name}: {unit} {first}: expected a label {expected}, got {array[first]}")
    return torch.from_numpy(array.astype(np.int64))


def _integers(value: object, name: str, what: str, shape: str) -> npt.NDArray[np.integer]:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.integer):
        found = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{name}: expected integer {what}, got {found}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape {shape}, got {list(array.shape)}")
    return array


def as_positions(index: Tensor | npt.NDArray[np.integer], n: int, *, name: str = "index") -> Tensor:
    """Check positions of distinct samples and return them as a new ``int64`` CPU tensor.

    Args:
        index: integer ``[m]`` tensor or numpy array (not ``bool``), m >= 0, values in [0, n).
        n: number of samples.
        name: what the messages call the positions.

    Returns:
        ``int64 [m]``, memory of its own, in the order given.

    Raises:
        TypeError: not a tensor or array of integers.
        ValueError: wrong number of dimensions, a position out of range or given twice.

    Note:
        Copies a CUDA tensor to the host, so it synchronises: not for a training step.

    Example:
        >>> import numpy as np
        >>> from als_ext.data import as_positions
        >>> as_positions(np.array([2, 0]), 3)
        tensor([2, 0])
    """
    array = _integers(index, name, "positions of samples", "[m]")
    wrong = (array < 0) | (array >= n)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(f"{name}: expected values in [0, {n}), got {array[first]} at {first}")
    if len(np.unique(array)) < len(array):
        raise ValueError(f"{name}: expected distinct positions, got one twice")
    return torch.from_numpy(array.astype(np.int64))


def _read_json(path: Path) -> npt.NDArray[np.int64]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; [[[[...
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    values = content.get("labels") if isinstance(content, dict) else content
    if not isinstance(values, list):
        raise ValueError(
            f'{path}: expected a list of labels or an object {{"labels": [...]}}, '
            f"got {type(values).__name__}"
        )
    for row, value in enumerate(values):
        # bool is a subclass of int, but true is not a class.
        if type(value) is not int or abs(value) > _INT64_MAX:
            raise ValueError(f"{path}: entry {row}: expected an integer label, got {value!r}")
    return np.array(values, dtype=np.int64)


def _parse_cell(text: str, what: str, path: Path, line: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = _INT64_MAX + 1
    if abs(value) > _INT64_MAX:
        raise ValueError(f"{path}: line {line}: expected an integer {what}, got {text!r}")
    return value


def _place_by_index(
    indices: list[int], labels: list[int], lines: list[int], path: Path
) -> npt.NDArray[np.int64]:
    """Labels in index order. The indices must be 0..n-1, each once, in any order."""
    placed = np.zeros(len(indices), dtype=np.int64)
    seen: dict[int, int] = {}
    for index, label, line in zip(indices, labels, lines, strict=True):
        if not 0 <= index < len(indices):
            raise ValueError(
                f"{path}: line {line}: expected an index in [0, {len(indices)}) "
                f"for {len(indices)} rows, got {index}"
            )
        if index in seen:
            raise ValueError(
                f"{path}: line {line}: index {index} appeared already on line {seen[index]}"
            )
        seen[index] = line
        placed[index] = label
    return placed


_INDEXED = ["index", "label"]
_HEADERS = (["label"], _INDEXED, ["label", "label_noisy"])  # the labels are in the last column


def _read_csv(path: Path) -> npt.NDArray[np.int64]:
    indices: list[int] = []
    labels: list[int] = []
    lines: list[int] = []
    header: list[str] | None = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                cells = [cell.strip() for cell in row]
                if not any(cells):
                    continue
                if header is None:
                    header = cells
                    if cells in _HEADERS:
                        continue
                    if len(cells) != 1:
                        raise ValueError(
                            f"{path}: line {reader.line_num}: expected the header index,label or "
                            f"label,label_noisy or a single column of labels, got {','.join(cells)}"
                        )
                if len(cells) != len(header):
                    raise ValueError(
                        f"{path}: line {reader.line_num}: expected {len(header)} columns, "
                        f"got {len(cells)}"
                    )
                labels.append(_parse_cell(cells[-1], "label", path, reader.line_num))
                lines.append(reader.line_num)
                if header == _INDEXED:
                    indices.append(_parse_cell(cells[0], "index", path, reader.line_num))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    if indices:
        return _place_by_index(indices, labels, lines, path)
    return np.array(labels, dtype=np.int64)


def _read_npy(path: Path) -> npt.NDArray[Any]:
    arrays = read_arrays(path, only="labels")
    if isinstance(arrays, np.ndarray):
        return arrays
    if not arrays:
        raise ValueError(f"{path}: expected an array named labels or a single array, got none")
    return next(iter(arrays.values()))


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"{path}: expected a label file ending in one of {', '.join(_SUFFIXES)}, "
            f"got {path.suffix!r}"
        )
    return suffix


def read_labels(
    path: str | os.PathLike[str], n: int | None = None, num_classes: int | None = None
) -> Tensor:
    """Read class labels from a file; the ending of its name is the format.

    ``.json``
        a list of integers, or an object whose ``labels`` is such a list.
    ``.csv``
        one column of integers, with or without the header ``label``; or the header ``index,label``
        and one row for each index 0..n-1, in any order; or the header ``label,label_noisy`` of
        published noise files, whose second column is read. Blank lines are skipped.
    ``.npy``
        integer array ``[n]``. Pickled arrays are refused.
    ``.npz``
        the array named ``labels``, or the only array.

    Args:
        path: the file.
        n: number of labels it must hold; ``None`` takes any but 0.
        num_classes: labels must be in [0, ``num_classes``); ``None`` checks only that no label is
            negative.

    Returns:
        ``int64 [n]`` tensor on the CPU.

    Raises:
        FileNotFoundError: no file of that name.
        ValueError: unknown ending, damaged file, something that is not an integer, wrong count,
            label out of range. The message names the file, the entry or line, what was expected and
            what was found.

    Example:
        >>> import pathlib, tempfile
        >>> from als_ext.data import read_labels
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "labels.csv"
        >>> _ = path.write_text("index,label\\n1,7\\n0,3\\n")
        >>> read_labels(path, n=2, num_classes=10)
        tensor([3, 7])
    """
    path = Path(path)
    suffix = _suffix(path)
    readers = {".json": _read_json, ".csv": _read_csv, ".npy": _read_npy, ".npz": _read_npy}
    array = readers[suffix](path)
    unit = "row" if suffix == ".csv" else "entry"
    try:
        return as_labels(array, n=n, num_classes=num_classes, name=str(path), unit=unit)
    except TypeError as error:
        # The type of a file's content is a value to its reader.
        raise ValueError(str(error)) from None


def write_labels(
    path: str | os.PathLike[str],
    labels: Tensor | npt.NDArray[np.integer],
    *,
    overwrite: bool = False,
) -> None:
    """Write class labels to a file that :func:`read_labels` reads back; the ending is the format.

    Args:
        path: ``.json`` (object with ``labels``), ``.csv`` (header ``index,label``), ``.npy`` or
            ``.npz`` (array
            ``labels``). Its folder must exist.
        labels: integer ``[n]``, at least 0.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is false.
        TypeError: labels that are not integers.
        ValueError: unknown ending, wrong shape, negative label.

    Note:
        Atomic (:func:`als_ext.io.atomic_open`): the file is there whole or not at all.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from als_ext.data import write_labels
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "labels.json"
        >>> write_labels(path, torch.tensor([3, 7]))
        >>> path.read_text(encoding="utf-8")
        '{"labels": [3, 7]}\\n'
    """
    path = Path(path)
    suffix = _suffix(path)
    array = as_labels(labels).numpy()
    with atomic_open(path, overwrite=overwrite) as file:
        if suffix == ".npy":
            np.save(file, array, allow_pickle=False)
        elif suffix == ".npz":
            np.savez(file, labels=array)
        elif suffix == ".json":
            file.write((json.dumps({"labels": array.tolist()}) + "\n").encode("ascii"))
        else:
            table = np.column_stack((np.arange(len(array)), array))
            text = io.BytesIO()
            np.savetxt(text, table, fmt="%d", delimiter=",", header="index,label", comments="")
            file.write(text.getvalue())
