"""Tables of results.md, correction.md, scale.md and README.md, from bench/results/*-NAME*.

    python bench/results_page.py

Each part of the page between ``<!-- results: DATASET TABLE -->`` and ``<!-- results: end -->`` is
made again; tests/test_results_page.py compares the page with the cells.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import scale_model  # noqa: E402
from bench.markdown import markdown_table  # noqa: E402

DOCS = ROOT / "docs"
PAGES = (DOCS / "results.md", DOCS / "correction.md", DOCS / "scale.md", ROOT / "README.md")
CELLS = ROOT / "bench" / "results"
OURS = "als-lc"
_PART = re.compile(r"(<!-- results: ([\w-]+) (\w+) -->\n).*?(<!-- results: end -->)", re.DOTALL)
Cell = dict[str, Any]


def read_cells(dataset: str) -> dict[tuple[str, str], list[Cell]]:
    """Finished cells by noise and method, in the order of the file."""
    lines = (CELLS / f"compare-{dataset}" / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in map(json.loads, lines):
        if cell["status"] == "done":
            groups[cell["noise"], cell["method"]].append(cell)
    return groups


def _noises(groups: dict[tuple[str, str], list[Cell]]) -> list[str]:
    """By kind, then by rate; label files by name."""
    order = ["none", "symmetric", "pair", "asymmetric", "instance", "hard", "file"]
    return sorted({noise for noise, _ in groups}, key=lambda n: (order.index(n.split(":")[0]), n))


def _percent(cells: list[Cell], figure: str) -> str:
    """The mean over the seeds, and their standard deviation if there are several."""
    values = [100 * cell[figure] for cell in cells if cell.get(figure) is not None]
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _name(noise: str) -> str:
    kind, _, rate = noise.partition(":")
    if kind == "file":
        return Path(rate).stem
    return kind if not rate else f"{kind} {float(rate):.0%}".replace("%", " %")


def accuracy_table(dataset: str) -> str:
    """Test accuracy after the last epoch: a row a method, a column a noise."""
    groups = read_cells(dataset)
    noises = _noises(groups)
    methods = list(dict.fromkeys(method for _, method in groups))
    methods.sort(key=lambda method: (method != OURS, method))
    rows = [
        [method, *(_percent(groups.get((noise, method), []), "test_accuracy") for noise in noises)]
        for method in methods
    ]
    return markdown_table(["test accuracy, %", *map(_name, noises)], rows)


def published_table(name: str) -> str:
    """Our method and others' published figures on the same label files: a row a label file."""
    groups = read_cells(name)
    published = json.loads((CELLS / f"published-{name}.json").read_text(encoding="utf-8"))
    rows = [
        [
            _name(noise),
            _percent(groups.get((noise, OURS), []), "test_accuracy"),
            *(f"{line[at]:.2f}" for line in published["last"].values()),
        ]
        for at, noise in enumerate(published["noises"])
    ]
    return markdown_table(["label file", OURS, *published["last"]], rows)


def labels_table(dataset: str) -> str:
    """What our method made of the labels: a row a noise."""
    groups = read_cells(dataset)
    head = ["noise", "right before", "right after", "relabels that are right (precision)"]
    head += ["wrong labels put right (recall)", "good labels doubted", "seconds", "seeds"]
    rows = []
    for noise in _noises(groups):
        cells = groups.get((noise, OURS), [])
        if not cells:
            continue
        for cell in cells:
            doubted = cell["detected"] * (1 - (cell["detection_precision"] or 0.0))
            cell["doubted"] = doubted / (cell["samples"] * cell["label_accuracy_before"])
        figures = ("label_accuracy_before", "label_accuracy_after", "relabel_precision")
        figures = (*figures, "relabel_recall", "doubted")
        seconds = f"{statistics.fmean(cell['seconds'] for cell in cells):.0f}"
        rows.append(
            [_name(noise), *(_percent(cells, name) for name in figures), seconds, str(len(cells))]
        )
    return markdown_table(head, rows)


