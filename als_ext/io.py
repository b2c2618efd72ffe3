"""Atomic file writing, for label files, checkpoints and metrics."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "atomic_open",
    "atomic_write_bytes",
    "atomic_write_text",
    "named_errors",
    "remove_left_overs",
]

_LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"path: {path} exists; expected a new file (or overwrite=True)")


def _sync_folder(folder: Path) -> None:
    # Without this the rename itself may be lost in a power cut. Not every system lets a folder be
    # opened (Windows does not); there the file contents are still synced.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def remove_left_overs(folder: Path) -> None:
    """Remove the temporary files of :func:`atomic_open` that a killed process left in a folder."""
    for file in folder.glob(".*.tmp"):
        if _LEFT_OVER.fullmatch(file.name):
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def named_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Make errors of the system name ``path``: those of a write (a full disk) name nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in {None, str(temporary)}:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file that appears under its name whole, or not at all.

    The bytes go to a temporary file in the same folder, are flushed to the disk (``fsync``) and
    then renamed (``os.replace``). If the body raises, or the process is killed, the old file is
    what it was; an exception also removes the temporary file.

    Args:
        path: file to write. Its folder must exist. A symbolic link is followed: the file it points
            to is replaced.
        overwrite: replace an existing file. ``False`` refuses, before anything is written.

    Yields:
        A binary file object open for writing.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false.
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        OSError: the disk is full, or the folder is read-only; the message names ``path``.

    Note:
        With ``overwrite=False`` a file that another process creates between the last check and the
        rename is replaced.

    Example:
        >>> import pathlib, tempfile
        >>> from als_ext.io import atomic_open
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with atomic_open(folder / "a.bin") as file:
        ...     _ = file.write(b"abc")
        >>> (folder / "a.bin").read_bytes()
        b'abc'
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"path: {target} is a folder; expected a file name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {target.parent} does not exist")
    if not overwrite:
        _refuse_existing(target)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    # os.open rather than tempfile: the file gets the usual permissions (0666 less the umask), not
    # 0600.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with named_errors(target, temporary):
        try:
            with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if not overwrite:
                _refuse_existing(target)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong first is what matters
                temporary.unlink()
            raise
    _sync_folder(target.parent)


def atomic_write_bytes(
    path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False
) -> None:
    """Write ``data`` to ``path`` by :func:`atomic_open` (same arguments, same errors).

    Example:
        >>> import pathlib, tempfile
        >>> from als_ext.io import atomic_write_bytes
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.bin"
        >>> atomic_write_bytes(path, b"abc")
        >>> path.read_bytes()
        b'abc'
    """
    with atomic_open(path, overwrite=overwrite) as file:
        file.write(data)


def atomic_write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = False) -> None:
    r"""Write ``text`` as UTF-8 to ``path`` by :func:`atomic_open` (same arguments, same errors).

    Example:
        >>> import pathlib, tempfile
        >>> from als_ext.io import atomic_write_text
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> atomic_write_text(path, "one\n")
        >>> path.read_text(encoding="utf-8")
        'one\n'
    """
    atomic_write_bytes(path, text.encode("utf-8"), overwrite=overwrite)
