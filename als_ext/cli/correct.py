"""``als-ext correct``: correct the labels of embeddings that exist, without any training."""

from __future__ import annotations

import json as json_module
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer

from als_ext.correction import CorrectionResult, correct_labels
from als_ext.data import read_labels
from als_ext.data.arrays import map_array
from als_ext.io import atomic_open
from als_ext.ops._checks import check_int

_SAVED = ("changed", "suspect", "winner", "share", "margin", "log_odds", "channel")


def correct(
    embeddings: Annotated[Path, typer.Option(help="npy file [n, D]; memory-mapped.")],
    labels: Annotated[Path, typer.Option(help="npy, npz, csv or json file with n labels.")],
    out: Annotated[Path, typer.Option(help="npz file to write.")],
    scores: Annotated[
        Path | None, typer.Option(help="npy file [n]: the higher, the more suspect (a loss).")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(show_default="largest label + 1")] = None,
    k: Annotated[str, typer.Option(help="Neighbours that vote, or auto (20).")] = "auto",
    metric: Annotated[str, typer.Option(help="cosine or l2.")] = "cosine",
    suspects: Annotated[
        str, typer.Option(help="auto, score, or the share of the highest scores.")
    ] = "auto",
    voters: Annotated[str, typer.Option(help="trusted (no suspects by score) or all.")] = "trusted",
    min_share: Annotated[float, typer.Option(help="Votes a relabel needs, in [0, 1].")] = 0.0,
    min_margin: Annotated[float, typer.Option(help="Lead a relabel needs, in [-1, 1].")] = -1.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, only.")] = False,
) -> None:
    """Give suspect samples the label of their neighbours; no model is needed."""
    if out.suffix != ".npz":
        raise ValueError(f"out: expected a name that ends in .npz, got {out}")
    if out.exists() and not force:
        raise FileExistsError(f"out: expected a new file, got {out}, which exists (see --force)")
    if not out.resolve().parent.is_dir():
        raise FileNotFoundError(f"out: expected an existing folder, got {out.parent}")
    if threads is not None:
        check_int("threads", threads, low=1)
        torch.set_num_threads(threads)
    points = _mapped("embeddings", embeddings)
    given = read_labels(labels, n=len(points), num_classes=num_classes).numpy()
    result = correct_labels(
        points,
        given,
        None if scores is None else np.array(_mapped("scores", scores)),
        num_classes=num_classes,
        k=k if k == "auto" else _number("k", k, int, "auto or a whole number"),
        metric=metric,
        suspects=suspects
        if suspects in {"auto", "score"}
        else _number("suspects", suspects, float, "auto, score or a share"),
        voters=voters,
        min_share=min_share,
        min_margin=min_margin,
    )
    with atomic_open(out, overwrite=force) as file:
        arrays = {name: getattr(result, name) for name in _SAVED}
        np.savez(file, labels=result.new_label, given_labels=result.old_label, **arrays)
    _print(result, out, json)


def _print(result: CorrectionResult[Any], out: Path, json: bool) -> None:
    summary = result.summary()
    if json:
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in summary.items()
        }
        print(json_module.dumps({**finite, "out": str(out)}, allow_nan=False))
        return
    print(
        f"{summary['samples']} samples, {summary['suspects']} suspects, "
        f"{summary['changed']} labels changed (k = {summary['k']}): {out}"
    )


def _number(name: str, text: str, kind: type[int] | type[float], expected: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}: expected {expected}, got {text!r}") from None


def _mapped(name: str, path: Path) -> npt.NDArray[Any]:
    """An npy file as a read-only memory map."""
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a file, got none at {path}")
    try:
        array = map_array(path)
    except ValueError as error:
        raise ValueError(f"{name}: expected a whole npy file, got {error}") from error
    if array.ndim == 0:
        raise ValueError(f"{name}: expected an npy file with one array, got {path}")
    return array
