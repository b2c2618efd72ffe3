"""What ``als-ext run`` trains on: standardised samples, given labels, true ones if known."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pooch
import torch
from torch import Tensor

from als_ext.correction import read_decisions
from als_ext.data import ArrayDataset, apply_noise, load_dataset, parse_noise, read_labels
from als_ext.methods import METHODS

_OWN_DATA = ("npz:", "folder:")


@dataclass(frozen=True, eq=False)
class RunData:
    """Samples and labels of a run.

    Attributes:
        x_train: float32 [n, ...], standardised.
        given_labels: int64 [n], the labels to train on.
        kept: int64 [m], ascending: samples whose labels a person decided; they stay as they are.
        true_labels: int64 [n]; None for a user's own data whose labels are the given ones.
        test: standardised samples and their labels; None without any.
        num_classes: number of classes.
        class_names: one name for each class.
        noise: how the labels became wrong.
        noise_rate: realised share of wrong labels; None where the true ones are unknown.
        source_index: int64 [n], row of the source of each sample.
        files: path of each sample in a folder; else empty.
    """

    x_train: Tensor
    given_labels: Tensor
    kept: Tensor
    true_labels: Tensor | None
    test: tuple[Tensor, Tensor] | None
    num_classes: int
    class_names: tuple[str, ...]
    noise: str
    noise_rate: float | None
    source_index: Tensor
    files: tuple[str, ...]


def load_run_data(settings: dict[str, Any]) -> RunData:
    """Load a data set and make or read its wrong labels.

    True labels are those of the data set; only where a user's own data (npz:, folder:) gets
    neither noise nor a label file they are taken as unknown.

    Raises:
        ValueError: noise and a label file together, or what the readers raise.
        FileNotFoundError: a file that is not there.
    """
    spec, noise, labels = settings["dataset"], settings["noise"], settings["labels"]
    if noise is not None and labels is not None:
        raise ValueError(f"noise: expected --noise or --labels, got both ({noise}; {labels})")
    own = spec.startswith(_OWN_DATA)
    if noise is None:
        noise = "none" if own or labels is not None else "symmetric:0.4"
    parsed = parse_noise(noise)
    if parsed.kind == "file":
        labels = parsed.path
    if labels is not None and not Path(labels).is_file():
        raise FileNotFoundError(f"labels: expected a file, got none at {labels}")
    if not sys.stderr.isatty():  # downloads are announced to a terminal only
        pooch.get_logger().setLevel("WARNING")
    data = load_dataset(spec, settings["data_dir"])
    true: Tensor | None = data.y_train
    if labels is not None:
        given, noise = _labels_of_source(labels, data), f"file:{Path(labels).name}"
    else:
        features = data.x_train if parsed.needs_features else None
        given = apply_noise(
            data.y_train,
            parsed,
            num_classes=data.num_classes,
            seed=settings["seed"],
            features=features,
            dataset=data.name,
        ).labels
        if own and parsed.kind == "none":
            true = None
    given, kept = _decided(settings["decisions"], given, data.num_classes)
    x_train, x_test = _standardised(data.x_train, data.x_test)
    return RunData(
        x_train=x_train,
        given_labels=given,
        kept=kept,
        true_labels=true,
        test=(x_test, data.y_test) if data.has_test else None,
        num_classes=data.num_classes,
        class_names=data.class_names,
        noise=noise,
        noise_rate=None if true is None else int((given != true).sum()) / len(given),
        source_index=data.train_index,
        files=data.train_files,
    )


def _labels_of_source(path: str, data: ArrayDataset) -> Tensor:
    """One label a row of the source; where the loader split it, those of the training rows."""
    n = len(data.y_train)
    rows = data.train_index
    split = not torch.equal(rows, torch.arange(n))
    labels = read_labels(path, n=n + split * len(data.y_test), num_classes=data.num_classes)
    return labels[rows]


def _decided(paths: list[str], given: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Labels with the decisions of each file in turn, and the samples that were decided about."""
    rows = [torch.empty(0, dtype=torch.int64)]
    for path in paths:
        found = read_decisions(path)
        given = found.apply(given, num_classes)
        rows.append(found.row)
    return given, torch.unique(torch.cat(rows))


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance over the training samples, by channel or feature."""
    axes = [axis for axis in range(train.ndim) if axis != 1]
    mean = train.mean(axes, keepdim=True)
    scale = train.std(axes, keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a constant feature becomes 0
    return (train - mean) / scale, (test - mean) / scale


def clean_subset(data: RunData, per_class: int, seed: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """``per_class`` random training samples of every class, their true labels, their positions.

    The samples stay in the training set with the labels that they were given there.

    Raises:
        ValueError: the true labels are not known, or a class has fewer samples.
    """
    if per_class == 0:
        return None
    true = data.true_labels
    if true is None:
        raise ValueError("clean-per-class: expected data whose true labels are known")
    order = torch.randperm(len(true), generator=torch.Generator().manual_seed(seed))
    order = order[true[order].argsort(stable=True)]  # by class, at random within it
    sizes = true.bincount(minlength=data.num_classes)
    if int(sizes.min()) < per_class:
        raise ValueError(
            f"clean-per-class: expected at most {int(sizes.min())}, the samples of the smallest "
            f"class, got {per_class}"
        )
    starts = sizes.cumsum(0) - sizes
    rows = order[(starts[:, None] + torch.arange(per_class)).flatten()]
    return data.x_train[rows], true[rows], rows


def method_settings(methods: list[str], words: list[str]) -> dict[str, dict[str, Any]]:
    """NAME=VALUE words for the methods whose ``Settings`` have the name. Values are JSON or text.

    Raises:
        ValueError: not of that form, or a name that none of the methods has.
    """
    found: dict[str, dict[str, Any]] = {method: {} for method in methods}
    known = {m: {field.name for field in fields(METHODS[m].Settings)} for m in methods}
    for word in words:
        name, equals, text = word.partition("=")
        takers = [method for method in methods if name in known[method]]
        if not equals or not takers:
            names = sorted(set().union(*known.values()))
            raise ValueError(
                f"setting: expected NAME=VALUE with a name of {', '.join(methods)} "
                f"({', '.join(names) or 'they have none'}), got {word!r}"
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        for method in takers:
            found[method][name] = value
    return found
