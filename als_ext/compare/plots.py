"""Plots of a comparison, SVG and PNG: accuracy over epochs, log pi, and maps of embeddings.

matplotlib is imported here alone, when a plot is made: it comes with the extra ``plots``.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from als_ext.compare.grid import Cell, slug
from als_ext.compare.samples import SAMPLES_FILE, load_samples
from als_ext.compare.store import CELLS_FOLDER, PLOTS_FOLDER
from als_ext.io import atomic_open
from als_ext.metrics import FILES

MAPS = {"pca": "principal components", "tsne": "t-SNE"}
# Okabe and Ito's colours, told apart by colour-blind readers; later methods get dashed lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")
_COLUMNS = 4  # of panels
_GROUPS = ("#0072B2", "#009E73", "#D55E00")
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "als_ext", "font.size": 9, "axes.grid": True}
_STYLE |= {"grid.linewidth": 0.3, "legend.frameon": False, "savefig.dpi": 150}
Samples = dict[str, npt.NDArray[Any]]


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(folder: Path, cells: Sequence[Cell], projection: str = "pca") -> list[Path]:
    """Draw all plots of the finished cells, from the files in their folders.

    Args:
        folder: that of the comparison; the plots go to ``plots`` in it.
        cells: the finished ones.
        projection: one of ``MAPS``.

    Returns:
        The files. What a cell's folder lacks is left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    methods = list(dict.fromkeys(cell.method for cell in cells))  # the same colour in every plot
    written: list[Path] = []
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        for dataset, noise in dict.fromkeys((cell.dataset, cell.noise) for cell in cells):
            group = [cell for cell in cells if (cell.dataset, cell.noise) == (dataset, noise)]
            samples = _first_seeds(folder, group)
            with_pi = {method: mine for method, mine in samples.items() if "log_pi" in mine}
            title = f"{dataset}, {noise}"
            figures = {
                "accuracy": _accuracy(folder, group, methods, title),
                "pi": _panels(with_pi, _histogram, title),
                "map": _panels(samples, partial(_map, projection=projection), title),
            }
            for kind, figure in figures.items():
                if figure is not None:
                    stem = f"{kind}_{slug(dataset, noise)}"
                    written += _save(figure, folder / PLOTS_FOLDER / stem)
    return written


def _save(figure: Any, stem: Path) -> list[Path]:
    stem.parent.mkdir(exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    for path in files:
        metadata = {"Date": None} if path.suffix == ".svg" else None  # the same bytes each time
        with atomic_open(path, overwrite=True) as file:
            figure.savefig(file, format=path.suffix[1:], metadata=metadata)
    return files


def _figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure without pyplot, so nothing global and no display, and its panels of that size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, _COLUMNS)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for surplus in axes[panels:]:
        figure.delaxes(surplus)
    return figure, axes[:panels]


# ---- accuracy over epochs ----------------------------------------------------------------------


