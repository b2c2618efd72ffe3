"""The idx format of MNIST: unsigned bytes, one (labels) or three (images) dimensions.

A file is ``0x00 0x00 TYPE NDIM``, then NDIM big-endian 32-bit dimensions, then the elements in
row-major order (Y. LeCun, "The MNIST database", section "File formats"). TYPE 0x08 is unsigned
byte, the only one these data sets use.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

__all__ = ["read_idx"]

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08
_BLOCK_BYTES = 1 << 24
_TYPE_NAMES = {
    0x08: "unsigned byte",
    0x09: "signed byte",
    0x0B: "int16",
    0x0C: "int32",
    0x0D: "float32",
    0x0E: "float64",
}


def _read_up_to(stream: BinaryIO, count: int, path: Path) -> bytearray:
    content = bytearray()
    try:
        # In blocks: one read of a count from a damaged header would allocate that much memory.
        while len(content) < count:
            block = stream.read(min(count - len(content), _BLOCK_BYTES))
            if not block:
                break
            content += block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip stream is truncated or damaged ({error})") from error
    return content


def _read_header(stream: BinaryIO, ndim: int, path: Path) -> tuple[bytearray, tuple[int, ...]]:
    expected = bytes((0, 0, _UNSIGNED_BYTE, ndim))
    magic = _read_up_to(stream, 4, path)
    if len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] != _UNSIGNED_BYTE:
        found = _TYPE_NAMES.get(magic[2], f"unknown type 0x{magic[2]:02x}")
        raise ValueError(f"{path}: expected idx elements of type unsigned byte (0x08), got {found}")
    if magic != expected:
        raise ValueError(
            f"{path}: expected the idx magic number 0x{expected.hex()} "
            f"(unsigned byte, {ndim} dimensions), got 0x{magic.hex()} ({len(magic)} bytes)"
        )
    header = _read_up_to(stream, 4 * ndim, path)
    if len(header) != 4 * ndim:
        raise ValueError(
            f"{path}: truncated idx header: expected {4 + 4 * ndim} bytes, got {4 + len(header)}"
        )
    shape = struct.unpack(f">{ndim}I", header)
    if 0 in shape:
        raise ValueError(f"{path}: expected idx dimensions of at least 1, got {shape}")
    return magic + header, shape


def read_idx(
    path: str | os.PathLike[str], ndim: int, *, sha256: str | None = None
) -> npt.NDArray[np.uint8]:
    """Read one idx file of unsigned bytes, plain or gzip-compressed (told apart by content).

    Args:
        path: the file.
        ndim: number of dimensions the file must have: 1 for labels, 3 for images.
        sha256: hexadecimal SHA-256 that the decompressed content must have; ``None`` does not
            check.

    Returns:
        ``uint8`` array of the shape in the header, row-major.

    Raises:
        FileNotFoundError: no file of that name.
        ValueError: wrong magic number, element type or number of dimensions, a dimension of 0,
            fewer or more elements than the header says, a damaged gzip stream, or another checksum.
            The message names the file, what was expected and what was found.

    Note:
        Reads at most one byte more than the header announces, so a damaged header cannot make it
        read an endless stream.

    Example:
        >>> import pathlib, tempfile
        >>> from als_ext.data import read_idx
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "labels-idx1-ubyte"
        >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        >>> read_idx(path, 1)
        array([7, 2, 1], dtype=uint8)
    """
    if ndim < 1:
        raise ValueError(f"ndim: expected at least 1, got {ndim}")
    path = Path(path)
    with path.open("rb") as raw:
        compressed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if compressed else raw
        header, shape = _read_header(stream, ndim, path)
        expected = math.prod(shape)
        content = _read_up_to(stream, expected + 1, path)
    if len(content) < expected:
        raise ValueError(
            f"{path}: truncated: expected {expected} bytes for shape {shape}, got {len(content)}"
        )
    if len(content) > expected:
        raise ValueError(f"{path}: bytes after the {expected} that shape {shape} needs")
    if sha256 is not None:
        digest = hashlib.sha256(header)
        digest.update(content)
        if digest.hexdigest() != sha256:
            raise ValueError(
                f"{path}: another file than the original: expected SHA-256 {sha256} of the "
                f"decompressed content, got {digest.hexdigest()}"
            )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
