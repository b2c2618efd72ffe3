"""The original files of MNIST and Fashion-MNIST: on the disk, or at a mirror with a checksum."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

__all__ = ["SOURCES", "RemoteDataset", "RemoteFile", "fetch", "find"]

_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class RemoteFile:
    """One gzip-compressed idx file.

    Attributes:
        name: file name without ``.gz``.
        sha256: SHA-256 of the ``.gz`` file, hexadecimal.
        md5: MD5 of the ``.gz`` file, which is what most other documentation quotes.
        content_sha256: SHA-256 of the decompressed file.
    """

    name: str
    sha256: str
    md5: str
    content_sha256: str


@dataclass(frozen=True)
class RemoteDataset:
    """A data set of four idx files.

    Attributes:
        name: name in :func:`als_ext.data.load_dataset`.
        folders: folders below ``data_dir`` in which the files may lie, first ``""``, the folder
            itself.
        mirrors: addresses to which a file name is appended, tried in this order.
        files: train images, train labels, test images, test labels.
    """

    name: str
    folders: tuple[str, ...]
    mirrors: tuple[str, ...]
    files: tuple[RemoteFile, RemoteFile, RemoteFile, RemoteFile]


_MNIST = RemoteDataset(
    name="mnist",
    folders=("", "mnist", "MNIST/raw"),  # the last one is torchvision's
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    files=(
        RemoteFile(
            "train-images-idx3-ubyte",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        RemoteFile(
            "train-labels-idx1-ubyte",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        RemoteFile(
            "t10k-images-idx3-ubyte",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "9fb629c4189551a2d022fa330f9573f3",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        RemoteFile(
            "t10k-labels-idx1-ubyte",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            "ec29112dd5afa0611ce80d1b7f02629c",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
)

_FASHION_MNIST = RemoteDataset(
    name="fashion-mnist",
    folders=("", "fashion-mnist", "FashionMNIST/raw"),
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    files=(
        RemoteFile(
            "train-images-idx3-ubyte",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        RemoteFile(
            "train-labels-idx1-ubyte",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        RemoteFile(
            "t10k-images-idx3-ubyte",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "bef4ecab320f06d8554ea6380940ec79",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        RemoteFile(
            "t10k-labels-idx1-ubyte",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            "bb300cfdad3c16e7a12a480ee83cd310",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
)

SOURCES: Mapping[str, RemoteDataset] = MappingProxyType(
    {source.name: source for source in (_MNIST, _FASHION_MNIST)}
)


def find(source: RemoteDataset, file: RemoteFile, data_dir: Path) -> Path | None:
    """Path of ``file`` below ``data_dir``, plain or ``.gz``, or ``None``.

    Example:
        >>> from pathlib import Path
        >>> from als_ext.data.download import SOURCES, find
        >>> find(SOURCES["mnist"], SOURCES["mnist"].files[0], Path("no-such-folder")) is None
        True
    """
    for folder in source.folders:
        for name in (file.name, file.name + ".gz"):
            path = data_dir / folder / name
            if path.is_file():
                return path
    return None


def _default_dir(source: RemoteDataset) -> Path:
    import pooch

    return Path(pooch.os_cache("als_ext")) / source.name


def _instructions(source: RemoteDataset, missing: Sequence[RemoteFile], data_dir: Path) -> str:
    lines = [f"Put these files into {data_dir} (SHA-256, MD5; unpacked files do as well):"]
    lines += [f"  {file.name}.gz  {file.sha256}  {file.md5}" for file in missing]
    lines += ["They are served at", *(f"  {mirror}" for mirror in source.mirrors)]
    return "\n".join(lines)


def _download(source: RemoteDataset, file: RemoteFile, data_dir: Path) -> tuple[Path | None, str]:
    """Try every mirror in turn; the path, or what went wrong at each of them."""
    import pooch

    name = file.name + ".gz"
    failures: list[str] = []
    for mirror in source.mirrors:
        try:
            # pooch moves its temporary file into place only when the checksum is right.
            path = pooch.retrieve(
                mirror + name,
                known_hash=f"sha256:{file.sha256}",
                fname=name,
                path=data_dir,
                downloader=pooch.HTTPDownloader(timeout=_TIMEOUT_SECONDS),
            )
            return Path(path), ""
        except (OSError, ValueError) as error:  # noqa: PERF203  # no network, wrong checksum, ...
            failures.append(f"  {mirror}{name}: {error}")
    return None, "\n".join(failures)


def fetch(
    source: RemoteDataset, data_dir: str | os.PathLike[str] | None = None, *, download: bool = True
) -> list[Path]:
    """Paths of the files of a data set; files that are not there are downloaded.

    Args:
        source: which data set.
        data_dir: folder with the files, or with a folder of the data set's name. ``None`` is the
            user's cache folder.
        download: get missing files from the mirrors into ``data_dir``, each checked by SHA-256;
            ``False`` is an error when one is missing.

    Returns:
        Paths in the order of ``source.files``. Files that were already there are not checked here.

    Raises:
        FileNotFoundError: files are missing and were not, or could not be, downloaded. The message
            says which files to put where, and their checksums.
    """
    folder = _default_dir(source) if data_dir is None else Path(data_dir)
    paths = {file: find(source, file, folder) for file in source.files}
    missing = [file for file, path in paths.items() if path is None]
    if missing and not download:
        raise FileNotFoundError(
            f"{source.name}: {len(missing)} of {len(paths)} files are missing, download is off.\n"
            f"{_instructions(source, missing, folder)}"
        )
    for file in missing:
        path, failures = _download(source, file, folder)
        if path is None:
            still_missing = [f for f in missing if find(source, f, folder) is None]
            raise FileNotFoundError(
                f"{source.name}: {file.name}.gz could not be downloaded:\n{failures}\n"
                f"{_instructions(source, still_missing, folder)}"
            )
        paths[file] = path
    return [path for path in paths.values() if path is not None]
