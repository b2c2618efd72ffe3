"""The GPU gate's page: which parts are done, who was skipped and why, all times. Raw, no prose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.markdown import markdown_table


def _spread(times: dict[str, Any]) -> str:
    """Median and percentiles in µs."""
    middle, low, high = (f"{1e6 * times[key]:.4g}" for key in ("median_s", "p20_s", "p80_s"))
    return f"{middle} ({low} – {high})"


def parts(state: dict[str, Any], names: list[str]) -> str:
    rows = []
    for name in names:
        part = state["parts"].get(name)
        if part is None:
            rows.append([name, "not run", "", ""])
            continue
        said = [part["why"]] if "why" in part else []
        said += [
            ", ".join(f"{key} {count}" for key, count in step["tests"].items())
            for step in part["steps"]
            if "tests" in step
        ]
        if any("only_shown" in step for step in part["steps"]):
            said.append("a command was only shown")
        rows.append([name, part["status"], f"{part['seconds']:.0f}", "; ".join(said)])
    return markdown_table(["part", "status", "s", ""], rows)


def skipped(results: dict[str, dict[str, Any]]) -> list[str]:
    """Every peer that did not race, once a reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results.values():
        for row in result["rows"]:
            for name, why in row.get("skipped", {}).items():
                found.setdefault((name, why), []).append(row["name"])
    lines = [f"* {name}: {why} ({len(rows)} races)" for (name, why), rows in found.items()]
    return lines or ["* nobody"]


def race(row: dict[str, Any]) -> list[str]:
    """All contenders of a race; ratio = theirs / ours, of device time and of wall time."""
    if "contenders" not in row:
        return [f"* {row['name']}: {row.get('skipped_row') or 'FAILED: ' + row['failed']}"]
    gate = row["gate"]
    state = "passed" if gate["passed"] else "FAILED"
    ours = row["contenders"][0]
    rows = []
    for one in row["contenders"]:
        wall = one.get("wall")
        rows.append(
            [
                one["name"],
                one["role"],
                _spread(one),
                f"{one['ratio']:.3f}",
                "–" if wall is None else _spread(wall),
                "–" if wall is None else f"{wall['median_s'] / ours['wall']['median_s']:.3f}",
                "–" if one["error"] is None else f"{one['error']:.1e}",
                str(one["rounds"]) + (" (waits)" if one.get("waits") else ""),
            ]
        )
    times = "events, µs (p20 – p80)" if "wall" in ours else "wall on a CPU, µs (p20 – p80)"
    head = ["who", "role", times, "ratio", "wall, µs (p20 – p80)", "ratio", "error", "rounds"]
    lines = [f"### {row['name']}", "", markdown_table(head, rows), ""]
    lines.append(f"Gate {state}: {gate['measure']}, {gate['error']:.1e} ≤ {gate['limit']:.1e}.")
    if any(one.get("waits") for one in row["contenders"]):
        lines.append("Waits: for the device inside a call, so its events hold gaps of the host.")
    for target in row["targets"]:
        aim = f"≥ {target['least']:.2f}" if "least" in target else f"≤ {target['most']:.2f}"
        met = "met" if target["met"] else "NOT MET"
        lines.append(f"Target {target['what']} {aim}: {target['got']:.3f}, {met}.")
    return lines


def page(state: dict[str, Any], names: list[str], stem: Path) -> str:
    """The whole page."""
    results = {}
    for path in stem.parent.glob(f"{stem.name}-bench.json"):
        results[path.name] = json.loads(path.read_text())
    where = ", ".join(f"{key} {value}" for key, value in state["where"].items())
    lines = [f"# GPU gate: {state['gpu']}", "", f"Code {state['code']}, {state['date']}; {where}."]
    if state["gpu"] == "dry run":
        lines += ["", "**A DRY RUN ON A CPU: nothing on this page was measured on a GPU.**"]
    lines += ["", "## Parts", "", parts(state, names)]
    if results:
        lines += ["", "## Peers that did not race", "", *skipped(results)]
    for name, result in results.items():
        peaks = ", ".join(f"{key} {value:.3g}" for key, value in result.get("peaks", {}).items())
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
        lines += ["", f"## {name}", "", f"{versions}. Peaks: {peaks}."]
        for row in result["rows"]:
            lines += ["", *race(row)]
    return "\n".join(lines) + "\n"
