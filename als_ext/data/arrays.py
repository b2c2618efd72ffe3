"""npy and npz files of others: no pickle, and no more memory than the file accounts for.

The format is that of ``numpy.lib.format``. ``numpy.load`` itself allocates what the header of a
file claims before it has read a byte of it, and lets through whatever its parsers raise.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

__all__ = ["map_array", "read_arrays", "read_npz"]

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")  # the second is an archive without members


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zipfile, its decompressors and ast do not say what they may raise
        detail = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: not a readable numpy file without pickle ({detail[:300]})"
        ) from error


def _read_header(file: BinaryIO, size: int) -> tuple[tuple[int, ...], str, np.dtype[Any]]:
    """Shape, order ("C" or "F") and type of the array that follows, which ``size`` bytes hold."""
    version = npy.read_magic(file)
    if version not in _HEADERS:  # 3.0 is for fields with names in other letters than Latin ones
        raise ValueError(f"expected npy version 1.0 or 2.0, got {version}")
    shape, fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are stored by pickle")
    if dtype.itemsize == 0:
        raise ValueError(f"expected elements of at least one byte, got {dtype}")
    if any(length < 0 for length in shape):
        raise ValueError(f"expected lengths of at least 0, got {shape}")
    expected, found = math.prod(shape) * dtype.itemsize, size - file.tell()
    if expected > found:
        raise ValueError(f"expected {expected} bytes for {dtype} {list(shape)}, got {found}")
    return shape, "F" if fortran else "C", dtype


def _read_array(file: BinaryIO, size: int) -> npt.NDArray[Any]:
    shape, order, dtype = _read_header(file, size)
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype)
    content = file.read(count * dtype.itemsize)
    return np.frombuffer(content, dtype, count).reshape(shape, order=order)  # type: ignore[call-overload,no-any-return]


def read_arrays(
    path: str | os.PathLike[str], only: str | None = None
) -> npt.NDArray[Any] | dict[str, npt.NDArray[Any]]:
    """Read an npy or npz file (told apart by content).

    Args:
        path: the file.
        only: of an npz file with several arrays read just this one; ``None`` reads all.

    Returns:
        The array of an npy file, or the arrays of an npz file by name; not writable.

    Raises:
        FileNotFoundError: no file of that name.
        ValueError: damaged, holds Python objects, or claims more elements than it has; an npz file
            with several arrays, none of which is ``only``. The message names the file.

    Note:
        Takes as much memory as the arrays that are really there; deflate makes those of a
        compressed file at most 1032 times as large as the file.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.npz"
        >>> np.savez(path, a=np.arange(3))
        >>> read_arrays(path)
        {'a': array([0, 1, 2])}
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(4)
        file.seek(0)
        if magic not in _ZIP_MAGIC:
            with _named(path):
                return _read_array(file, size)
        with _named(path):
            archive = zipfile.ZipFile(file)
            names = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        if only is not None and len(names) > 1:
            if only not in names:
                raise ValueError(
                    f"{path}: expected an array named {only} or a single array, got {list(names)}"
                )
            names = {only: names[only]}
        arrays = {}
        with _named(path):
            for name, member in names.items():
                content = archive.read(member)  # checks the sum
                arrays[name] = _read_array(io.BytesIO(content), len(content))
        return arrays


def read_npz(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an npz file by name; errors as :func:`read_arrays`."""
    arrays = read_arrays(path)
    if isinstance(arrays, np.ndarray):
        raise ValueError(f"{path}: expected an npz file, got a single array, as an npy file holds")
    return arrays


def map_array(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """The array of an npy file as a read-only memory map; errors as :func:`read_arrays`."""
    path = Path(path)
    with path.open("rb") as file, _named(path):
        shape, order, dtype = _read_header(file, os.fstat(file.fileno()).st_size)
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", file.tell(), shape, order)  # type: ignore[call-overload,no-any-return]
