"""Results as a console table, as Markdown, as plots, and as the marked parts of a page."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import machine
from bench.markdown import markdown_table

MARK = re.compile(r"(<!-- bench: (?P<name>[\w ]+) -->\n).*?(<!-- bench: end -->)", re.S)
SOURCE = re.compile(r"\[(bench/results/[\w.-]+\.json)\]")


def times(ratio: float) -> str:
    """A ratio in three digits; bold below 1, where ours is slower."""
    digits = 2 if ratio < 10 else 1 if ratio < 100 else 0
    text = f"{ratio:.{digits}f}"
    return f"**{text}**" if ratio < 1 else text


def raced(result: dict[str, Any], op: str | None = None) -> list[dict[str, Any]]:
    """Rows that were measured, of one operation or of all."""
    rows = [row for row in result["rows"] if "contenders" in row]
    return rows if op is None else [row for row in rows if row["op"] == op]


def of_gpu(result: dict[str, Any]) -> bool:
    """Whether it was measured on a GPU."""
    return result["settings"].get("device") == "cuda"


def of(row: dict[str, Any], *roles: str) -> list[dict[str, Any]]:
    return [c for c in row["contenders"] if c["role"] in roles]


def ours(row: dict[str, Any]) -> dict[str, Any]:
    return of(row, "ours")[0]


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _rounds(row: dict[str, Any]) -> str:
    counts = sorted({c["rounds"] for c in row["contenders"]})
    return "–".join(map(str, counts[:: max(1, len(counts) - 1)]))


def gate_text(row: dict[str, Any]) -> str:
    gate = row["gate"]
    return (
        f"{gate['error']:.1e} ≤ {gate['limit']:.1e}"
        if gate["passed"]
        else (f"**FAILED: {gate['error']:.1e} > {gate['limit']:.1e}**")
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def left_out(result: dict[str, Any], op: str) -> list[str]:
    """Peers and rows that were not raced, and why: one line a reason."""
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["op"] != op:
            continue
        if "skipped_row" in row or "failed" in row:
            why = row.get("skipped_row") or f"FAILED: {row['failed']}"
            reasons.setdefault(why, []).append(row["case"] if "case" in row else row["name"])
        for name, why in row.get("skipped", {}).items():
            reasons.setdefault(why, []).append(name)
    return [f"{', '.join(unique(names))}: {why}" for why, names in reasons.items()]


# ---- console -----------------------------------------------------------------------------------


def console(result: dict[str, Any]) -> Table:
    """One table of everything."""
    where = result["machine"]
    table = Table(
        title=f"{where.get('gpu', where['cpu'])}, {where['threads']} threads, "
        f"torch {result['versions']['torch']}. Ratio = theirs / ours: above 1 ours is faster",
    )
    for name in ("race", "ours, ms (p20 – p80)", "peers", "ceilings", "gate", "rounds"):
        table.add_column(name, overflow="fold")
    last = None
    for row in result["rows"]:
        if last is not None and row["op"] != last:
            table.add_section()
        last = row["op"]
        if "contenders" not in row:
            why = row.get("skipped_row") or f"FAILED: {row['failed']}"
            table.add_row(row["name"], "", f"skipped: {why}")
            continue
        mine = ours(row)
        ms = [1e3 * mine[key] for key in ("median_s", "p20_s", "p80_s")]
        peers = [f"{c['name']} ×{c['ratio']:.2f}" for c in of(row, "peer")]
        peers += [f"ours, {c['name']} ×{c['ratio']:.2f}" for c in of(row, "variant")]
        peers += [f"{name}: skipped" for name in row["skipped"]]
        ceilings = [f"{c['name']} {100 * c['ratio']:.0f} %" for c in of(row, "ceiling")]
        ceilings += [f"{k} {_number(v)}" for k, v in (row["derived"] or {}).items()]
        table.add_row(
            row["name"],
            f"{ms[0]:.4g} ({ms[1]:.4g} – {ms[2]:.4g})",
            "\n".join(peers),
            "\n".join(ceilings),
            gate_text(row).replace("**", ""),
            _rounds(row),
        )
    return table


# ---- Markdown ----------------------------------------------------------------------------------


def operation(result: dict[str, Any], op: str) -> str:
    """The table of one operation: ratios, share of the ceilings, spread, gate, rounds."""
    rows = raced(result, op)
    roles = {"peer": "{}", "variant": "ours: {}", "ceiling": "of {}"}
    columns = {
        (role, name): title.format(name)
        for role, title in roles.items()
        for name in unique(c["name"] for row in rows for c in of(row, role))
    }
    derived = unique(key for row in rows for key in row["derived"] or {})
    head = [op, *columns.values(), *(key.replace("_", " ") for key in derived)]
    lines = []
    for row in rows:
        found = {(c["role"], c["name"]): c["ratio"] for c in row["contenders"]}
        cells = []
        for role, name in columns:
            ratio = found.get((role, name))
            if ratio is None:
                cells.append("–")
            else:
                cells.append(f"{100 * ratio:.0f} %" if role == "ceiling" else times(ratio))
        cells += [_number((row["derived"] or {}).get(key)) for key in derived]
        mine = ours(row)
        spread = 100 * (mine["p80_s"] - mine["p20_s"]) / mine["median_s"]
        lines.append([row["case"], *cells, f"{spread:.0f} %", gate_text(row), _rounds(row)])
    parts = [markdown_table([*head, "spread", "error ≤ limit", "rounds"], lines)] if rows else []
    measures = unique(row["gate"]["measure"] for row in rows)
    notes = [f"Error: {'; '.join(measures)}."] if rows else []
    notes += [f"Not raced: {line}." for line in left_out(result, op)]
    notes += [f"{note[0].upper()}{note[1:]}." for note in unique(r["note"] for r in rows) if note]
    return "\n\n".join([*parts, "\n".join(f"* {note}" for note in notes)])


def losses(result: dict[str, Any]) -> str:
    """Every row where a peer is faster."""
    found = [
        f"* {row['name']}: {c['name']} takes {c['ratio']:.2f} of our time"
        for row in raced(result)
        for c in of(row, "peer")
        if c["ratio"] < 1
    ]
    count = sum(len(of(row, "peer")) for row in raced(result))
    if not found:
        return f"In none of the {count} comparisons with a peer."
    return "\n".join([f"In {len(found)} of the {count} comparisons with a peer:", "", *found])


def targets(results: Iterable[dict[str, Any]]) -> str:
    """Every target beside what was reached."""
    lines = []
    for result in results:
        for row in result["rows"]:
            for target in row.get("targets", []):
                least = "least" in target
                aim = f"≥ {target['least']:.2f}" if least else f"≤ {target['most']:.2f}"
                lines.append((row["name"], target["what"], aim, target["got"], target["met"]))
            for series in row.get("series", []):
                found = series["compare"]
                if found is not None and found["most"] is not None:
                    what = f"{series['name']}, {found['to']:g} against {found['from']:g}"
                    met = found["ratio"] <= found["most"]
                    lines.append((row["name"], what, f"≤ {found['most']:.2f}", found["ratio"], met))
    cells = []
    for name, what, aim, got, met in lines:
        shown = (f"{got:.2f}", "yes") if met else (f"**{got:.2f}**", "**no**")
        cells.append([name, what.replace("_", " "), aim, *shown])
    count = sum(line[-1] for line in lines)
    table = markdown_table(["race", "against", "target", "reached", "met"], cells)
    return f"{count} of {len(lines)} targets are met.\n\n{table}"


def summary(result: dict[str, Any]) -> str:
    """Smallest, median and largest ratio of each operation to each peer."""
    lines = []
    for op in unique(row["op"] for row in raced(result)):
        peers = [c for row in raced(result, op) for c in of(row, "peer")]
        for name in unique(c["name"] for c in peers):
            ratios = [c["ratio"] for c in peers if c["name"] == name]
            cells = map(times, (min(ratios), statistics.median(ratios), max(ratios)))
            lines.append([op, name, str(len(ratios)), *cells])
    return markdown_table(["operation", "peer", "rows", "smallest", "median", "largest"], lines)


def fits(result: dict[str, Any]) -> str:
    """The fitted exponents."""
    rows = []
    for row in result["rows"]:
        for series in row.get("series", []):
            fit, compare = series["fit"], series.get("compare")
            if fit is None:
                continue
            rows.append(
                [
                    row["op"],
                    row["x"],
                    series["name"],
                    f"{fit['exponent']:.2f}",
                    f"{fit['from']:g} … {fit['to']:g}",
                    f"{fit['r2']:.3f}",
                    "–" if compare is None else f"{compare['ratio']:.2f}",
                ]
            )
    head = ["operation", "against", "who", "exponent", "fitted over", "R²", "largest / reference"]
    parts = [markdown_table(head, rows)]
    for row in result["rows"]:
        if "failed" in row:
            parts.append(f"* {row['name']}: FAILED: {row['failed']}")
        parts += [f"* {row['name']}: {n}: {why}" for n, why in row.get("skipped", {}).items()]
    compared = {
        s["compare"]["from"]
        for r in result["rows"]
        for s in r.get("series", [])
        if s.get("compare")
    }
    if compared:
        where = ", ".join(f"{x:g}" for x in sorted(compared))
        parts.append(f"Largest / reference: the time at the largest size over that at {where}.")
    return "\n\n".join(parts)


def origin(results: dict[str, dict[str, Any]]) -> str:
    """Where the figures come from; ``results`` by file name."""
    lines = []
    for name, result in results.items():
        where, versions = result["machine"], result["versions"]
        caches = ", ".join(f"{level} {size}" for level, size in where["caches"].items())
        commit = result["commit"]
        changed = " with uncommitted changes" if commit["dirty"] else ""
        known = ", ".join(f"{k} {v}" for k, v in versions.items() if v)
        whole = "" if result["complete"] else " (INCOMPLETE)"
        quick = (
            " (QUICK RUN: sizes too small to mean anything)" if result["settings"]["quick"] else ""
        )
        code = f"{(commit['hash'] or 'unknown')[:8]}{changed}"
        if commit["hash"] is None or commit["dirty"]:  # then the files tell which code it was
            code += f" (files {commit['files']})"
        gpu = f"{where['gpu']}; " if of_gpu(result) else ""
        lines.append(
            f"* [{name}](../{name}){whole}{quick}: {result['date'][:10]}, commit {code}; {gpu}"
            f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads ({caches}), "
            f"{where['memory_gib']} GiB, huge pages {where['transparent_huge_pages']}; {known}"
        )
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """Everything of one result."""
    if result["kind"] == "curves":
        return fits(result)
    ops = unique(row["op"] for row in result["rows"])
    parts = [f"## {op}\n\n{operation(result, op)}" for op in ops]
    parts.append(f"## Targets\n\n{targets([result])}")
    return "\n\n".join([*parts, f"## Where a peer is faster\n\n{losses(result)}"])


# ---- the page ----------------------------------------------------------------------------------


def render(text: str, results: dict[str, dict[str, Any]]) -> str:
    """The page with its marked parts made from results (by file name); one of a kind."""
    from bench import gpu_page  # which imports this file

    gpu = {name: result for name, result in results.items() if of_gpu(result)}
    kinds = {result["kind"]: result for name, result in results.items() if name not in gpu}
    if len(kinds) + len(gpu) != len(results):
        raise ValueError("files: expected at most one result of each kind")

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        if name == "origin":
            body = origin(results)
        elif name == "targets":
            body = targets(kinds.values())
        elif name == "GPU":
            body = gpu_page.part(gpu)
        elif name in {"curves", "curve plots"}:
            if "curves" not in kinds:
                return match[0]
            body = fits(kinds["curves"]) if name == "curves" else _images(kinds["curves"])
        elif "table" not in kinds:
            return match[0]
        elif name in {"losses", "summary"}:
            body = {"losses": losses, "summary": summary}[name](kinds["table"])
        else:
            body = operation(kinds["table"], name)
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return MARK.sub(part, text)


def sources(text: str) -> list[str]:
    """The result files that a page names, relative to the checkout."""
    return unique(SOURCE.findall(text))


def update_page(page: Path, results: dict[Path, dict[str, Any]]) -> None:
    """Make the marked parts and the plots anew; results must lie in bench/results."""
    named = {}
    for path, result in results.items():
        path = path.resolve()
        if not path.is_relative_to(machine.ROOT):
            raise ValueError(f"{path.name}: a page shows results that lie in the checkout")
        named[path.relative_to(machine.ROOT).as_posix()] = result
    page.write_text(render(page.read_text(), named))
    for result in results.values():
        draw(result, page.parent / "img")


# ---- plots -------------------------------------------------------------------------------------


def _images(result: dict[str, Any]) -> str:
    names = [f"![{row['x']}](img/{_file(row)})" for row in result["rows"] if row.get("series")]
    return "\n".join(names)


def _file(row: dict[str, Any]) -> str:
    return "cost-" + re.sub(r"\W+", "-", f"{row['op']} {row['x'].split(' (')[0]}").lower() + ".svg"


def draw(result: dict[str, Any], folder: Path) -> None:
    """The plots of a result as small SVG files, the same bytes each time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    style = {"svg.fonttype": "none", "svg.hashsalt": "als_ext", "font.size": 9}
    from bench import gpu_page

    with plt.rc_context(style):
        if of_gpu(result):
            gpu_page.draw(plt, result, folder)
            return
        if result["kind"] == "table":
            save(_ratios(plt, result), folder / "ratios.svg", plt)
            return
        for row in result["rows"]:
            if row.get("series"):
                save(_curve(plt, row), folder / _file(row), plt)