def right_table(name: str) -> str:
    """Right labels after the best plain vote and after ours: a row a set, a column a noise."""
    lines = (CELLS / f"correction-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    right: dict[str, dict[str, dict[str, float]]] = {}
    for line in map(json.loads, lines):
        noises = right.setdefault(f"{line['set']}, n = {line['samples']}", {})
        noises.setdefault(line["noise"], {})[line["method"]] = line["label_accuracy_after"]
    noises = list(next(iter(right.values())))

    def cell(found: dict[str, float]) -> str:
        best = max(value for method, value in found.items() if method != "correct_labels")
        return f"{best:.3f} / {found['correct_labels']:.3f}"

    rows = [[name, *(cell(found[noise]) for noise in noises)] for name, found in right.items()]
    return markdown_table(["set", *map(_name, noises)], rows)


def vote_table(name: str) -> str:
    """One correction beside the best plain vote: a row a noise."""
    lines = (CELLS / f"correction-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    head = ["labels", "right before", "survival rate found", "k of the plain vote"]
    for figure in ("right after", "precision of relabels", "good labels changed"):
        head += [f"{figure}, plain vote", "`correct_labels`"]
    rows = []
    for line in map(json.loads, lines):
        row = [_name(line["noise"]), f"{line['label_accuracy_before']:.3f}"]
        row += [f"{line['survival']:.3f}", str(line["plain_vote"]["k"])]
        for figure, form in (
            ("label_accuracy_after", ".3f"),
            ("relabel_precision", ".3f"),
            ("good_labels_changed", ".2%"),
        ):
            row += [format(line[who][figure], form) for who in ("plain_vote", "correct_labels")]
        rows.append(row)
    return markdown_table(head, rows)


def scale_table(name: str) -> str:
    """Bytes and CPU time of several processes beside the model's: a row a point."""
    lines = (CELLS / f"scale-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    points = [json.loads(line) for line in lines]
    alone = {(p["what"], p["point"]): p["cpu_seconds"] for p in points if p["processes"] == 1}
    head = [
        "work",
        "processes",
        "MB moved, model",
        "measured",
        "CPU s a process, model",
        "measured",
    ]
    rows = []
    for point in points:
        key, size = (point["what"], point["point"]), point["processes"]
        shared = "step" not in point["what"]  # every process makes the same step of pi
        row = [", ".join(key), str(size)]
        row += [f"{point[name] / 1e6:.4g}" for name in ("model_bytes", "bytes")]
        row += [f"{alone[key] / (size if shared else 1):.3g}", f"{point['cpu_seconds']:.3g}"]
        rows.append(row)
    return markdown_table(head, rows)


def plan_table(name: str) -> str:
    """What the model says of large sets: a row a number of rows and of processes."""
    products, link = scale_model.RATES_OF[name]
    head = ["n", "processes", "kNN: multiply-adds", "s", "GB received", "s", "GB held"]
    head += ["rest of a correction: GB received, at most", "s", "GB held", "GB of π"]
    rows = []
    for n, size in scale_model.PLANS:
        graph = scale_model.knn(n, 128, scale_model.NEIGHBOURS, size)
        rest = scale_model.correction(n, 10, size)
        row = [f"10^{math.log10(n):.0f}", f"{size:,}", f"{graph.products:.2g}"]
        row += [_short(graph.products / products), _short(graph.received / 1e9)]
        row += [_short(graph.received / link), _short(graph.held / 1e9)]
        row += [_short(rest.received / 1e9), _short(rest.received / link)]
        row += [_short(rest.held / 1e9), _short(scale_model.also_step(n, 1, size).held / 1e9)]
        rows.append(row)
    return markdown_table(head, rows)


def _short(value: float) -> str:
    """Two digits that say something."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


TABLES = {
    "plan": plan_table,
    "scale": scale_table,
    "accuracy": accuracy_table,
    "labels": labels_table,
    "published": published_table,
    "right": right_table,
    "vote": vote_table,
}


def with_tables(page: str) -> str:
    """The page with its tables made again."""
    return _PART.sub(lambda part: f"{part[1]}\n{TABLES[part[3]](part[2])}\n\n{part[4]}", page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
