"""The page: what goes into it, and the one file that comes out."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from numpy.typing import NDArray

from als_ext._library import __version__
from als_ext.correction import labels_digest
from als_ext.correction.decisions import FORMAT, VERSION
from als_ext.io import atomic_write_text
from als_ext.ops._checks import check_int
from als_ext.report.charts import histogram, line_chart
from als_ext.report.pack import pack
from als_ext.report.pictures import load_source, picture_rows
from als_ext.report.run_folder import RunFolder, read_run
from als_ext.report.samples import RunSamples

_SCRIPTS = ("data.js", "decisions.js", "detail.js", "list.js")
_MATRIX = 30  # classes; more are listed as pairs
_PAIRS = 50
_LEAST = 1e-6  # nats, the least loss that is told from none
_CURVES = {
    "test_accuracy": "Test accuracy",
    "label_accuracy": "Labels that are right",
    "train_loss": "Training loss, nats",
    "changed": "Changed labels",
}
_FIGURES = {
    "test_accuracy": "Test accuracy",
    "label_accuracy_before": "Labels right before",
    "label_accuracy_after": "Labels right after",
    "relabel_precision": "Precision",
    "relabel_recall": "Recall",
    "relabelled": "Relabelled",
    "seconds": "Seconds",
}


@dataclass(frozen=True)
class Written:
    """What :func:`write_report` wrote.

    Attributes:
        path: the file.
        size: its size, bytes.
        method: the method that it is about.
        relabels: how many relabels it lists.
        pictured: how many of them are shown with their sample and its neighbours.
        missing: why samples are not shown; empty where nothing is missing.
    """

    path: Path
    size: int
    method: str
    relabels: int
    pictured: int
    missing: str


def write_report(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str | None = None,
    pictures: int = 1000,
    picture_size: int = 64,
    features: int = 12,
    dataset: str | None = None,
    data_dir: str | None = None,
    overwrite: bool = False,
) -> Written:
    """Write the report about a finished run: one HTML file that fetches nothing.

    Args:
        run_dir: folder of ``als-ext run --out``.
        out: file to write.
        method: which of the run's methods; None: the last one that changed a label.
        pictures: relabels to show with their sample and its neighbours, those with the least
            margin; >= 0.
        picture_size: longest side of a picture, pixels, >= 4; larger ones are made smaller.
        features: numbers shown of a sample that is no image, >= 1.
        dataset: where the data is now, as ``als-ext run --dataset``; None: where it was. Without
            it the report has no pictures, and says so.
        data_dir: as ``--data-dir``.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is false.
        FileNotFoundError: no folder of a finished run, or no folder for ``out``.
        ValueError: a number out of range, no such method, a damaged file.
    """
    check_int("pictures", pictures, low=0)
    check_int("picture_size", picture_size, low=4)
    check_int("features", features, low=1)
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"out: expected a new file, got {out}, which exists (see --force)")
    run = read_run(Path(run_dir), method)
    samples = run.samples
    changed = samples.relabelled
    near = _neighbours(samples, changed)
    order = np.arange(len(changed))
    if samples.margin is not None:
        order = np.argsort(samples.margin[changed], kind="stable")
    first = order[:pictures]
    missing, embedded = "", {"kind": "none"}
    if len(first):
        data = load_source(run, dataset, data_dir)
        if isinstance(data, str):
            missing, first = data, first[:0]
        else:
            shown = changed[first] if near is None else np.append(near[first], changed[first])
            embedded = picture_rows(data.x_train, np.unique(shown), picture_size, features)
    text = _render(run, changed, near, embedded, len(first), missing)
    atomic_write_text(out, text, overwrite=overwrite)
    return Written(out, out.stat().st_size, run.method, len(changed), len(first), missing)


def _neighbours(samples: RunSamples, changed: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """int64 [m, k], neighbours of the changed samples; None unless all of them have some."""
    if samples.neighbours is None or samples.suspect is None or not samples.suspect[changed].all():
        return None
    place = np.cumsum(samples.suspect) - 1
    near: NDArray[np.int64] = samples.neighbours[place[changed]].astype(np.int64)
    return near


def _render(
    run: RunFolder,
    changed: NDArray[np.int64],
    near: NDArray[np.int64] | None,
    embedded: dict[str, Any],
    pictured: int,
    missing: str,
) -> str:
    folder = files("als_ext.report")
    style = (folder / "report.css").read_text(encoding="utf-8")
    parts = [(folder / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((folder / "report.html").read_text(encoding="utf-8"))
    samples, names = run.samples, run.samples.class_names
    pairs = _pairs(samples)
    return template.render(
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        data=htmlsafe_json_dumps(_payload(run, changed, near, embedded), dumps=_compact),
        version=__version__,
        run=run,
        names=names,
        n=len(samples),
        relabels=len(changed),
        pictured=pictured,
        missing=missing,
        embedded=embedded,
        neighbours=near is not None,
        suspects=None if samples.suspect is None else int(samples.suspect.sum()),
        figures=_FIGURES,
        curves=_curves(run),
        histories=run.histories,
        histograms=_histograms(samples),
        matrix=_matrix(samples) if len(names) <= _MATRIX else None,
        pairs=pairs[:_PAIRS],
        left_out=max(0, len(pairs) - _PAIRS),
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _payload(
    run: RunFolder,
    changed: NDArray[np.int64],
    near: NDArray[np.int64] | None,
    embedded: dict[str, Any],
) -> dict[str, Any]:
    samples = run.samples
    columns = {"row": changed}
    columns |= {"old": samples.given[changed], "new": samples.label[changed]}
    for name in ("share", "margin", "loss", "log_pi", "true"):
        values = getattr(samples, name)
        if values is not None:
            columns[name] = values[changed]
    if not np.array_equal(samples.index, np.arange(len(samples))):
        columns["index"] = samples.index[changed]
    if near is not None:
        columns["near"] = near
        columns["near_old"] = samples.given[near]
        columns["near_new"] = samples.label[near]
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": run.method,
        "samples": len(samples),
        "digest": labels_digest(torch.from_numpy(samples.given)),
        "proposal": labels_digest(torch.from_numpy(samples.label)),
        "classes": samples.class_names,
        "count": len(changed),
        "near": 0 if near is None else near.shape[1],
        "columns": {name: pack(values) for name, values in columns.items()},
        "files": [samples.files[i] for i in changed] if samples.files else [],
        "pictures": embedded,
    }


def _curves(run: RunFolder) -> list[Markup]:
    charts = []
    for key, title in _CURVES.items():
        series = {
            name: [
                (at, value) for r in records if (at := r["epoch"]) and (value := r[key]) is not None
            ]
            for name, records in run.histories.items()
        }
        series = {name: points for name, points in series.items() if points}
        if series:
            charts.append(line_chart(title, series, "epoch"))
    return charts


def _histograms(samples: RunSamples) -> list[Markup]:
    moved = samples.given != samples.label
    charts = []
    for values, title, x_name in (
        (
            np.log10(samples.loss.clip(min=_LEAST)),
            "Loss of the samples",
            "log₁₀ of the loss in nats",
        ),
        (samples.log_pi, "Weight π of the samples", "log π, nats"),
        (samples.share, "Votes for the winner", "share of the votes"),
    ):
        if values is not None:
            groups = {"label kept": values[~moved], "relabelled": values[moved]}
            charts.append(histogram(title, groups, x_name))
    return charts


def _matrix(samples: RunSamples) -> list[list[int]]:
    """[C][C], relabels from the given class (row) to the new one (column)."""
    classes = len(samples.class_names)
    at = samples.relabelled
    cell = samples.given[at] * classes + samples.label[at]
    counts = np.bincount(cell, minlength=classes * classes).reshape(classes, classes)
    return [[int(count) for count in row] for row in counts]


def _pairs(samples: RunSamples) -> list[tuple[int, int, int]]:
    """(given class, new class, relabels), the most frequent first."""
    at = samples.relabelled
    both = np.stack([samples.given[at], samples.label[at]], axis=1)
    pairs, counts = np.unique(both, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]
