"""Image folders: one folder a class, all images of one size."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FolderPart", "ImageFolder", "read_image_folder"]

_SUFFIXES = (".png", ".jpg", ".jpeg")
# Pillow's modes by what they become. Others (16-bit, float) would lose values as bytes.
_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "RGB"}


@dataclass(frozen=True, eq=False)
class FolderPart:
    """The images below one folder of class folders.

    Attributes:
        pixels: ``uint8 [n, C, H, W]``, C = 1 (grey) or 3 (colour).
        labels: ``int64 [n]``.
        files: path of each image relative to the folder, with ``/``.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    files: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """What :func:`read_image_folder` found.

    Attributes:
        class_names: names of the class folders, sorted.
        parts: train and test if ``split`` and there is a test folder, else one part.
        split: whether the folder has the layout ``train/CLASS``.
    """

    class_names: tuple[str, ...]
    parts: tuple[FolderPart, ...]
    split: bool


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_images(
    folder: Path, class_names: tuple[str, ...]
) -> tuple[list[Path], npt.NDArray[np.int64]]:
    files: list[Path] = []
    counts: list[int] = []
    for name in class_names:
        found = [p for p in (folder / name).iterdir() if p.suffix.lower() in _SUFFIXES]
        if not found:
            raise ValueError(
                f"{folder / name}: expected at least one image ({', '.join(_SUFFIXES)}), got none"
            )
        files += sorted(found, key=lambda path: path.name)
        counts.append(len(found))
    return files, np.repeat(np.arange(len(class_names), dtype=np.int64), counts)


def _open(path: Path) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode not in _MODES:
                raise ValueError(f"expected 8 bits a channel, got Pillow mode {image.mode}")
            return image.convert(_MODES[image.mode])
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow does not say what its formats may raise
        raise ValueError(f"{path}: not a readable image ({error})") from error


def _read_part(
    folder: Path, class_names: tuple[str, ...], like: tuple[int, ...] | None
) -> FolderPart:
    files, labels = _list_images(folder, class_names)
    pixels: npt.NDArray[np.uint8] | None = None
    for i, path in enumerate(files):
        array = np.asarray(_open(path), dtype=np.uint8)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        if like is None:
            like = array.shape
        if array.shape != like:
            raise ValueError(
                f"{path}: expected channels x height x width {'x'.join(map(str, like))} "
                f"as in the first image, got {'x'.join(map(str, array.shape))}"
            )
        if pixels is None:
            pixels = np.empty((len(files), *like), dtype=np.uint8)
        pixels[i] = array
    assert pixels is not None  # _list_images found at least one file for each class
    return FolderPart(pixels, labels, tuple(p.relative_to(folder).as_posix() for p in files))


def read_image_folder(path: str | os.PathLike[str]) -> ImageFolder:
    """Read the images of ``DIR/CLASS``, or of ``DIR/train/CLASS`` and ``DIR/test/CLASS``.

    Images end in ``.png``, ``.jpg`` or ``.jpeg``. Hidden folders and files with other endings are
    passed over. Grey images become one channel, colour and palette images three; transparency is
    dropped.

    Args:
        path: the folder.

    Returns:
        The images in the order of class name and file name, which is the same on every system.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: fewer than two classes, a class without images, a test class that the train part
            lacks, an image that is damaged or of another size or kind than the first. The message
            names the file.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    # A folder named train with class folders in it is a split, not a class.
    split = (root / "train").is_dir() and bool(_subfolders(root / "train"))
    base = root / "train" if split else root
    class_names = tuple(_subfolders(base))
    if len(class_names) < 2:
        raise ValueError(
            f"{base}: expected a folder for each of at least 2 classes, got {class_names}"
        )
    parts = [_read_part(base, class_names, None)]
    if split and (root / "test").is_dir():
        test_names = tuple(_subfolders(root / "test"))
        if test_names != class_names:
            raise ValueError(
                f"{root / 'test'}: expected the class folders {class_names} of {base}, "
                f"got {test_names}"
            )
        parts.append(_read_part(root / "test", class_names, parts[0].pixels.shape[1:]))
    return ImageFolder(class_names, tuple(parts), split)
