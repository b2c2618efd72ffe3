"""The typer application, and what becomes of errors: one line on stderr and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from als_ext.cli.compare import compare
from als_ext.cli.correct import correct
from als_ext.cli.decide import decide
from als_ext.cli.info import info
from als_ext.cli.report import report
from als_ext.cli.run import run

OK, FAILURE, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Bad input, by the conventions of this package; any other exception is a failure and keeps its
# traceback.
_BAD_INPUT = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ImportError,  # of an optional package, with a message that says how to get it
)
# typer carries its own click or needs the package, by version: its bases are found through it.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = _UsageError.__mro__[1]

app = typer.Typer(
    name="als-ext",
    help="Find and correct wrong labels while training. Exit codes: 0 done, 1 failure, "
    "2 wrong usage or bad input, 130 interrupted.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(run)
app.command()(compare)
app.command()(correct)
app.command()(report)
app.command()(decide)
app.command()(info)


@app.callback()
def _options(
    _traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error about bad input arose.")
    ] = False,
) -> None:
    """Options before the command; ``main`` looks at --traceback itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name; None takes those of the process.

    Returns:
        Exit code: 0 done, 1 failure (with a traceback), 2 wrong usage or bad input (one line on
        stderr), 130 interrupted. A full disk is a failure in one line.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(words, prog_name="als-ext", standalone_mode=False)
    except _ClickException as error:
        _say(f"{error.format_message()} (see als-ext --help)")
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except _BAD_INPUT as error:
        if "--traceback" in words:
            traceback.print_exc()
        _say(str(error))
        return BAD_INPUT
    except Exception as error:
        if not isinstance(error, OSError) or error.filename is None or "--traceback" in words:
            traceback.print_exc()  # a full disk is nothing that the code could do better
        _say(f"{type(error).__name__}: {error}")
        return FAILURE
    if code == INTERRUPTED:
        _say("interrupted")
    return code if isinstance(code, int) else OK


def _say(message: str) -> None:
    line = " ".join(message.split())  # one line, whatever the message was made of
    print(f"als-ext: error: {line}", file=sys.stderr)