def _accuracy(
    folder: Path, group: Sequence[Cell], methods: Sequence[str], title: str
) -> Any | None:
    """A line a method, the mean over seeds; the band is one standard deviation to each side."""
    figure, (axis,) = _figure(1, 5.0, 3.2)
    for method in methods:
        curves = list(_curves(folder, (cell for cell in group if cell.method == method)))
        if not curves:
            continue
        length = min(map(len, curves))  # the same for all seeds, unless files were mixed
        values = 100 * np.array([curve[:length] for curve in curves])
        number = methods.index(method)
        epochs, mean = np.arange(1, length + 1), values.mean(axis=0)
        (line,) = axis.plot(
            epochs,
            mean,
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=_LINES[number // len(_COLOURS) % len(_LINES)],
            linewidth=1.2,
            label=method,
            gid=f"line-{slug(method)}",
        )
        if len(curves) > 1:
            std = values.std(axis=0, ddof=1)
            low, high = mean - std, mean + std
            axis.fill_between(epochs, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    if not axis.lines:
        return None
    axis.set(title=title, xlabel="epoch", ylabel="test accuracy, %")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    return figure


def _curves(folder: Path, cells: Iterable[Cell]) -> Iterator[list[float]]:
    for cell in cells:
        path = folder / CELLS_FOLDER / cell.slug / FILES[0]
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            curve = [json.loads(line)["test_accuracy"] for line in lines]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"out: {path} is damaged ({type(error).__name__})") from error
        if None not in curve:
            yield curve


# ---- a panel a method --------------------------------------------------------------------------


def _first_seeds(folder: Path, group: Sequence[Cell]) -> dict[str, Samples]:
    """The samples of each method's first cell that has some."""
    found: dict[str, Samples] = {}
    for cell in group:
        if cell.method not in found:
            samples = load_samples(folder / CELLS_FOLDER / cell.slug / SAMPLES_FILE)
            if samples is not None:
                found[cell.method] = samples
    return found


def _panels(
    samples: dict[str, Samples], panel: Callable[[Any, Samples], None], title: str
) -> Any | None:
    if not samples:
        return None
    figure, axes = _figure(len(samples), 3.4, 3.2)
    for axis, (method, mine) in zip(axes, samples.items(), strict=True):
        panel(axis, mine)
        axis.set_title(method)
    figure.suptitle(title)
    return figure


def _groups(samples: Samples) -> dict[str, npt.NDArray[np.bool_]]:
    """Samples by what became of their label; all are right where the truth is unknown."""
    truth = samples.get("true", samples["given"])
    left = samples["labels"] != truth if "true" in samples else np.zeros(len(truth), dtype=bool)
    corrected = (samples["given"] != truth) & ~left
    return {
        "right": ~(left | corrected),
        "wrong, corrected": corrected,
        "wrong in the end": left,
    }


def _histogram(axis: Any, samples: Samples) -> None:
    """log pi by what became of the label, each group adding up to 1."""
    ratio = samples["log_pi"] + np.log(len(samples["log_pi"]))
    low, high = np.quantile(ratio, [0.001, 0.999])  # what is beyond goes to the outer bins
    bins = np.linspace(low, high, 61) if high > low else 1
    for (name, chosen), colour in zip(_groups(samples).items(), _GROUPS, strict=True):
        if chosen.any():
            weights = np.full(int(chosen.sum()), 1 / chosen.sum())
            values = ratio[chosen].clip(low, high)
            axis.hist(values, bins, weights=weights, alpha=0.6, color=colour, label=name)
    axis.set(xlabel="log (n π), nats", ylabel="share of the group")
    axis.xaxis.get_major_locator().set_params(nbins=5)
    axis.legend(title="label")


def _map(axis: Any, samples: Samples, projection: str) -> None:
    """Points in the colour of their true class; crosses are wrong labels, black in the end."""
    rows, points = samples["map_rows"], samples["map"]
    if projection == "tsne":
        points = _tsne(points)
    elif points.shape[1] == 1:  # an embedding of one number
        points = np.hstack([points, np.zeros_like(points)])
    truth = samples.get("true", samples["given"])
    cmap = "tab10" if truth.max() < 10 else "tab20"
    by_class = {"cmap": cmap, "vmin": 0, "vmax": max(9, truth.max()), "rasterized": True}
    looks: tuple[dict[str, Any], ...] = (  # thousands of dots as vectors would be a slow page
        {"s": 4, "linewidths": 0, "c": truth[rows], "alpha": 0.5, **by_class},
        {"s": 8, "linewidths": 0.5, "c": truth[rows], "marker": "x", **by_class},
        {"s": 12, "linewidths": 0.8, "color": "black", "marker": "x", "rasterized": True},
    )
    for (name, chosen), look in zip(_groups(samples).items(), looks, strict=True):
        mine = chosen[rows]
        if mine.any():
            own = look | ({"c": look["c"][mine]} if "c" in look else {})
            label = f"{name}: {int(mine.sum())} of {len(rows)}"
            axis.scatter(*points[mine, :2].T, label=label, **own)
    axis.set(xticks=[], yticks=[], xlabel=f"embedding, {MAPS[projection]}")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), title="label")


def _tsne(points: npt.NDArray[Any]) -> npt.NDArray[Any]:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    placed = TSNE(init="random", perplexity=perplexity, random_state=0).fit_transform(points)
    return np.asarray(placed)
