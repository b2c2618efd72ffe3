"""``python -m bench``: race every operation, print one table, write one JSON.

python -m bench                                 the table of docs/performance.md
python -m bench --only knn,weighted_loss        some operations
python -m bench --max-minutes 10 --resume       go on where the last call stopped
python -m bench --device cuda --targets         on a GPU, the races that have a target there
python -m bench curves                          time against n, C, D, k and M
python -m bench report FILE... [--page PAGE]    Markdown of results; tables and plots of a page
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench import curve, machine, race, record, report, roofline

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Race every operation against its peers; one table, one JSON. Exit codes: 0 done, "
    "1 a gate or a race failed, 2 bad input, 3 rows are missing (time limit).",
)
CURVE_MINUTES = 1.0  # a curve takes less
DONE, FAILED, BAD_INPUT, UNFINISHED = 0, 1, 2, 3

Only = Annotated[str | None, typer.Option(help="Operations, separated by commas.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes, two rounds: a smoke test.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of all; torch's by default.")]
Out = Annotated[Path | None, typer.Option(help="JSON to write; in bench/results by default.")]
Minutes = Annotated[float, typer.Option(help="Start no race that would end later.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep the rows that the file has.")]


@app.callback(invoke_without_command=True)
def table(
    context: typer.Context,
    only: Only = None,
    quick: Quick = False,
    threads: Threads = None,
    out: Out = None,
    max_minutes: Minutes = math.inf,
    resume: Resume = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    targets: Annotated[
        bool, typer.Option("--targets", help="Only the races that have a target on a GPU.")
    ] = False,
) -> int:
    """Race every operation and print the table."""
    if context.invoked_subcommand is not None:
        return DONE
    races = [r for r in race.all_races(quick) if r.runs_on(device)]
    wanted = {r.name for r in races if r.has_gpu_targets or not targets}

    def run(one: race.Race, left: float) -> dict[str, Any]:
        return race.run(one, device=device, quick=quick, seconds_left=left)

    result, path, mine = _run(
        "table", races, run, only, quick, threads, out, max_minutes, resume, wanted, device=device
    )
    Console(width=None if sys.stdout.isatty() else 160).print(report.console(result))
    return _end(result, path, mine)


@app.command()
def curves(
    only: Only = None,
    quick: Quick = False,
    threads: Threads = None,
    out: Out = None,
    max_minutes: Minutes = math.inf,
    resume: Resume = False,
) -> int:
    """Time against one size, with the fitted exponent."""
    found = [c for m in race.modules() if hasattr(m, "curves") for c in m.curves(quick)]

    def run(one: curve.Curve, left: float) -> dict[str, Any]:
        if left <= CURVE_MINUTES * 60:
            raise race.OutOfTime
        return curve.run_curve(one, quick=quick)

    result, path, mine = _run("curves", found, run, only, quick, threads, out, max_minutes, resume)
    print(report.markdown(result))
    return _end(result, path, mine)


@app.command(name="report")
def show(
    files: Annotated[list[Path], typer.Argument(help="Results of the other commands.")],
    page: Annotated[
        Path | None, typer.Option(help="Page whose marked parts and plots are made anew.")
    ] = None,
) -> int:
    """Print results as Markdown, or put their tables and plots into a page."""
    results = {path: record.read(path) for path in files}
    if page is None:
        print("\n".join(report.markdown(result) for result in results.values()))
        return DONE
    report.update_page(page, results)
    return DONE


def _run(
    kind: str,
    tasks: Iterable[Any],
    run: Callable[[Any, float], dict[str, Any]],
    only: str | None,
    quick: bool,
    threads: int | None,
    out: Path | None,
    max_minutes: float,
    resume: bool,
    wanted: set[str] | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], Path, set[str]]:
    """Run the tasks that the file does not hold yet; the file is written after each.

    Args:
        wanted: names of the tasks to be run; by default all, of the operations ``only``.

    Returns:
        The result, its file, and the names of the rows that this call is to bring.
    """
    tasks = list(tasks)
    chosen = {task.op for task in tasks} if only is None else set(only.split(","))
    unknown = chosen - {task.op for task in tasks}
    if unknown:
        known = ", ".join(sorted({task.op for task in tasks}))
        raise ValueError(f"only: expected some of {known}, got {', '.join(sorted(unknown))}")
    machine.set_threads(threads or torch.get_num_threads())
    path = out or record.default_path(kind, torch.get_num_threads(), quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"quick": quick, **settings}
    fresh = record.head(kind, settings)
    result = record.start(path, fresh, resume)
    # A GPU on another host: the wall times of these rows are that host's.
    on_gpu = settings.get("device") == "cuda"
    host = {"machine": fresh["machine"]} if on_gpu and fresh["machine"] != result["machine"] else {}
    end = time.monotonic() + 60 * max_minutes
    done = {row["name"]: row for row in result["rows"]}
    failed = {name for name, row in done.items() if "failed" in row}
    if on_gpu and "peaks" not in result:
        result["peaks"] = roofline.measure()
    order = [task.name for task in tasks]
    mine = [t for t in tasks if t.op in chosen and (wanted is None or t.name in wanted)]
    mine.sort(key=lambda task: task.name in failed)  # these again, when the others are done
    for number, task in enumerate(mine):
        if task.name in done and task.name not in failed:
            continue
        _say(f"[{number + 1}/{len(mine)}] {task.name}")
        try:
            row = run(task, end - time.monotonic())
        except race.OutOfTime:
            _say("  left out, with all that follow: the time limit would be passed")
            break
        except Exception as error:
            row = {"op": task.op, "failed": f"{type(error).__name__}: {error}"[:500]}
            _say(f"  failed: {row['failed']}")
        done[task.name] = {"name": task.name, **row, **host}
        result["rows"] = [done[name] for name in order if name in done]
        result["complete"] = len(result["rows"]) == len(order)
        record.write(path, result)
        if "failed" in row and on_gpu and race.device_is_lost():
            _say("  the device is lost to this process; --resume goes on with the other rows")
            break
    return result, path, {task.name for task in mine}


def _end(result: dict[str, Any], path: Path, mine: set[str]) -> int:
    rows = [row for row in result["rows"] if row["name"] in mine]
    missing = len(mine) - len(rows)
    _say(f"written: {path}" + (f"; {missing} rows are missing, --resume" if missing else ""))
    if any("failed" in row or not row.get("gate", {}).get("passed", True) for row in rows):
        _say("a race failed, or ours missed an accuracy gate")
        return FAILED
    return UNFINISHED if missing else DONE


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; bad input is one line on stderr."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(words, prog_name="python -m bench", standalone_mode=False)
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        _say(f"bench: error: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        _say("interrupted; --resume goes on")
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own, wrong usage
            _say(f"bench: error: {error.format_message()}")
            return BAD_INPUT
        raise
    return code if isinstance(code, int) else DONE


if __name__ == "__main__":
    sys.exit(main())
