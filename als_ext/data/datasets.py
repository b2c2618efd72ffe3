"""Data sets in memory: digits, MNIST, Fashion-MNIST, npz files and image folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from als_ext.data.arrays import read_npz
from als_ext.data.download import SOURCES, RemoteDataset, fetch
from als_ext.data.folder import read_image_folder
from als_ext.data.idx import read_idx
from als_ext.data.labels import as_labels
from als_ext.data.splits import stratified_split

__all__ = ["ArrayDataset", "load_dataset"]

_TEST_FRACTION = 0.2
# The split belongs to the data set, not to the run: the same test samples whatever seed trains.
_SPLIT_SEED = 0

_CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """A classification data set in memory.

    Attributes:
        name: name of the data set, e.g. ``"mnist"``; for files the specification.
        x_train: ``float32 [n, C, H, W]`` images or ``[n, D]`` features. Images from bytes are in
            [0, 1] and NOT standardised; floating point features are as the file has them. Finite.
        y_train: ``int64 [n]``, classes in [0, ``num_classes``).
        x_test: like ``x_train``; has 0 rows if the source has no test part.
        y_test: like ``y_train``.
        num_classes: number of classes, at least 2.
        class_names: one name for each class.
        train_index: ``int64 [n]``, row of the source that each training sample came from: 0..n-1
            unless the loader made the split itself.
        train_files: path of each training sample relative to the folder, for ``folder:``; otherwise
            empty.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, label out of range, value that is not finite.

    Example:
        >>> import torch
        >>> from als_ext.data import ArrayDataset
        >>> data = ArrayDataset(
        ...     "two-points", torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]),
        ...     torch.empty(0, 1), torch.empty(0, dtype=torch.int64), 2, ("a", "b"), torch.arange(2)
        ... )
        >>> data.has_test
        False
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    class_names: tuple[str, ...]
    train_index: Tensor
    train_files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"{self.name}: expected at least 2 classes, got {self.num_classes}")
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"{self.name}: expected {self.num_classes} class names, got {len(self.class_names)}"
            )
        self._check_part("train", self.x_train, self.y_train)
        if len(self.y_test) or len(self.x_test):
            self._check_part("test", self.x_test, self.y_test)
        if self.x_test.shape[1:] != self.x_train.shape[1:]:
            raise ValueError(
                f"{self.name}: expected test samples of shape {list(self.x_train.shape[1:])} "
                f"as in x_train, got {list(self.x_test.shape[1:])}"
            )
        if self.train_index.shape != self.y_train.shape:
            raise ValueError(
                f"{self.name}: expected train_index of shape {list(self.y_train.shape)}, "
                f"got {list(self.train_index.shape)}"
            )
        if self.train_files and len(self.train_files) != len(self.y_train):
            raise ValueError(
                f"{self.name}: expected {len(self.y_train)} train_files, "
                f"got {len(self.train_files)}"
            )

    def _check_part(self, part: str, x: Tensor, y: Tensor) -> None:
        if x.dtype != torch.float32:
            raise TypeError(f"{self.name}: expected float32 x_{part}, got {x.dtype}")
        if x.ndim not in (2, 4) or len(x) == 0:
            raise ValueError(
                f"{self.name}: expected x_{part} of shape [n, D] or [n, C, H, W], "
                f"got {list(x.shape)}"
            )
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{self.name}: x_{part} holds NaN or infinity; expected finite values")
        as_labels(y, n=len(x), num_classes=self.num_classes, name=f"{self.name}: y_{part}")

    @property
    def has_test(self) -> bool:
        """Whether there is a test part."""
        return len(self.y_test) > 0


def _pixels(images: npt.NDArray[np.uint8]) -> Tensor:
    """``uint8 [n, H, W]`` or ``[n, C, H, W]`` to ``float32 [n, C, H, W]`` in [0, 1]."""
    x = torch.from_numpy(images.astype(np.float32)).div_(255.0)
    return x.unsqueeze(1) if x.ndim == 3 else x


def _take(x: Tensor, index: npt.NDArray[np.int64]) -> Tensor:
    return x.index_select(0, torch.from_numpy(index))