def save(figure: Any, path: Path, plt: Any) -> None:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def _curve(plt: Any, row: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for series in row["series"]:
        x = [point["x"] for point in series["points"]]
        y = [1e3 * point["median_s"] for point in series["points"]]
        fit = series["fit"]
        label = series["name"] + ("" if fit is None else f": exponent {fit['exponent']:.2f}")
        (line,) = axis.loglog(x, y, marker="o", markersize=3, linewidth=1, label=label)
        low, high = ([1e3 * p[key] for p in series["points"]] for key in ("p20_s", "p80_s"))
        axis.fill_between(x, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axis.set_xlabel(row["x"])
    axis.set_ylabel("ms, median (band: p20 to p80)")
    axis.set_title(row["op"])
    axis.grid(True, which="major", linewidth=0.3)
    axis.legend(frameon=False)
    return figure


def _ratios(plt: Any, result: dict[str, Any]) -> Any:
    ops = unique(row["op"] for row in raced(result))
    peers = unique(c["name"] for row in raced(result) for c in of(row, "peer"))
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.55 * len(ops)))
    for number, peer in enumerate(peers):
        found = [
            (c["ratio"], ops.index(row["op"]) + 0.6 * (number / max(1, len(peers) - 1) - 0.5))
            for row in raced(result)
            for c in of(row, "peer")
            if c["name"] == peer
        ]
        x, y = zip(*found, strict=True)
        marker = "osD^v<>PX*"[number % 10]
        axis.scatter(x, y, s=14, label=peer, marker=marker)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(ops)), ops)
    axis.invert_yaxis()
    axis.set_xlabel("time of the peer / ours (right of 1: ours is faster)")
    axis.grid(True, axis="x", linewidth=0.3)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
