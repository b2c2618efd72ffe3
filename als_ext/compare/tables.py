"""Tables of a comparison: Markdown to read, CSV and JSON to compute with."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from als_ext.compare.figures import LAST, Average, Row, aggregate
from als_ext.compare.store import Result

_PIVOTS = {
    "test_accuracy": "Test accuracy after the last epoch, %",
    "test_accuracy_last10": f"Mean test accuracy of the last {LAST} epochs, %",
    "test_accuracy_best": "Test accuracy of the best epoch, %: an oracle, it is chosen by the "
    "test labels",
}
_LABELS = {  # figure -> heading
    "detection_precision": "detection precision",
    "detection_recall": "recall",
    "detection_f1": "F1",
    "label_accuracy_before": "labels right before",
    "label_accuracy_after": "after",
    "relabel_precision": "relabel precision",
    "relabel_recall": "recall",
    "epochs": "epochs",
    "seconds": "seconds",
}
_PLAIN = {"epochs": 0, "seconds": 1}  # digits of what is no share


def _cell(average: Average | None, seeds: int, digits: int | None = None) -> str:
    if average is None:
        return "–"
    scale, places = (100, 2) if digits is None else (1, digits)
    text = f"{scale * average.mean:.{places}f}"
    if average.std is not None:
        text += f" ± {scale * average.std:.{places}f}"
    return text if average.seeds == seeds else f"{text} ({average.seeds} of {seeds})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def markdown(results: Sequence[Result]) -> str:
    """The page ``table.md``."""
    rows = aggregate(results)
    seeds = len({result["seed"] for result in results})
    parts = ["# Comparison", _summary(results, seeds), *_told(results)]
    for dataset in _unique(row.dataset for row in rows):
        mine = [row for row in rows if row.dataset == dataset]
        parts.append(f"## {dataset}")
        for figure, title in _PIVOTS.items():
            if any(figure in row.figures for row in mine):
                parts += [f"{title}:", _pivot(mine, figure, seeds)]
        parts += ["Labels, in % (seconds and epochs are not):", _labels(mine, seeds)]
    if failures := [result for result in results if result["status"] == "failed"]:
        lines = (f"* {_name(result)}: {result['error']}" for result in failures)
        parts += ["## Failed cells", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _name(result: Result) -> str:
    return f"{result['dataset']} {result['noise']} {result['method']} seed {result['seed']}"


def _summary(results: Sequence[Result], seeds: int) -> str:
    done = [result for result in results if result["status"] == "done"]
    found = {key: [str(result[key]) for result in done] for key in ("model", "device")}
    for result in done:
        for name, version in result["versions"].items():
            found.setdefault(name, []).append(version)
    facts = [f"{len(done)} cells are done, {len(results) - len(done)} failed"]
    facts += [f"{name} {', '.join(_unique(values))}" for name, values in found.items() if values]
    return (
        f"{'; '.join(facts)}. Mean ± standard deviation (n − 1) over {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}; (1 of 3) marks a mean over fewer. – is undefined: "
        "nothing to count, the method says nothing, or the truth is unknown."
    )


def _told(results: Sequence[Result]) -> list[str]:
    """What some methods know about the labels and others do not; nothing where none does."""
    facts: dict[str, list[str]] = {}  # methods by what they were told
    for result in results:
        if result["status"] != "done":
            continue
        if result["clean_per_class"]:
            fact = f"the true labels of {result['clean_per_class']} samples a class"
            facts.setdefault(fact, []).append(result["method"])
        rate = result["settings"].get("noise_rate")
        if rate is not None:
            fact = "the noise rate" if isinstance(rate, str) else f"a noise rate of {rate}"
            facts.setdefault(fact, []).append(result["method"])
    lines = [f"* {', '.join(_unique(methods))}: {fact}" for fact, methods in facts.items()]
    return ["Methods that were told more than the others:", "\n".join(lines)] if lines else []


def _pivot(rows: Sequence[Row], figure: str, seeds: int) -> str:
    noises = _unique(row.noise for row in rows)
    found = {(row.method, row.noise): row.figures.get(figure) for row in rows}
    methods = _unique(row.method for row in rows)
    body = [[m, *(_cell(found.get((m, noise)), seeds) for noise in noises)] for m in methods]
    return _table(["method", *noises], body)


def _labels(rows: Sequence[Row], seeds: int) -> str:
    body = [
        [
            row.noise,
            row.method,
            *(_cell(row.figures.get(figure), seeds, _PLAIN.get(figure)) for figure in _LABELS),
        ]
        for noise in _unique(row.noise for row in rows)
        for row in rows
        if row.noise == noise
    ]
    return _table(["noise", "method", *_LABELS.values()], body)


def csv_text(rows: Iterable[Row]) -> str:
    """One line a figure: shares stay shares."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "noise", "method", "figure", "mean", "std", "seeds"])
    for row in rows:
        for name, value in row.figures.items():
            std = "" if value.std is None else value.std
            writer.writerow(
                [row.dataset, row.noise, row.method, name, value.mean, std, value.seeds]
            )
    return text.getvalue()


def json_object(results: Sequence[Result]) -> dict[str, Any]:
    """The aggregate as plain types."""
    failed = [result for result in results if result["status"] == "failed"]
    return {
        "done": len(results) - len(failed),
        "failed": [{"cell": _name(result), "error": result["error"]} for result in failed],
        "rows": [asdict(row) for row in aggregate(results)],
    }
