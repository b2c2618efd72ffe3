"""How far a comparison is: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from als_ext.compare.grid import Cell
from als_ext.compare.store import Result


class _TimeLeft(TimeRemainingColumn):
    """rich's own, which forgets what took longer than half a minute; or a task's own text."""

    def render(self, task: Task) -> Text:
        """The text of the column."""
        return Text(task.fields["left"]) if "left" in task.fields else super().render(task)


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
                _TimeLeft(),
                console=Console(stderr=True),
                transient=True,
            )
            self._cells = self.bars.add_task("cells", total=total, left="")

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

    def started(self, cell: Cell) -> None:
        """Show which cell is being trained."""
        if self.bars is not None:
            self.bars.update(self._cells, description=str(cell))

    def finished(self, cell: Cell, result: Result) -> None:
        """Say what became of a cell, and how long the others may take."""
        self._done += 1
        spent = time.monotonic() - self._started
        left = _duration(spent / self._done * (self._total - self._done))
        line = f"[{self._done}/{self._total}] {cell}: {_outcome(result)}"
        if self.bars is not None:
            self.bars.update(self._cells, completed=self._done, left=f"about {left}")
            self.bars.console.print(line, markup=False, highlight=False)
        elif not self._quiet:
            print(f"{line}; about {left} left", file=sys.stderr, flush=True)


def _outcome(result: Result) -> str:
    if result["status"] == "failed":
        return f"FAILED: {result['error']}"
    accuracy = result["test_accuracy"]
    shown = "" if accuracy is None else f"test accuracy {accuracy:.4f}, "
    return f"{shown}{result['seconds']:.1f} s"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