def _with_split(
    name: str,
    x: Tensor,
    y: Tensor,
    class_names: tuple[str, ...],
    files: Sequence[str] = (),
) -> ArrayDataset:
    train, test = stratified_split(y.numpy(), _TEST_FRACTION, _SPLIT_SEED)
    return ArrayDataset(
        name=name,
        x_train=_take(x, train),
        y_train=_take(y, train),
        x_test=_take(x, test),
        y_test=_take(y, test),
        num_classes=len(class_names),
        class_names=class_names,
        train_index=torch.from_numpy(train),
        train_files=tuple(files[i] for i in train) if files else (),
    )


def _load_digits() -> ArrayDataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The pixels are counts 0..16 of 4 x 4 blocks of a binary scan.
    x = torch.from_numpy(bunch.images.astype(np.float32)).div_(16.0).unsqueeze(1)
    y = torch.from_numpy(bunch.target.astype(np.int64))
    return _with_split("digits", x, y, _CLASS_NAMES["mnist"])


def _read_idx_pair(
    source: RemoteDataset, paths: Sequence[Path], first: int
) -> tuple[Tensor, Tensor]:
    # Checked by content, because MNIST and Fashion-MNIST give their files the same names and
    # shapes.
    images = read_idx(paths[first], 3, sha256=source.files[first].content_sha256)
    labels = read_idx(paths[first + 1], 1, sha256=source.files[first + 1].content_sha256)
    return _pixels(images), torch.from_numpy(labels.astype(np.int64))


def _load_idx(name: str, data_dir: str | os.PathLike[str] | None, download: bool) -> ArrayDataset:
    source = SOURCES[name]
    paths = fetch(source, data_dir, download=download)
    x_train, y_train = _read_idx_pair(source, paths, 0)
    x_test, y_test = _read_idx_pair(source, paths, 2)
    names = _CLASS_NAMES[name]
    return ArrayDataset(
        name, x_train, y_train, x_test, y_test, len(names), names, torch.arange(len(y_train))
    )


def _npz_inputs(arrays: dict[str, npt.NDArray[Any]], key: str, path: Path) -> Tensor:
    array = arrays[key]
    if array.ndim not in (2, 3, 4) or len(array) == 0:
        raise ValueError(
            f"{path}: {key}: expected shape [n, D], [n, H, W] or [n, C, H, W], "
            f"got {list(array.shape)}"
        )
    if array.dtype == np.uint8:
        x = torch.from_numpy(array.astype(np.float32)).div_(255.0)
    elif np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating):
        x = torch.from_numpy(array.astype(np.float32))
    else:
        raise ValueError(f"{path}: {key}: expected numbers, got {array.dtype}")
    return x.unsqueeze(1) if x.ndim == 3 else x


def _npz_labels(
    arrays: dict[str, npt.NDArray[Any]], key: str, n: int, num_classes: int | None, path: Path
) -> Tensor:
    try:
        return as_labels(arrays[key], n=n, num_classes=num_classes, name=f"{path}: {key}")
    except TypeError as error:
        raise ValueError(str(error)) from None


def _npz_class_names(
    arrays: dict[str, npt.NDArray[Any]], labels: Sequence[Tensor], path: Path
) -> tuple[str, ...]:
    if "class_names" not in arrays:
        return tuple(str(c) for c in range(1 + max(int(y.max()) for y in labels)))
    array = arrays["class_names"]
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError(
            f"{path}: class_names: expected strings of shape [C], "
            f"got {array.dtype} of shape {list(array.shape)}"
        )
    return tuple(array.tolist())


def _load_npz(spec: str, path: Path) -> ArrayDataset:
    arrays = read_npz(path)
    has_pair = {"x_train", "y_train"} <= arrays.keys()
    if not has_pair and not {"x", "y"} <= arrays.keys():
        raise ValueError(
            f"{path}: expected arrays x_train and y_train (x_test and y_test may be there), "
            f"or x and y, got {sorted(arrays)}"
        )
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise ValueError(f"{path}: expected both of x_test and y_test or none, got one")
    suffixes = ("_train", "_test") if "x_test" in arrays else ("_train",)
    if not has_pair:
        suffixes = ("",)
    inputs = [_npz_inputs(arrays, f"x{suffix}", path) for suffix in suffixes]
    labels = [
        _npz_labels(arrays, f"y{suffix}", len(x), None, path)
        for suffix, x in zip(suffixes, inputs, strict=True)
    ]
    names = _npz_class_names(arrays, labels, path)
    for suffix, y in zip(suffixes, labels, strict=True):
        as_labels(y, num_classes=len(names), name=f"{path}: y{suffix}")
    if not has_pair:
        return _with_split(spec, inputs[0], labels[0], names)
    return _with_test(spec, inputs, labels, names)


