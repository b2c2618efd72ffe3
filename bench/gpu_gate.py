"""The gate of everything that needs a GPU; bench/gpu_gate.sh is its front.

Runs the parts of gpu_parts.py one after the other, each as commands of their own with one time
limit, and writes after each of them: STEM.json (which parts are done, keyed by commit and GPU),
STEM-PART.log (raw output), STEM-bench.json (raw times) and STEM.md (tables of all that). A part
that is done is not done again. With --minutes, parts are run while they fit, a benchmark as far as
it gets. Without libraries that fit, the part "build", nothing else is run. This file needs neither
als_ext nor a GPU to be imported.

Exit status: 0 all parts done, 1 some failed or lack a tool, 2 bad input, 3 some are unfinished
(the time limit; call again).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.gpu_host import architecture, code_key, facts, files_key, find_tool, slug
from bench.gpu_parts import BUILD, MINUTES, PYTHON, ROOT, Part, Step, all_parts

LIMIT_S = 540.0  # of a part
ROW_S = 40.0  # that the last row of a benchmark may take longer than it was told
LEAST_S = 75.0  # a benchmark is not begun with less
RESULTS, DRY_RESULTS = ROOT / "bench" / "results", ROOT / "build" / "gpu-gate-dry-run"
DONE, FAILED, MISSING, UNFINISHED = "done", "FAILED", "MISSING", "unfinished"
SCHEMA = 1


# ---- one part ----------------------------------------------------------------------------------


class Killed(Exception):
    """A command ran past its part's time limit."""


def execute(words: Sequence[str], env: dict[str, str], log: Path, limit_s: float) -> int:
    """Run a command with its output in ``log``; its exit status.

    Raises:
        Killed: it and what it started were ended at the limit.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("a") as out:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **env},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(0.0, limit_s))
        except BaseException as reason:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(reason, subprocess.TimeoutExpired):
                raise Killed from None
            raise


def counted(report: Path) -> dict[str, int]:
    """Tests of a junit file: how many ran, were skipped, failed."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    totals = {"tests": 0, "skipped": 0, "failures": 0, "errors": 0}
    for suite in suites:
        for key in totals:
            totals[key] += int(suite.get(key, 0))
    ran = totals["tests"] - totals["skipped"]
    return {
        "ran": ran,
        "skipped": totals["skipped"],
        "failed": totals["failures"] + totals["errors"],
    }


def hidden(folder: Path) -> dict[str, str]:
    """Paths of this machine that results shall not hold, and what stands there instead."""
    hide = {str(folder): "OUT", str(ROOT): ".", sys.executable: PYTHON}
    if sys.prefix != sys.base_prefix:  # a virtual environment; /usr is no secret
        hide[sys.prefix] = "VENV"
    return hide


def shown(words: Sequence[str], env: dict[str, str], hide: dict[str, str]) -> str:
    text = shlex.join(words)
    for path, name in hide.items():
        text = text.replace(path, name)
    return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in env.items()), text])


def run_step(
    step: Step, dry: bool, log: Path, limit_s: float, hide: dict[str, str]
) -> dict[str, Any]:
    """A step's record: command as shown, status, seconds, tests that ran."""
    minutes = f"{max(0.0, limit_s - ROW_S) / 60:.2f}"
    command = [word.replace(MINUTES, minutes) for word in step.command]
    record: dict[str, Any] = {"command": shown(command, step.env, hide)}
    words = list(step.dry) if dry else command
    env = {} if dry else step.env
    if not words:
        return record | {"status": DONE, "only_shown": True}
    if dry:
        record["dry_run"] = shown(words, env, hide)
    program = sys.executable if words[0] == PYTHON else find_tool(words[0])
    if program is None:
        return record | {"status": MISSING, "why": f"{words[0]} is not installed"}
    words = [program, *(sys.executable if word == PYTHON else word for word in words[1:])]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        if step.tests:
            words.append(f"--junit-xml={report}")
        try:
            code = execute(words, env, log, limit_s)
        except Killed:
            code = None
        tests = counted(report) if step.tests and report.exists() else None
    record["seconds"] = round(time.monotonic() - start, 1)
    if tests is not None:
        record["tests"] = tests
        if code == 0 and not dry and tests["ran"] == 0:
            return record | {"status": FAILED, "why": "every test was skipped"}
    # 3 of a benchmark: it left rows out, the next call makes them. pytest's is an internal error.
    if code is None or (code == 3 and step.stops_in_time):
        return record | {"status": UNFINISHED, "why": "the time limit"}
    return record | ({"status": DONE} if code == 0 else {"status": FAILED, "why": f"exit {code}"})


def run_part(
    part: Part, dry: bool, log: Path, hide: dict[str, str], limit_s: float
) -> dict[str, Any]:
    """A part's record; its first step that is not done ends it."""
    log.unlink(missing_ok=True)
    steps: list[dict[str, Any]] = []
    start = time.monotonic()
    for step in part.steps:
        left = limit_s - (time.monotonic() - start)
        steps.append(run_step(step, dry, log, left, hide))
        if steps[-1]["status"] != DONE:
            break
    if log.exists():  # raw, but for where the checkout and the interpreter are
        text = log.read_text(errors="replace")
        for path, name in hide.items():
            text = text.replace(path, name)
        log.write_text(text)
    last = steps[-1]
    record = {
        "status": last["status"],
        "seconds": round(time.monotonic() - start, 1),
        "steps": steps,
    }
    return record | ({"why": last["why"]} if "why" in last else {})


