"""The GPU part of docs/performance.md: what was measured, targets, estimated limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import race, roofline
from bench.gpu_host import slug
from bench.markdown import markdown_table
from bench.report import gate_text, left_out, of, ours, raced, save, times, unique

NOTHING = "**Nothing has been measured on a GPU.** What follows is aims, and estimates by formula."
ESTIMATES = """\
Limits are **estimated**: the least bytes (each input read once, each result written once; a loss whose weights come after it reads the
logits once more) over the memory bandwidth, or the operations over the rate of their unit, whichever takes longer, with the peaks of
NVIDIA's data sheets (H100 SXM: 3.35 TB/s, H200: 4.8 TB/s, both 989 TFLOP/s in dense bfloat16 and 67 in float32). Nothing runs faster, and
a launch of some microseconds comes on top."""  # noqa: E501


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def part(results: dict[str, dict[str, Any]]) -> str:
    """Markdown of the part; ``results`` are those of GPUs, by file name."""
    parts = [measured(result) for result in results.values()] or [NOTHING]
    return "\n\n".join([*parts, "### Targets and estimated limits", aims(), ESTIMATES])


def aims() -> str:
    """Every race that has a target on a GPU, with its estimated limits; from the races alone."""
    lines = []
    for one in filter(lambda one: one.has_gpu_targets, race.all_races(quick=False)):
        wanted = [f"{name} ≥ {least:.2f}" for name, least in one.gpu_at_least.items()]
        wanted += [f"{name} ≤ {most:.2f}" for name, most in one.gpu_at_most.items()]
        cells = ["–"] * (2 + len(roofline.PUBLISHED))
        if one.counts is not None:
            counts = one.counts
            cells = [number(counts.bytes / 1e6), number(counts.flops / 1e9)]
            cells += [
                f"{number(1e6 * roofline.limit_s(counts, peaks))} ({roofline.bound(counts, peaks)})"
                for peaks in roofline.PUBLISHED.values()
            ]
        lines.append([one.name, "; ".join(wanted).replace("_", " "), *cells])
    head = ["race", "targets: theirs / ours, or a figure", "MB", "GFLOP"]
    head += [f"{name}, µs, estimated" for name in roofline.PUBLISHED]
    return markdown_table(head, lines)


def _aims_of(row: dict[str, Any]) -> str:
    """Targets beside what was reached."""
    cells = []
    for target in row["targets"]:
        aim = f"≥ {target['least']:.2f}" if "least" in target else f"≤ {target['most']:.2f}"
        got = f"{target['got']:.2f}" if target["met"] else f"**{target['got']:.2f}**"
        cells.append(f"{target['what'].replace('_', ' ')} {aim}: {got}")
    return "; ".join(cells) or "–"


def measured(result: dict[str, Any]) -> str:
    """Peaks, a table of each operation, and the plots of one run."""
    peaks, gpu = result["peaks"], result["machine"]["gpu"]
    parts = [
        f"### {gpu}",
        f"Peaks measured in this run: copy {peaks['bytes'] / 1e12:.2f} TB/s, products of large "
        f"square matrices {peaks['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16 and "
        f"{peaks['float32'] / 1e12:.1f} in float32;\nno work at all shows as "
        f"{1e6 * peaks['nothing_s']:.1f} µs. A share is the limit of these peaks over our time.",
    ]
    for op in unique(row["op"] for row in result["rows"]):
        lines = []
        for row in raced(result, op):
            found = roofline.reached(row, peaks)
            if found is None:
                share, rates = "–", ["–", "–"]
            else:
                share = f"{100 * found['share']:.0f} % ({found['bound']})"
                rates = [number(found[key] / 1e12) for key in ("bytes", "flops")]
            theirs = ", ".join(
                f"{c['name']} {times(c['ratio'])}" + (" (waits)" if c["waits"] else "")
                for c in of(row, "peer")
            )
            micro = number(1e6 * ours(row)["median_s"])
            aim = _aims_of(row)
            lines.append([row["case"], micro, share, *rates, theirs, aim, gate_text(row)])
        head = [op, "ours, µs", "share of the limit", "TB/s", "TFLOP/s", "theirs / ours"]
        parts.append(markdown_table([*head, "targets: reached", "error ≤ limit"], lines))
        parts += [f"* Not raced: {line}." for line in left_out(result, op)]
        if _counted(result, op):
            parts.append(f"![Roofline of {op}, {gpu}](img/{_file(result, op)})")
    return "\n\n".join(parts)


def _counted(result: dict[str, Any], op: str) -> list[dict[str, Any]]:
    return [row for row in raced(result, op) if row.get("counted") is not None]


def _file(result: dict[str, Any], op: str) -> str:
    return f"roofline-{slug(result['machine']['gpu'])}-{op}.svg"


def draw(plt: Any, result: dict[str, Any], folder: Path) -> None:
    """A plot of each operation."""
    for op in unique(row["op"] for row in result["rows"]):
        rows = _counted(result, op)
        if rows:
            save(roofline.draw(plt, op, rows, result), folder / _file(result, op), plt)
