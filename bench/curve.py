"""Cost curves: time against one size, and the exponent fitted over a stated range."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.race import LEAST, USUAL, WARM_UP, Unavailable, interleave, quantile, timed

POINT_S = 1.0  # aimed at for each point


@dataclass(frozen=True)
class Curve:
    """Time of several ways against one size.

    Args:
        op: the operation.
        x: the size, in words.
        series: name -> size -> a function that makes the call to be timed.
        fit_from: the exponent is fitted to the points from this size on.
        reference: the time at the largest size is compared with that at this size.
        at_most: targets for that comparison: series -> ratio.
        alone: series that do not take turns with others, which would empty the caches for them.
    """

    op: str
    x: str
    series: dict[str, dict[float, Callable[[], Callable[[], Any]]]]
    fit_from: float
    reference: float | None = None
    at_most: dict[str, float] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.op}/{self.x}"


def exponent(x: list[float], y: list[float]) -> dict[str, float]:
    """Least squares of log y = exponent · log x + constant, with the fit's R²."""
    u, v = [math.log(a) for a in x], [math.log(a) for a in y]
    mean_u, mean_v = statistics.fmean(u), statistics.fmean(v)
    covariance = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    variance_u = sum((a - mean_u) ** 2 for a in u)
    variance_v = sum((b - mean_v) ** 2 for b in v)
    slope = covariance / variance_u
    r2 = 1.0 if variance_v == 0 else slope * covariance / variance_v
    return {"exponent": slope, "r2": r2}


def run_curve(curve: Curve, *, quick: bool = False) -> dict[str, Any]:
    """Time all points, those of one size interleaved, from the smallest on; and fit."""
    row: dict[str, Any] = {"op": curve.op, "x": curve.x, "series": [], "skipped": {}}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in curve.series}
    for x in sorted({x for makers in curve.series.values() for x in makers}):
        points = _points(curve, x, row["skipped"])
        together = {name: call for name, call in points.items() if name not in curve.alone}
        times = _at_one_size(together, quick)
        for name in points.keys() - together.keys():
            times |= _at_one_size({name: points[name]}, quick)
        for name, taken in times.items():
            found[name].append(
                {
                    "x": x,
                    "median_s": statistics.median(taken),
                    "p20_s": quantile(taken, 0.2),
                    "p80_s": quantile(taken, 0.8),
                    "seconds": [float(f"{t:.4g}") for t in taken],
                }
            )
    for name, own in found.items():
        if own:
            fit, compare = _fit(curve, own), _compare(curve, name, own)
            row["series"].append({"name": name, "points": own, "fit": fit, "compare": compare})
    return row


def _points(curve: Curve, x: float, skipped: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """The calls at a size; a series that does not exist here is named as skipped."""
    points = {}
    for name, makers in curve.series.items():
        if x in makers and name not in skipped:
            call, reason = _made(makers[x])
            if call is None:
                skipped[name] = reason
            else:
                points[name] = call
    return points


def _made(make: Callable[[], Callable[[], Any]]) -> tuple[Callable[[], Any] | None, str]:
    try:
        return make(), ""
    except (Unavailable, ImportError) as reason:
        return None, str(reason)


def _at_one_size(calls: dict[str, Callable[[], Any]], quick: bool) -> dict[str, list[float]]:
    """Interleaved times; short calls do not come after those of another size."""
    cpu = torch.device("cpu")
    rounds = {}
    for name, call in calls.items():
        for _ in range(WARM_UP - 1):
            once = timed(call, cpu)
            if once > POINT_S:
                break
        rounds[name] = 2 if quick else min(USUAL, max(LEAST, int(POINT_S / once)))
    return interleave(calls, rounds, cpu) if calls else {}


def _fit(curve: Curve, own: list[dict[str, Any]]) -> dict[str, float] | None:
    fitted = [point for point in own if point["x"] >= curve.fit_from]
    if len(fitted) < 2:
        return None
    fit = exponent([p["x"] for p in fitted], [p["median_s"] for p in fitted])
    return {**fit, "from": fitted[0]["x"], "to": fitted[-1]["x"]}


def _compare(curve: Curve, name: str, own: list[dict[str, Any]]) -> dict[str, Any] | None:
    first = next((point for point in own if point["x"] == curve.reference), None)
    if first is None:
        return None
    ratio = own[-1]["median_s"] / first["median_s"]
    most = curve.at_most.get(name)
    return {"from": first["x"], "to": own[-1]["x"], "ratio": ratio, "most": most}