# ---- all parts ---------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """At once: a gate that is cut off leaves the state of before or after."""
    other = path.with_suffix(".tmp")
    other.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    other.replace(path)


def read_state(path: Path, head: dict[str, Any]) -> dict[str, Any] | None:
    """The file's state, where it is of the same environment."""
    old = json.loads(path.read_text()) if path.exists() else None
    return old if old and all(old.get(key) == head[key] for key in head) else None


def start_state(path: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The file's state, or a fresh one: another torch begins anew."""
    if (old := read_state(path, head)) is not None:
        return old
    if path.exists():
        _say("another environment than at the last call: all parts are run again")
        for times in path.parent.glob(f"{path.stem}-bench.json"):
            times.replace(times.with_suffix(".old"))  # rows of two environments are not mixed
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {**head, "date": now, "parts": {}}


def _say(text: str) -> None:
    print(text, flush=True)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"    {line}" for line in lines[-15:])


def goes_last(part: Part, before: dict[str, Any] | None) -> bool:
    """Whether the others go first: it failed, or took a whole time limit and may hang again."""
    if before is None or part.name == BUILD:  # nothing runs without it
        return False
    hung = before["status"] == UNFINISHED and before["seconds"] >= LIMIT_S
    return hung or before["status"] == FAILED


def needed_s(part: Part, before: dict[str, Any] | None) -> float:
    """Seconds without which a part is not begun; ``before`` is its record of an earlier call."""
    if any(step.stops_in_time for step in part.steps):
        return LEAST_S
    seconds = part.seconds
    if before is not None and before["status"] == UNFINISHED:  # it was cut off: more than that
        seconds = max(seconds, 1.5 * before["seconds"])
    return min(seconds, LIMIT_S)


def main(arguments: list[str] | None = None, make_parts: Any = all_parts) -> int:
    """Run, list or rehearse the parts."""
    parser = argparse.ArgumentParser(prog="bench/gpu_gate.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--list", action="store_true", help="name the parts and what is done")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: run what a CPU can")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N", help="run the parts that fit in"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="bench/results by default")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    here = facts()
    dry = options.dry_run
    if "gpu" not in here and not (dry or options.list):
        _say("gpu_gate: error: no CUDA device; --dry-run rehearses on a CPU")
        return 2
    gpu = "dry run" if dry or "gpu" not in here else here["gpu"]
    folder = (options.out or (DRY_RESULTS if dry else RESULTS)).resolve()
    key = code_key()
    stem = folder / f"gpu-{slug(gpu)}-{key}"
    parts = make_parts(str(stem), architecture(None if dry else here.get("capability")))
    chosen = [part for part in parts if not options.part or part.name in options.part]
    unknown = set(options.part or ()) - {part.name for part in parts}
    if unknown:
        _say(f"gpu_gate: error: no part {', '.join(sorted(unknown))}; --list names them")
        return 2
    head = {"schema": SCHEMA, "kind": "gpu gate", "gpu": gpu, "code": key, "where": here}
    head["files"] = files_key()
    state_path = stem.with_name(f"{stem.name}.json")
    if options.list:
        state = read_state(state_path, head) or {"parts": {}}
        _say(f"code {key}, files {head['files']}")
        for part in parts:
            status = state["parts"].get(part.name, {}).get("status", "–")
            _say(f"{part.name:22} {status:10} {part.what}")
        return 0
    state = start_state(state_path, head)
    folder.mkdir(parents=True, exist_ok=True)
    hide = hidden(folder)
    chosen.sort(key=lambda part: goes_last(part, state["parts"].get(part.name)))
    for number, part in enumerate(chosen, 1):
        before = f"[{number}/{len(chosen)}] {part.name}: "
        earlier = state["parts"].get(part.name)
        if earlier is not None and earlier["status"] == DONE:
            _say(before + "done already")
            continue
        left = end - time.monotonic()
        if left < needed_s(part, earlier):
            _say(before + f"left for the next call: {left:.0f} s are left")
            continue
        log = stem.with_name(f"{stem.name}-{part.name}.log")
        record = run_part(part, dry, log, hide, min(LIMIT_S, left))
        for step in record["steps"]:
            _say(f"    $ {step['command']}" + ("   (only shown)" if "only_shown" in step else ""))
            if "dry_run" in step:
                _say(f"    dry run: {step['dry_run']}")
        _say(before + record["status"] + (f": {record['why']}" if "why" in record else ""))
        if record["status"] != DONE:
            _say(_tail(log))
        state["parts"][part.name] = record
        write_json(state_path, state)
        if part.name == BUILD and record["status"] != DONE:
            break
    from bench import gpu_report  # needs nothing that the build makes, but only now

    page = stem.with_name(f"{stem.name}.md")
    page.write_text(gpu_report.page(state, [part.name for part in parts], stem))
    _say(f"written: {page.name} and {state_path.name}")
    found = {state["parts"].get(part.name, {}).get("status", UNFINISHED) for part in chosen}
    if UNFINISHED in found:
        _say("parts are left: call again")
    if found & {FAILED, MISSING}:
        return 1
    return 3 if UNFINISHED in found else 0


if __name__ == "__main__":
    sys.exit(main())