def _with_test(
    name: str,
    inputs: Sequence[Tensor],
    labels: Sequence[Tensor],
    class_names: tuple[str, ...],
    files: Sequence[str] = (),
) -> ArrayDataset:
    """Train and, if the lists have a second entry, test part as the source has them."""
    has_test = len(inputs) == 2
    return ArrayDataset(
        name=name,
        x_train=inputs[0],
        y_train=labels[0],
        x_test=inputs[1] if has_test else inputs[0][:0],
        y_test=labels[1] if has_test else labels[0][:0],
        num_classes=len(class_names),
        class_names=class_names,
        train_index=torch.arange(len(labels[0])),
        train_files=tuple(files),
    )


def _load_folder(spec: str, path: Path) -> ArrayDataset:
    images = read_image_folder(path)
    inputs = [_pixels(part.pixels) for part in images.parts]
    labels = [torch.from_numpy(part.labels) for part in images.parts]
    files = images.parts[0].files
    if images.split:
        return _with_test(spec, inputs, labels, images.class_names, files)
    return _with_split(spec, inputs[0], labels[0], images.class_names, files)


def load_dataset(
    spec: str, data_dir: str | os.PathLike[str] | None = None, download: bool = True
) -> ArrayDataset:
    """Load a data set into memory.

    ``digits``
        1,797 handwritten digits of 8 x 8 pixels that scikit-learn bundles (UCI, Optical recognition
        of handwritten digits); images in [0, 1], a fixed stratified split of 80 % to 20 %.
    ``mnist``, ``fashion-mnist``
        the original idx files (60,000 + 10,000 images of 28 x 28), found in ``data_dir`` (or a
        folder of the data set's name in it), plain or gzip; missing ones are downloaded. Their
        content is checked by SHA-256.
    ``npz:FILE``
        arrays ``x_train``, ``y_train`` and, if there, ``x_test``, ``y_test``; or ``x``, ``y``,
        which get the fixed stratified split of 80 % to 20 %. ``x``: [n, D], [n, H, W] or
        [n, C, H, W]; ``uint8`` is divided by 255, other numbers are kept.
        ``y``: integers from 0. ``class_names`` may be there. Pickled arrays are refused.
    ``folder:DIR``
        ``DIR/CLASS/*.png`` (``.jpg``, ``.jpeg``), split as above, or ``DIR/train/CLASS`` and
        ``DIR/test/CLASS``. Images of one size and one kind (grey or colour); classes and files in
        the order of their names.

    Args:
        spec: one of the above.
        data_dir: folder of the idx files; ``None`` is the user's cache folder. Only for ``mnist``
            and ``fashion-mnist``.
        download: get missing idx files from the known mirrors into ``data_dir``.

    Returns:
        :class:`ArrayDataset` on the CPU.

    Raises:
        FileNotFoundError: a file or folder is missing (and could not be downloaded); for idx files
            the message says which files to put where, with checksums.
        ValueError: unknown specification, damaged file, wrong shapes, labels out of range. The
            message names the file, what was expected and what was found.

    Example:
        >>> from als_ext.data import load_dataset
        >>> data = load_dataset("digits")
        >>> data.x_train.shape, data.x_test.shape, data.num_classes
        (torch.Size([1438, 1, 8, 8]), torch.Size([359, 1, 8, 8]), 10)
    """
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        return _load_digits()
    if spec in SOURCES:
        return _load_idx(spec, data_dir, download)
    if kind == "npz" and rest:
        return _load_npz(spec, Path(rest))
    if kind == "folder" and rest:
        return _load_folder(spec, Path(rest))
    known = ", ".join(("digits", *SOURCES, "npz:FILE", "folder:DIR"))
    raise ValueError(f"dataset: expected one of {known}, got {spec!r}")
