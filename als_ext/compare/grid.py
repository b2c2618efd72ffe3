"""What a comparison consists of: cells of data sets x noises x methods x seeds."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from als_ext.checkpoint import check_same_settings
from als_ext.data import parse_noise
from als_ext.data.download import SOURCES
from als_ext.ops._checks import check_int, check_type

AXES = ("datasets", "noises", "methods")  # of a grid, in the order of a cell's names
DATASET_KINDS = ("digits", *SOURCES, "npz:FILE", "folder:DIR")


def slug(*names: str) -> str:
    """Names in one that every file system takes.

    Example:
        >>> slug("digits", "symmetric:0.4")
        'digits_symmetric-0.4'
    """
    return "_".join(re.sub(r"[^\w.+=-]+", "-", name) for name in names)


@dataclass(frozen=True)
class Cell:
    """One training. The names hold no folder, so they mean the same on every machine."""

    dataset: str
    noise: str
    method: str
    seed: int

    def __post_init__(self) -> None:
        for name in ("dataset", "noise", "method"):
            check_type(name, getattr(self, name), str)
        check_int("seed", self.seed, low=0)

    def __str__(self) -> str:
        return f"{self.dataset} {self.noise} {self.method} seed {self.seed}"

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return slug(self.dataset, self.noise, self.method, str(self.seed))


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own.

    Args:
        method: a name in ``als_ext.methods.METHODS``.
        settings: what only the method knows (``TrainConfig.settings``).
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """The cells of a comparison and all that they need.

    Args:
        datasets: specification of each data set, by its name.
        noises: specification of each noise, by its name.
        methods: what is trained, by its name in the tables.
        settings: of every cell, by the names of the options of ``als-ext run``.
        cells: in the order in which they are run.

    Raises:
        ValueError: the names of two cells give the same folder.
    """

    datasets: Mapping[str, str]
    noises: Mapping[str, str]
    methods: Mapping[str, Variant]
    settings: Mapping[str, Any]
    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        slugs: dict[str, Cell] = {}
        for cell in self.cells:
            other = slugs.setdefault(cell.slug, cell)
            if other != cell:
                raise ValueError(
                    f"grid: expected names that differ in letters or digits, got {other} and {cell}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The grid as plain types, as it stands in ``grid.json``."""
        return {
            **dataclasses.asdict(self),
            "cells": [list(dataclasses.astuple(cell)) for cell in self.cells],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Grid:
        """What ``to_dict`` returned.

        Raises:
            KeyError, TypeError, ValueError: anything else.
        """
        for name in (*AXES, "settings"):
            check_type(name, content[name], dict)
        for name in ("datasets", "noises"):
            for spec in content[name].values():
                check_type(name, spec, str)
        for entry in content["methods"].values():
            check_type("method", entry["method"], str)
            check_type("settings", entry["settings"], dict)
        cells = tuple(Cell(*values) for values in content["cells"])
        for cell in cells:
            for axis, name in zip(AXES, dataclasses.astuple(cell)[:3], strict=True):
                if name not in content[axis]:
                    raise ValueError(f"{axis}: expected {name!r}, which {cell} needs")
        return cls(
            datasets=content["datasets"],
            noises=content["noises"],
            methods={name: Variant(**entry) for name, entry in content["methods"].items()},
            settings=content["settings"],
            cells=cells,
        )

    @property
    def seeds(self) -> list[int]:
        """Every seed that some cell has."""
        return list(dict.fromkeys(cell.seed for cell in self.cells))

    def extended(self, more: Grid) -> Grid:
        """This grid and the cells of another one that are not in it yet.

        Raises:
            ValueError: a name of both stands for something else, or the settings differ.
        """
        before, now = self._identity(), more._identity()
        common = {
            kind: {name: value for name, value in now[kind].items() if name in before[kind]}
            for kind in now
        }
        check_same_settings({k: {n: before[k][n] for n in common[k]} for k in common}, common)
        return Grid(
            datasets={**self.datasets, **more.datasets},
            noises={**self.noises, **more.noises},
            methods={**self.methods, **more.methods},
            settings=more.settings,
            cells=tuple(dict.fromkeys((*self.cells, *more.cells))),
        )

    def _identity(self) -> dict[str, dict[str, Any]]:
        """All that must not change between two calls: where the idx files lie may."""
        content = self.to_dict()
        content["settings"] = {k: v for k, v in self.settings.items() if k != "data_dir"}
        return {k: content[k] for k in ("datasets", "noises", "methods", "settings")}


def make_grid(
    datasets: Mapping[str, str],
    noises: Mapping[str, str],
    methods: Mapping[str, Variant],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
) -> Grid:
    """Every combination; all of one seed before the next, so that whole tables come early.

    Raises:
        ValueError: nothing in one of the axes.
    """
    axes = {"dataset": datasets, "noise": noises, "method": methods, "seeds": seeds}
    for name, axis in axes.items():
        if not axis:
            raise ValueError(f"{name}: expected at least one, got none")
    cells = (Cell(d, n, m, s) for s, d, n, m in product(seeds, datasets, noises, methods))
    return Grid(datasets, noises, methods, settings, tuple(dict.fromkeys(cells)))


def from_anywhere(spec: str) -> str:
    """A data set's or a noise's specification, with the whole path where it holds one."""
    kind, _, rest = spec.partition(":")
    return f"{kind}:{os.path.abspath(rest)}" if kind in {"npz", "folder", "file"} and rest else spec


def named_datasets(specs: Sequence[str]) -> dict[str, str]:
    """Names without folders, and specifications with absolute ones.

    Raises:
        ValueError: an unknown specification, or two of the same name.
        FileNotFoundError: a file or folder that is not there.
    """
    found: dict[str, str] = {}
    for spec in specs:
        kind, _, rest = spec.partition(":")
        name = spec
        if kind in {"npz", "folder"} and rest:
            path = Path(os.path.abspath(rest))  # a link keeps its name
            if not path.exists():
                raise FileNotFoundError(f"dataset: expected a file or folder, got none at {rest}")
            name, spec = f"{kind}:{path.name}", from_anywhere(spec)
        elif spec not in DATASET_KINDS[:-2]:
            raise ValueError(f"dataset: expected {', '.join(DATASET_KINDS)}, got {spec!r}")
        _add_new("dataset", found, name, spec)
    return found


def named_noises(specs: Sequence[str]) -> dict[str, str]:
    """As :func:`named_datasets`, for noises."""
    found: dict[str, str] = {}
    for spec in specs:
        parsed = parse_noise(spec)
        name = spec
        if parsed.path is not None:
            path = Path(os.path.abspath(parsed.path))
            if not path.is_file():
                raise FileNotFoundError(f"noise: expected a file, got none at {parsed.path}")
            name, spec = f"file:{path.name}", from_anywhere(spec)
        _add_new("noise", found, name, spec)
    return found


def _add_new(axis: str, found: dict[str, str], name: str, spec: str) -> None:
    if name in found:
        raise ValueError(f"{axis}: expected names that differ, got {name} twice")
    found[name] = spec


def parse_seeds(text: str) -> list[int]:
    """Seeds of a text such as "0-2,7".

    Raises:
        ValueError: something else.

    Example:
        >>> parse_seeds("0-2,7")
        [0, 1, 2, 7]
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"seeds: expected numbers and ranges such as 0-2,7, got {text!r}")
        seeds += range(first, last + 1)
    return seeds


def split_list(words: Sequence[str]) -> list[str]:
    """Comma lists in one list. A comma before a digit belongs to its entry, as in a class map.

    Example:
        >>> split_list(["none,asymmetric:0.4:7-1,2-7", "pair:0.45"])
        ['none', 'asymmetric:0.4:7-1,2-7', 'pair:0.45']
    """
    return [part.strip() for word in words for part in re.split(r",(?!\s*\d)", word)]
