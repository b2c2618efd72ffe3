"""Cost curves: time against one size, and the exponent fitted over a stated range."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.race import LEAST, USUAL, Unavailable, interleave, quantile, timed

POINT_S = 1.0  # aimed at for each point


@dataclass(frozen=True)
class Point:
    """A size and a call whose time belongs to it."""

    x: float
    call: Callable[[], Any]


@dataclass(frozen=True)
class Curve:
    """Time of several ways against one size.

    Args:
        op: the operation.
        x: the size, in words.
        series: name -> functions that make a :class:`Point`.
        fit_from: the exponent is fitted to the points from this size on.
        reference: the time at the largest size is compared with that at this size.
        at_most: targets for that comparison: series -> ratio.
    """

    op: str
    x: str
    series: dict[str, list[Callable[[], Point]]]
    fit_from: float
    reference: float | None = None
    at_most: dict[str, float] = field(default_factory=dict)

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
    """Time all points of all series, interleaved, and fit."""
    cpu = torch.device("cpu")
    row: dict[str, Any] = {"op": curve.op, "x": curve.x, "series": [], "skipped": {}}
    points: dict[tuple[str, float], Point] = {}
    for name, makers in curve.series.items():
        try:
            made = [make() for make in makers]
        except (Unavailable, ImportError) as reason:
            row["skipped"][name] = str(reason)
            continue
        points.update({(name, point.x): point for point in made})
    rounds = {}
    for key, point in points.items():
        timed(point.call, cpu)
        once = timed(point.call, cpu)
        rounds[key] = 2 if quick else min(USUAL, max(LEAST, int(POINT_S / once)))
    times = interleave({key: point.call for key, point in points.items()}, rounds, cpu)
    for name in curve.series:
        if name in row["skipped"]:
            continue
        own = [
            {
                "x": x,
                "median_s": statistics.median(taken),
                "p20_s": quantile(taken, 0.2),
                "p80_s": quantile(taken, 0.8),
                "seconds": [float(f"{t:.4g}") for t in taken],
            }
            for (series, x), taken in times.items()
            if series == name
        ]
        fitted = [point for point in own if point["x"] >= curve.fit_from]
        fit = None
        if len(fitted) > 1:
            fit = exponent([p["x"] for p in fitted], [p["median_s"] for p in fitted])
            fit["from"], fit["to"] = fitted[0]["x"], fitted[-1]["x"]
        compare = None
        for point in own:
            if point["x"] == curve.reference:
                ratio = own[-1]["median_s"] / point["median_s"]
                most = curve.at_most.get(name)
                compare = {"from": point["x"], "to": own[-1]["x"], "ratio": ratio, "most": most}
        row["series"].append({"name": name, "points": own, "fit": fit, "compare": compare})
    return row
