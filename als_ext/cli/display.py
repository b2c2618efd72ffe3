"""How far a comparison is: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from als_ext.compare.grid import Cell
from als_ext.compare.store import Result


class Display:
    """A context manager for stderr: a line for each finished cell, and bars below in a terminal.

    Args:
        total: number of cells to train.
        quiet: show nothing at all.
    """

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._done, self._quiet = total, 0, quiet
        self._started = time.monotonic()
        self.bars: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                speed_estimate_period=float("inf"),  # a cell may take longer than rich looks back
            )
            self._cells = self.bars.add_task("cells", total=total)

    def __enter__(self) -> Display:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def finished(self, cell: Cell, result: Result) -> None:
        """Say what became of a cell."""
        self._done += 1
        if self._quiet:
            return
        line = f"[{self._done}/{self._total}] {cell}: {_outcome(result)}"
        if self.bars is not None:
            self.bars.advance(self._cells)
            self.bars.console.print(line, markup=False, highlight=False)
            return
        spent = time.monotonic() - self._started
        left = spent / self._done * (self._total - self._done)
        print(f"{line}; about {_duration(left)} left", file=sys.stderr, flush=True)


def _outcome(result: Result) -> str:
    if result["status"] == "failed":
        return f"FAILED: {result['error']}"
    accuracy = result["test_accuracy"]
    shown = "" if accuracy is None else f"test accuracy {accuracy:.4f}, "
    return f"{shown}{result['seconds']:.1f} s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
