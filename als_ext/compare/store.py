"""The folder of a comparison: whole at any moment, whoever is killed while writing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from als_ext.compare.grid import Cell, Grid
from als_ext.io import atomic_write_text, remove_left_overs
from als_ext.ops._checks import check_type

try:
    import fcntl
except ImportError:  # Windows; two processes in one folder are the user's affair there
    fcntl = None  # type: ignore[assignment]

GRID_FILE, CELLS_FILE, CELLS_FOLDER, PLOTS_FOLDER = "grid.json", "cells.jsonl", "cells", "plots"
_NAMES = [field.name for field in fields(Cell)]
Result = dict[str, Any]  # one line of cells.jsonl


def read_grid(folder: Path) -> Grid | None:
    """The grid of a folder; None where the folder is new or empty.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: the grid's file is damaged.
    """
    file = folder / GRID_FILE
    if not file.is_file():
        own = (".lock", f".{GRID_FILE}.")  # of a process killed before it had written the grid
        if folder.exists() and (
            not folder.is_dir() or any(not f.name.startswith(own) for f in folder.iterdir())
        ):
            raise FileExistsError(
                f"out: expected a new or an empty folder or one of als-ext compare, got {folder}"
            )
        return None
    try:
        return Grid.from_dict(json.loads(file.read_text(encoding="utf-8"))["grid"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"out: {file} is damaged ({type(error).__name__}: {error})") from error


def cell_of(result: Result) -> Cell:
    """The cell that a line belongs to."""
    return Cell(**{name: result[name] for name in _NAMES})


def _check_result(result: Result) -> None:
    """Refuse a line without what the tables read, by KeyError or TypeError."""
    if result["status"] == "failed":
        check_type("error", result["error"], str)
    elif result["status"] == "done":
        check_type("settings", result["settings"], dict)
        check_type("versions", result["versions"], dict)
        for name, version in result["versions"].items():
            check_type(f"version of {name}", version, str)
        for name in ("model", "device", "clean_per_class"):
            if name not in result:
                raise KeyError(name)
    else:
        raise ValueError(f"status: expected done or failed, got {result['status']!r}")


def read_results(folder: Path) -> dict[Cell, Result]:
    """The lines of ``cells.jsonl`` by cell; empty without that file.

    Raises:
        ValueError: a line that is no result of a cell, or two of one cell.
    """
    file = folder / CELLS_FILE
    found: dict[Cell, Result] = {}
    if not file.is_file():
        return found
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            result = json.loads(line)
            cell = cell_of(result)
            _check_result(result)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"out: line {number} of {file} is no result of a cell "
                f"({type(error).__name__}: {error})"
            ) from error
        if cell in found:
            raise ValueError(f"out: line {number} of {file} is the second of {cell}")
        found[cell] = result
    return found


class Store:
    """The results of a grid, written whole after each cell.

    The file is replaced, not appended to: a killed process or a full disk leaves no half line, and
    the lines stand in the order of the grid, whoever finished first.

    Args:
        folder: an existing folder.
        grid: what its results belong to.

    Raises:
        ValueError: a damaged file, or results of a cell that the grid does not have.
    """

    def __init__(self, folder: Path, grid: Grid) -> None:
        self._file, self.grid = folder / CELLS_FILE, grid
        self.results = read_results(folder)
        if strange := self.results.keys() - set(grid.cells):
            raise ValueError(f"out: {self._file} has {min(map(str, strange))}, {GRID_FILE} has not")
        remove_left_overs(folder)
        content = json.dumps({"grid": grid.to_dict()}, indent=2, allow_nan=False) + "\n"
        atomic_write_text(folder / GRID_FILE, content, overwrite=True)

    @property
    def pending(self) -> list[Cell]:
        """Cells that are not done: new ones and failed ones."""
        return [c for c in self.grid.cells if self.results.get(c, {}).get("status") != "done"]

    @property
    def ordered(self) -> list[Result]:
        """The results in the order of the grid."""
        return [self.results[cell] for cell in self.grid.cells if cell in self.results]

    def add(self, cell: Cell, result: Result) -> None:
        """Write the result of a cell, over one of an earlier try."""
        self.results[cell] = dict(zip(_NAMES, astuple(cell), strict=True)) | result
        lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.ordered)
        atomic_write_text(self._file, lines, overwrite=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder; a killed process lets go by itself.

    Raises:
        ValueError: another process is at work in it.
    """
    if fcntl is None:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"out: expected a folder that nobody works in, got {folder}, where another "
                "process does"
            ) from error
        yield
