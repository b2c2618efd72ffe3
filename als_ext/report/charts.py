"""Curves and histograms as SVG with text that is escaped; colours are those of the style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 200, 46, 8, 10, 30
_BINS = 40
_COLOURS = 6  # classes s0 ... of the style sheet

Points = Sequence[tuple[float, float]]


def line_chart(title: str, series: Mapping[str, Points], x_name: str) -> Markup:
    """One line a series.

    Args:
        title: what is measured.
        series: name -> points (x, y), ascending in x.
        x_name: what x is.
    """
    points = [point for line in series.values() for point in line]
    x_span = _span([x for x, _ in points])
    y_span = _span([y for _, y in points])
    marks = [
        Markup('<polyline class="s{}" points="{}"/>').format(
            at % _COLOURS,
            " ".join(f"{_x(x, x_span):.1f},{_y(y, y_span):.1f}" for x, y in line),
        )
        for at, line in enumerate(series.values())
    ]
    last = ", ".join(f"{name} {_number(line[-1][1])}" for name, line in series.items())
    return _chart(title, x_name, marks, list(series), x_span, y_span, f"At the end: {last}.")


def histogram(title: str, groups: Mapping[str, NDArray[np.floating]], x_name: str) -> Markup:
    """Shares of each group in equal bins, drawn over each other; values that are not finite and
    the outer 0.1 % of either side are put into the outermost bins.

    Args:
        title: what is counted.
        groups: name -> values.
        x_name: what the values are.
    """
    kept = {name: values[np.isfinite(values)] for name, values in groups.items()}
    kept = {name: values for name, values in kept.items() if len(values)}
    every = np.concatenate(list(kept.values())) if kept else np.zeros(1)
    low, high = (float(q) for q in np.quantile(every, (0.001, 0.999)))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    shares = {
        name: np.histogram(np.clip(values, low, high), edges)[0] / len(values)
        for name, values in kept.items()
    }
    x_span, y_span = (low, high), (0.0, max((float(s.max()) for s in shares.values()), default=1))
    marks = []
    for at, share in enumerate(shares.values()):
        steps = [(edges[i + side], share[i]) for i in range(_BINS) for side in (0, 1)]
        outline = [(low, 0.0), *steps, (high, 0.0)]
        where = " ".join(f"{_x(x, x_span):.1f},{_y(y, y_span):.1f}" for x, y in outline)
        marks.append(Markup('<polygon class="s{}" points="{}"/>').format(at % _COLOURS, where))
    medians = ", ".join(f"{name} {_number(float(np.median(v)))}" for name, v in kept.items())
    return _chart(title, x_name, marks, list(kept), x_span, y_span, f"Medians: {medians}.", "share")


def _number(value: float) -> str:
    """Four digits, or a count that people read, as in 11,902."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def _chart(
    title: str,
    x_name: str,
    marks: list[Markup],
    names: list[str],
    x_span: tuple[float, float],
    y_span: tuple[float, float],
    summary: str,
    y_name: str = "",
) -> Markup:
    grid = []
    for tick in _ticks(*y_span):
        y = _y(tick, y_span)
        line = '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        grid.append(Markup(line).format(_LEFT, _WIDTH - _RIGHT, y, y))
        text = '<text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
        grid.append(Markup(text).format(_LEFT - 5, y + 4, _number(tick)))
    for tick in _ticks(*x_span):
        text = '<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>'
        grid.append(Markup(text).format(_x(tick, x_span), _HEIGHT - _BOTTOM + 14, _number(tick)))
    axis = Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>')
    grid.append(axis.format((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 3, x_name))
    legend = Markup("").join(
        Markup('<li><span class="key s{}"></span>{}</li>').format(at % _COLOURS, name)
        for at, name in enumerate(names)
    )
    heading = f"{title} ({y_name})" if y_name else title
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        '<ul class="legend">{}</ul><p class="note">{}</p></figure>'
    ).format(
        heading,
        _WIDTH,
        _HEIGHT,
        f"{heading} by {x_name}. {summary}",
        Markup("").join([*grid, *marks]),
        legend,
        summary,
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _x(value: float, span: tuple[float, float]) -> float:
    return _LEFT + (value - span[0]) / (span[1] - span[0]) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, span: tuple[float, float]) -> float:
    share = (value - span[0]) / (span[1] - span[0])
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers inside the span, about four."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
