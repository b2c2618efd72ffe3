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
        enabled: None shows it where stderr is a terminal; a display that runs already gets the bar
            until the end of the context.
    """

    def __init__(self, title: str, total: int, enabled: bool | Progress | None = None) -> None:
        self._title = title
        self._bar: Progress | None = None
        self._shared = isinstance(enabled, Progress)
        if isinstance(enabled, Progress):
            self._bar = enabled
            self._task = enabled.add_task(title, total=total)
            return
        if not (sys.stderr.isatty() if enabled is None else enabled):
            return  # a disabled bar of rich prints an empty line all the same in some versions
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> ProgressBar:
        if self._bar is not None and not self._shared:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is None:
            return
        if self._shared:
            self._bar.remove_task(self._task)
        else:
            self._bar.stop()

    def step_to(self, done: int) -> None:
        """Show ``done`` finished steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def note(self, text: str) -> None:
        """Show a text beside the title."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._title} {text}")
