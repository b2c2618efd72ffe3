"""Results on disk: one JSON a run, one line a row, written anew after every row."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from als_ext.io import atomic_write_text
from bench import machine

SCHEMA = 1
FOLDER = machine.ROOT / "bench" / "results"
SAME = ("schema", "kind", "settings", "versions", "commit")  # of a resumed run, and the machine


def head(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A result without rows."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": now.isoformat(timespec="seconds"),
        "settings": settings,
        **machine.facts(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "complete": False,
        "rows": [],
    }


def default_path(kind: str, threads: int, quick: bool) -> Path:
    """``bench/results/KIND-COMMIT-Nt.json``: a later call with --resume finds it."""
    name = f"{kind}-{(machine.commit()['hash'] or 'unknown')[:8]}-{threads}t"
    return FOLDER / f"{name}{'-quick' if quick else ''}.json"


def write(path: Path, result: dict[str, Any]) -> None:
    """Atomically; a row a line, so that a change of one row is a change of one line."""
    lines = ["{"]
    for key, value in result.items():
        if key != "rows":
            lines.append(f" {json.dumps(key)}: {json.dumps(value)},")
    rows = [json.dumps(row) for row in result["rows"]]  # the error of a wrong result may be NaN
    lines += [' "rows": [', ",\n".join(rows), " ]", "}", ""]
    atomic_write_text(path, "\n".join(lines), overwrite=True)


def read(path: Path) -> dict[str, Any]:
    """A result.

    Raises:
        ValueError: not one, or one of another version of this format.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: expected a result of schema {SCHEMA}")
    return result


def start(path: Path, fresh: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The result to go on with: the file's, or ``fresh``.

    Raises:
        FileExistsError: the file is there and ``resume`` is false.
        ValueError: the file was made elsewhere, or by other code or settings.
    """
    if not path.exists():
        return fresh
    if not resume:
        raise FileExistsError(f"{path} exists: --resume goes on with it, --out writes another")
    old = read(path)
    differs = [key for key in SAME if old.get(key) != fresh[key]]
    if _machine(old) != _machine(fresh):
        differs.append("machine")
    if differs:
        raise ValueError(f"{path.name}: a row of this run would differ in {', '.join(differs)}")
    return old


def _machine(result: dict[str, Any]) -> dict[str, Any]:
    """What the times depend on: not the memory, of which a virtual machine has a little more or
    less at each start; on a GPU not its host, which another loan brings with another CPU."""
    on_gpu = result.get("settings", {}).get("device") == "cuda"
    where = result.get("machine", {}).items()
    if on_gpu:
        return {key: value for key, value in where if key.startswith("gpu")}
    return {key: value for key, value in where if key != "memory_gib"}
