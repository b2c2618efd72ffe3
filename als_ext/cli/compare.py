"""``als-ext compare``: methods on data sets, noises and seeds, tables and plots of them."""

from __future__ import annotations

import contextlib
import json as json_module
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from als_ext.cli import options
from als_ext.cli.cells import Job, drop_checkpoint, results_of
from als_ext.cli.display import Display
from als_ext.cli.grid import SETTINGS, grid_of
from als_ext.cli.training import DEFAULTS
from als_ext.compare.figures import aggregate
from als_ext.compare.grid import split_list
from als_ext.compare.grid_file import read_grid_file
from als_ext.compare.plots import MAPS, can_plot, draw
from als_ext.compare.store import (
    CELLS_FOLDER,
    Result,
    Store,
    cell_of,
    locked,
    read_grid,
    read_results,
)
from als_ext.compare.tables import csv_text, json_object, markdown
from als_ext.io import atomic_write_text
from als_ext.ops._checks import check_choice, check_float, check_int

_FAILURE = 1


def compare(
    out: Annotated[Path, typer.Option(help="Folder of the comparison; an old one goes on.")],
    grid: Annotated[
        Path | None, typer.Option(help="TOML file with these options; those given here win.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="As for run: repeat it or give a comma list.", show_default="digits"),
    ] = None,
    noise: Annotated[
        list[str] | None,
        typer.Option(
            help="As for run: repeat it or give a comma list.", show_default="symmetric:0.4"
        ),
    ] = None,
    method: options.Methods = None,
    seeds: Annotated[str | None, typer.Option(help="As in 0-2,7.", show_default="0")] = None,
    setting: options.Setting = None,
    data_dir: options.DataDir = None,
    clean_per_class: options.CleanPerClass = None,
    model: options.Model = None,
    embedding: options.Embedding = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    lr: options.LearningRate = None,
    warmup: options.Warmup = None,
    period: options.Period = None,
    device: options.Device = None,
    amp: options.AmpMode = None,
    augment: options.Augment = None,
    jobs: Annotated[int, typer.Option(help="Cells at a time, each in a process.")] = 1,
    threads: options.Threads = None,
    checkpoint_seconds: options.CheckpointSeconds = 60.0,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep those of finished cells.")
    ] = False,
    embedding_map: Annotated[
        str, typer.Option("--map", help="Embeddings in the plane by " + " or ".join(MAPS) + ".")
    ] = "pca",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing: tables and plots from the files.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Compare methods: data sets x noises x methods x seeds, with tables and plots."""
    check_choice("map", embedding_map, MAPS)
    given: dict[str, Any] = {
        "dataset": None if dataset is None else split_list(dataset),
        "noise": None if noise is None else split_list(noise),
        "method": None if method is None else split_list(method),
        "seeds": seeds,
        "data_dir": None if data_dir is None else str(data_dir),
        "clean_per_class": clean_per_class,
        "model": model,
        "embedding": embedding,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "warmup": warmup,
        "period": period,
        "device": device,
        "amp": amp,
        "augment": augment,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if report_only:
        if given or grid or setting:
            raise ValueError("report-only: expected no option about the grid beside it")
        results = list(read_results(out).values())
        if not results:
            raise FileNotFoundError(
                f"report-only: expected the results of cells, got none in {out}"
            )
        _report(out, results, embedding_map, json, quiet)
        return 0
    check_int("jobs", jobs, low=1)
    check_float("checkpoint-seconds", checkpoint_seconds, low=0.0, open_low=True)
    if threads is not None:
        check_int("threads", threads, low=1)
    from_file = {} if grid is None else read_grid_file(grid, SETTINGS)
    saved = read_grid(out)
    whole = grid_of({**from_file, **given}, setting or [], saved)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if read_grid(out) != saved:
            raise ValueError(f"out: expected {out} to stay as it was, got changes while starting")
        store = Store(out, whole)
        _train(store, out, jobs, threads, checkpoint_seconds, keep_checkpoints, quiet)
        results = store.ordered
        _report(out, results, embedding_map, json, quiet)
    failures = sum(result["status"] == "failed" for result in results)
    if failures:
        print(
            f"als-ext: {failures} of {len(results)} cells failed; to try them again: "
            f"als-ext compare --out {out}",
            file=sys.stderr,
        )
    return _FAILURE if failures else 0


def _train(
    store: Store,
    out: Path,
    processes: int,
    threads: int | None,
    checkpoint_seconds: float,
    keep_checkpoints: bool,
    quiet: bool,
) -> None:
    grid = store.grid
    before = torch.get_num_threads()
    usual = before if processes == 1 else max(1, _cores() // processes)
    todo = [
        Job(
            cell=cell,
            variant=grid.methods[cell.method],
            settings={
                **DEFAULTS,
                **grid.settings,
                "dataset": grid.datasets[cell.dataset],
                "noise": grid.noises[cell.noise],
                "seed": cell.seed,
            },
            folder=out / CELLS_FOLDER / cell.slug,
            threads=threads,
            usual_threads=usual,
            checkpoint_seconds=checkpoint_seconds,
        )
        for cell in store.pending
    ]
    display = Display(len(todo), quiet)
    results = results_of(todo, processes, display)
    try:
        with contextlib.closing(results), display:  # closing ends the processes
            for job, result in results:
                store.add(job.cell, result)
                if result["status"] == "done" and not keep_checkpoints:
                    drop_checkpoint(job.folder)
                _write_tables(out, store.ordered)
                display.finished(job.cell, result)
    except KeyboardInterrupt:
        print(f"als-ext: go on with: als-ext compare --out {out}", file=sys.stderr)
        raise
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    """Those that this process may use: a container or a batch system lends some of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _write_tables(out: Path, results: Sequence[Result]) -> None:
    atomic_write_text(out / "table.md", markdown(results), overwrite=True)
    atomic_write_text(out / "table.csv", csv_text(aggregate(results)), overwrite=True)


def _report(
    out: Path, results: Sequence[Result], embedding_map: str, json: bool, quiet: bool
) -> None:
    _write_tables(out, results)
    if can_plot():
        done = [result for result in results if result["status"] == "done"]
        draw(out, [cell_of(result) for result in done], embedding_map)
    elif not quiet:
        print("als-ext: no plots without matplotlib: pip install 'als_ext[plots]'", file=sys.stderr)
    if json:
        print(json_module.dumps(json_object(results), allow_nan=False))
    else:
        print(markdown(results))
