"""Checkpoint files: written whole or not at all, read without pickle's powers."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from als_ext.io import atomic_open

FORMAT = "als_ext checkpoint"
VERSION = 1


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Replace ``path`` by a checkpoint of ``state``, atomically.

    A process killed at any moment leaves the old file or the new one, never a part: temporary file,
    fsync, rename.

    Args:
        path: the file; its folder must exist.
        state: tensors, numbers, strings and containers of them (what ``weights_only`` loads).

    Raises:
        OSError: the disk is full, or the folder is read-only; the message names ``path``.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "checkpoint.pt"
        >>> save_checkpoint(path, {"epoch": 3})
        >>> load_checkpoint(path)["epoch"]
        3
    """
    with atomic_open(path, overwrite=True) as file:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
        except RuntimeError as error:
            # Its writer ends the archive after a failed write, too, and hides why that failed.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, with ``weights_only`` and onto the CPU.

    Args:
        path: a file of :func:`save_checkpoint`.

    Returns:
        The saved ``state`` with the entries ``format`` and ``version``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated or damaged, not a checkpoint of als_ext, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, got none at {path}")
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch.load does not check the sums
                damaged = archive.testzip()
            file.seek(0)
            state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # neither zipfile nor torch says what a damaged file may raise
            raise ValueError(
                f"checkpoint: expected a whole checkpoint file, got a truncated or damaged one at "
                f"{path} ({type(error).__name__})"
            ) from error
    if damaged:
        raise ValueError(f"checkpoint: {path} is damaged: wrong checksum of {damaged}")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint: expected a checkpoint of als_ext, got another file at {path}"
        )
    if state.get("version") != VERSION:
        raise ValueError(
            f"checkpoint: expected version {VERSION}, got {state.get('version')} at {path}"
        )
    return state


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """``model.load_state_dict`` that names the first entry that does not fit.

    Raises:
        ValueError: a missing or surplus entry, or another shape. The model is unchanged then.
    """
    own = model.state_dict()
    if missing := sorted(own.keys() - state.keys()) or sorted(state.keys() - own.keys()):
        side = "lacks" if missing[0] in own else "has a surplus"
        raise ValueError(f"checkpoint: it {side} '{missing[0]}': it belongs to another model")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"checkpoint: expected '{name}' of shape {list(tensor.shape)} (this model), "
                f"got {list(state[name].shape)}"
            )
    model.load_state_dict(state)


def check_same_settings(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignore: frozenset[str] = frozenset()
) -> None:
    """Refuse to resume with settings other than those a run was started with.

    Raises:
        ValueError: names every setting that differs, with the saved and the given value.
    """
    before, now = _flat(saved), _flat(current)
    different = [
        f"{key} was {_short(before.get(key))}, now {_short(now.get(key))}"
        for key in sorted((before.keys() | now.keys()) - ignore)
        if not _same(before.get(key), now.get(key))
    ]
    if different:
        raise ValueError(
            f"resume: expected the settings of the saved run, got {'; '.join(different)}"
        )


def _short(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, Tensor) or isinstance(now, Tensor):  # a prior
        both = isinstance(before, Tensor) and isinstance(now, Tensor)
        return both and before.dtype == now.dtype and torch.equal(before.cpu(), now.cpu())
    return bool(before == now)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
