"""Rooflines: what was reached on a GPU beside its two limits, and limits estimated without one.

A row of a race counts the least bytes and operations of its task by formula (:class:`race.Counts`).
Its limit is the longer of bytes over memory bandwidth and operations over the rate of the unit that
does them. Both peaks are measured in the run that is drawn. For estimates of GPUs that nobody has
run this on they are those of the manufacturer's data sheet, and are called so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.clock import CudaClock
from bench.race import WARM_UP, Counts, timed

# NVIDIA's data sheets, dense, bytes/s and operations/s: H100 SXM5, H200 SXM.
PUBLISHED = {
    "H100": {"bytes": 3.35e12, "bfloat16": 989.4e12, "float32": 66.9e12},
    "H200": {"bytes": 4.8e12, "bfloat16": 989.4e12, "float32": 66.9e12},
}
ROUNDS = 20


def measure(device: str = "cuda", moved: int = 1 << 30, size: int = 8192) -> dict[str, float]:
    """Peaks of the device: a copy, square products, and what the clock shows for no work at all.

    Args:
        moved: bytes that the copy reads, and writes.
        size: of the matrices.
    """
    place = torch.device(device)
    source, target = (torch.ones(moved // 4, device=place) for _ in range(2))
    bf16 = torch.randn(size, size, device=place).bfloat16()
    f32 = bf16.float()
    seconds = CudaClock().device_seconds if place.type == "cuda" else lambda f: timed(f, place)

    def median(call: Callable[[], Any]) -> float:
        for _ in range(WARM_UP):
            call()
        return statistics.median(seconds(call) for _ in range(ROUNDS))

    return {
        "bytes": 2 * moved / median(lambda: target.copy_(source)),
        "bfloat16": 2 * size**3 / median(lambda: bf16 @ bf16),
        "float32": 2 * size**3 / median(lambda: f32 @ f32),
        "nothing_s": median(lambda: None),
    }


def limit_s(counts: Counts, peaks: dict[str, float]) -> float:
    """The least seconds that a task can take."""
    return max(counts.bytes / peaks["bytes"], counts.flops / peaks[counts.unit])


def bound(counts: Counts, peaks: dict[str, float]) -> str:
    """Which of the two limits it is."""
    by_bytes = counts.bytes / peaks["bytes"] >= counts.flops / peaks[counts.unit]
    return "bytes" if by_bytes else counts.unit


def reached(row: dict[str, Any], peaks: dict[str, float]) -> dict[str, Any] | None:
    """What ours of a row reached; None where nothing was counted or raced."""
    if row.get("counted") is None or "contenders" not in row:
        return None
    counts = Counts(**row["counted"])
    seconds = next(c["median_s"] for c in row["contenders"] if c["role"] == "ours")
    return {
        "counts": counts,
        "seconds": seconds,
        "bytes": counts.bytes / seconds,
        "flops": counts.flops / seconds,
        "intensity": counts.flops / counts.bytes,
        "share": limit_s(counts, peaks) / seconds,
        "bound": bound(counts, peaks),
    }


def draw(plt: Any, op: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> Any:
    """Operations a second against operations a byte: both roofs, and a point a row."""
    peaks = result["peaks"]
    figure, axis = plt.subplots(figsize=(7, 4))
    found = [(row["case"], reached(row, peaks)) for row in rows]
    found = [(case, point) for case, point in found if point is not None]
    lowest = min(point["intensity"] for _, point in found) / 3
    highest = 3 * max(
        peaks["bfloat16"] / peaks["bytes"], *(point["intensity"] for _, point in found)
    )
    for unit, dash in (("bfloat16", "-"), ("float32", "--")):
        knee = peaks[unit] / peaks["bytes"]
        x = [min(lowest, knee), knee, max(highest, knee)]
        y = [min(peaks[unit], peaks["bytes"] * at) for at in x]
        label = f"memory {peaks['bytes'] / 1e12:.2f} TB/s, {unit} {peaks[unit] / 1e12:.0f} TFLOP/s"
        axis.loglog(x, y, dash, color="black", linewidth=0.8, label=label)
    for number, (case, point) in enumerate(found):
        marker = "osD^v<>PX*"[number % 10]
        label = f"{case}: {100 * point['share']:.0f} % of the limit"
        axis.plot(point["intensity"], point["flops"], marker, markersize=4, label=label)
    axis.set_xlabel("operations a byte, counted")
    axis.set_ylabel("operations a second")
    axis.set_title(f"{op}, {result['machine']['gpu']}; both limits measured in the same run")
    axis.grid(True, which="major", linewidth=0.3)
    axis.legend(frameon=False, fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
