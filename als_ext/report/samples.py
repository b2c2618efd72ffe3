"""What a run says about each sample, in one compressed npz file without pickle."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from als_ext.data.arrays import read_npz
from als_ext.io import atomic_open

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RunSamples:
    """The training samples of one method's run; arrays [n] in the order of training.

    Attributes:
        index: int64, row of the source.
        given: int64, label before.
        label: int64, label after.
        true: int64, the true label; None where nobody knows it.
        loss: float32, nats, the latest against the label of then.
        log_pi: float32, nats; None for a method without weights.
        suspect: bool, whether the last correction had the label in question.
        share: float32 in [0, 1], votes for the winner. None, as suspect and margin, where the
            method judges no label or does not vote.
        margin: float32 in [-1, 1], the winner's lead.
        neighbours: int32 [s, k], positions of the nearest neighbours of each suspect, in order,
            nearest first; None where the method has none to tell.
        class_names: one for each class.
        files: path of each sample, for folder: data sets; else empty.
    """

    index: Array
    given: Array
    label: Array
    true: Array | None
    loss: Array
    log_pi: Array | None
    suspect: Array | None
    share: Array | None
    margin: Array | None
    neighbours: Array | None
    class_names: tuple[str, ...]
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.given)

    def __post_init__(self) -> None:
        n, classes = len(self.given), len(self.class_names)
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            expected, right = f"[{n}]", np.shape(value) == (n,)
            if name == "neighbours":
                expected, right = "[s, k]", np.ndim(value) == 2
            if not right or value.dtype.kind != kind:
                found = None if value is None else f"{list(value.shape)} of {value.dtype}"
                raise ValueError(f"{name}: expected {expected} of kind '{kind}', got {found}")
        for name in ("given", "label", "true"):
            _check_range(name, getattr(self, name), classes)
        if self.neighbours is not None:
            _check_range("neighbours", self.neighbours, n)
            suspects = 0 if self.suspect is None else int(self.suspect.sum())
            if len(self.neighbours) != suspects:
                raise ValueError(
                    f"neighbours: expected a row a suspect, {suspects}, got {len(self.neighbours)}"
                )
        if len(self.files) not in (0, n):
            raise ValueError(f"files: expected none or {n}, got {len(self.files)}")

    @property
    def relabelled(self) -> NDArray[np.int64]:
        """Positions of the samples whose label was changed, ascending."""
        return np.flatnonzero(self.given != self.label)


_KINDS = {
    **dict.fromkeys(("index", "given", "label", "true", "neighbours"), "i"),
    **dict.fromkeys(("loss", "log_pi", "share", "margin"), "f"),
    "suspect": "b",
}
_OPTIONAL = {"true", "log_pi", "suspect", "share", "margin", "neighbours"}


def _check_range(name: str, values: Array | None, limit: int) -> None:
    if values is not None and values.size and (values.min() < 0 or values.max() >= limit):
        wrong = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"{name}: expected values in [0, {limit}), got {wrong}")


def write_samples(path: str | os.PathLike[str], samples: RunSamples) -> None:
    """Write them to an npz file, replacing an older one; whole or not at all.

    Note:
        About 15 bytes a sample and 25 a suspect, less what compression saves.
    """
    arrays = {name: getattr(samples, name) for name in _KINDS}
    arrays = {name: _narrow(value) for name, value in arrays.items() if value is not None}
    # Text as bytes of JSON: numpy's own would take four bytes a character of the longest name.
    words = json.dumps({"class_names": samples.class_names, "files": samples.files})
    with atomic_open(path, overwrite=True) as file:
        np.savez_compressed(file, words=np.frombuffer(words.encode("ascii"), np.uint8), **arrays)


def _narrow(values: Array) -> Array:
    """The same integers in as few bytes as hold them."""
    if values.dtype.kind != "i" or not values.size:
        return values
    return values.astype(np.min_scalar_type(values.max()))  # none is negative


def read_samples(path: str | os.PathLike[str]) -> RunSamples:
    """Read a file of :func:`write_samples`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or something else than such a file; the message says what.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "samples.npz"
        >>> one = np.zeros(1, np.int64)
        >>> write_samples(path, RunSamples(
        ...     index=one, given=one, label=one + 1, true=None, loss=np.ones(1, np.float32),
        ...     log_pi=None, suspect=None, share=None, margin=None, neighbours=None,
        ...     class_names=("cat", "dog")))
        >>> read_samples(path).relabelled
        array([0])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"samples: expected a file, got none at {path}")
    try:
        arrays = read_npz(path)
        words = json.loads(arrays.pop("words").tobytes())
        names, files = (tuple(map(str, words[name])) for name in ("class_names", "files"))
        found: dict[str, Any] = {name: _widen(name, arrays.get(name)) for name in _KINDS}
        return RunSamples(class_names=names, files=files, **found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"samples: {path} is damaged or no file of a run ({error})") from error


def _widen(name: str, values: Array | None) -> Array | None:
    if values is None or values.dtype.kind != "u":
        return values
    return values.astype(np.int32 if name == "neighbours" else np.int64)
