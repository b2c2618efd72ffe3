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
_CLEAN, _WRONG = "#0072B2", "#D55E00"
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
        lines = path.read_text(encoding="utf-8").splitlines()
        curve = [json.loads(line)["test_accuracy"] for line in lines]
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


def _wrong(samples: Samples) -> npt.NDArray[np.bool_]:
    """Samples with a wrong given label; none where the truth is unknown."""
    given = samples["given"]
    return np.asarray(given != samples.get("true", given))


def _histogram(axis: Any, samples: Samples) -> None:
    """log pi of the samples whose given label is right, and of the others, each adding up to 1."""
    ratio = samples["log_pi"] + np.log(len(samples["log_pi"]))
    bins = np.histogram_bin_edges(ratio, 60)
    wrong = _wrong(samples)
    parts = (("label right", ~wrong, _CLEAN), ("label wrong", wrong, _WRONG))
    for name, chosen, colour in parts:
        if chosen.any():
            weights = np.full(int(chosen.sum()), 1 / chosen.sum())
            axis.hist(ratio[chosen], bins, weights=weights, alpha=0.6, color=colour, label=name)
    axis.set(xlabel="log (n π), nats", ylabel="share")
    axis.legend()


def _map(axis: Any, samples: Samples, projection: str) -> None:
    """Points in the colour of their class; crosses are wrong labels, red ones in the end."""
    rows, points = samples["map_rows"], samples["map"]
    if projection == "tsne":
        points = _tsne(points)
    elif points.shape[1] == 1:  # an embedding of one number
        points = np.hstack([points, np.zeros_like(points)])
    truth = samples.get("true", samples["given"])
    wrong, left = _wrong(samples)[rows], (samples["labels"] != truth)[rows]
    size = {"s": 4, "linewidths": 0, "rasterized": True}  # 5,000 vector dots are a slow page
    axis.scatter(
        points[:, 0],
        points[:, 1],
        c=truth[rows],
        cmap="tab20",
        vmin=0,
        vmax=truth.max(),
        alpha=0.5,
        **size,
    )
    marks = (("corrected", wrong & ~left, "#777777"), ("wrong in the end", left, "#D00000"))
    for name, chosen, colour in marks:
        if chosen.any():
            axis.scatter(
                *points[chosen, :2].T,
                s=10,
                c=colour,
                marker="x",
                linewidths=0.6,
                rasterized=True,
                label=f"{name}: {int(chosen.sum())} of {len(rows)}",
            )
    axis.set(xticks=[], yticks=[], xlabel=f"embedding, {MAPS[projection]}")
    if wrong.any() or left.any():
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _tsne(points: npt.NDArray[Any]) -> npt.NDArray[Any]:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    placed = TSNE(init="random", perplexity=perplexity, random_state=0).fit_transform(points)
    return np.asarray(placed)
