"""Reads the folder that ``als-ext run --out`` wrote."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from als_ext.metrics import FIELDS, FILES, Record
from als_ext.report.samples import RunSamples, read_samples

SETTINGS_FILE, RESULT_FILE, SAMPLES_FILE = "run.json", "result.json", "samples.npz"


@dataclass(frozen=True, eq=False)
class RunFolder:
    """A finished run, and one of its methods.

    Attributes:
        path: the folder.
        settings: those of the command.
        result: its figures: of all methods under their names.
        histories: records of the epochs, by method.
        method: the method whose samples are here.
        samples: what it says about each sample.
    """

    path: Path
    settings: dict[str, Any]
    result: dict[str, Any]
    histories: dict[str, list[Record]]
    method: str
    samples: RunSamples


def read_run(path: Path, method: str | None = None) -> RunFolder:
    """Read a finished run.

    Args:
        path: the folder.
        method: one of the run's methods; None: the last one that changed a label, else the last.

    Raises:
        FileNotFoundError: not the folder of a run, or of one that is not finished.
        ValueError: a file is damaged, or the run has no such method.
    """
    settings = _read_json(path / SETTINGS_FILE, "a folder of als-ext run --out")
    unfinished = f"a finished run; go on with: als-ext run --out {path} --resume"
    result = _read_json(path / RESULT_FILE, unfinished)
    try:
        settings = dict(settings["settings"])
        names = [str(name) for name in settings["method"]]
        changed = [name for name in names if result[name]["relabelled"]]
        result = {**result, "dataset": str(result["dataset"]), "noise": str(result["noise"])}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"run: {path / RESULT_FILE} does not fit {SETTINGS_FILE}") from error
    if method is None:
        method = (changed or names)[-1]
    if method not in names:
        raise ValueError(f"method: expected one of the run's, {', '.join(names)}, got {method!r}")
    file = path / method / SAMPLES_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"run: expected {file}, which earlier versions did not write; make it with: "
            f"als-ext run --out {path} --resume"
        )
    histories = {name: _read_history(path / name / FILES[0]) for name in names}
    return RunFolder(path, settings, result, histories, method, read_samples(file))


def _read_json(file: Path, expected: str) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"run: expected {expected}; got no {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"run: {file} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"run: {file} is damaged: expected an object, got {content!r:.40}")
    return content


def _read_history(file: Path) -> list[Record]:
    if not file.is_file():
        return []
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        # runs had no "evidence" once
        records = [{"evidence": None} | record for record in records]
        return [{name: _number(record[name]) for name in FIELDS} for record in records]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"run: {file} is damaged ({type(error).__name__}: {error})") from error


def _number(value: Any) -> int | float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"expected a finite number or null, got {value!r}")
    return value
