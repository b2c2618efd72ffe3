"""A progress bar on stderr that falls silent where there is no terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A context manager around rich's bar; nothing at all happens when it is disabled.

    Args:
        title: stands left of the bar.
        total: number of steps.
        enabled: None shows it where stderr is a terminal.
    """

    def __init__(self, title: str, total: int, enabled: bool | None = None) -> None:
        self._title = title
        shown = sys.stderr.isatty() if enabled is None else enabled
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step_to(self, done: int) -> None:
        """Show ``done`` finished steps."""
        self._bar.update(self._task, completed=done)

    def note(self, text: str) -> None:
        """Show a text beside the title."""
        self._bar.update(self._task, description=f"{self._title} {text}")
