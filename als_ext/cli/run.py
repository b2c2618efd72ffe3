"""``als-ext run``: take or make wrong labels, train, correct, and say what came of it."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from als_ext import __version__
from als_ext.checkpoint import check_same_settings
from als_ext.cli import options
from als_ext.cli.inputs import RunData, clean_subset, load_run_data, method_settings
from als_ext.cli.training import (
    DEFAULTS,
    check_methods,
    describe,
    figures,
    fit,
    make_trainer,
    use_threads,
)
from als_ext.compare.grid import from_anywhere
from als_ext.data import write_labels
from als_ext.io import atomic_write_text, remove_left_overs
from als_ext.ops._checks import check_int
from als_ext.report.run_folder import RESULT_FILE, SAMPLES_FILE, SETTINGS_FILE
from als_ext.report.samples import RunSamples, write_samples
from als_ext.trainer import TrainResult

COLUMNS = {  # keys of the JSON object under a method's name -> headings of the table
    "test_accuracy": "test accuracy",
    "label_accuracy_before": "labels before",
    "label_accuracy_after": "labels after",
    "relabel_precision": "precision",
    "relabel_recall": "recall",
    "seconds": "seconds",
}


def run(
    dataset: Annotated[
        str | None,
        typer.Option(
            help="digits, mnist, fashion-mnist, npz:FILE or folder:DIR.", show_default="digits"
        ),
    ] = None,
    data_dir: options.DataDir = None,
    noise: Annotated[
        str | None,
        typer.Option(
            help="none, symmetric:R, pair:R, asymmetric:R, instance:R, hard:R or file:PATH.",
            show_default="symmetric:0.4; none for npz:, folder: and --labels",
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Labels to train on (json, csv, npy, npz), for --noise.")
    ] = None,
    decisions: Annotated[
        list[Path] | None,
        typer.Option(
            help="What was decided in the report about an earlier run, to keep it. Repeat it: one "
            "after the other."
        ),
    ] = None,
    method: options.Methods = None,
    setting: options.Setting = None,
    clean_per_class: options.CleanPerClass = None,
    model: options.Model = None,
    embedding: options.Embedding = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    lr: options.LearningRate = None,
    warmup: options.Warmup = None,
    period: options.Period = None,
    seed: Annotated[int | None, typer.Option(show_default="0")] = None,
    device: options.Device = None,
    amp: options.AmpMode = None,
    augment: options.Augment = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for metrics, checkpoints, labels. Without it no file."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    checkpoint_seconds: options.CheckpointSeconds = 60.0,
    checkpoint_steps: Annotated[
        int | None, typer.Option(help="Steps between them, beside the seconds.")
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train on wrong labels and correct them; without any option on bundled digits, in seconds."""
    names = None if method is None else [m.strip() for words in method for m in words.split(",")]
    given = {
        "dataset": None if dataset is None else from_anywhere(dataset),
        "data_dir": None if data_dir is None else str(data_dir.absolute()),
        "noise": None if noise is None else from_anywhere(noise),
        "labels": None if labels is None else str(labels.absolute()),
        "decisions": None if decisions is None else [str(path.absolute()) for path in decisions],
        "method": names,
        "setting": setting,
        "clean_per_class": clean_per_class,
        "model": model,
        "embedding": embedding,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "warmup": warmup,
        "period": period,
        "seed": seed,
        "device": device,
        "amp": amp,
        "augment": augment,
    }
    given = {name: value for name, value in given.items() if value is not None}
    settings = _settings(given, out, resume)
    check_int("seed", settings["seed"], low=0)
    check_int("clean-per-class", settings["clean_per_class"], low=0)
    check_methods(settings["method"], settings["clean_per_class"])
    if len(set(settings["method"])) < len(settings["method"]):
        raise ValueError(f"method: expected each once, got {', '.join(settings['method'])}")
    own = method_settings(settings["method"], settings["setting"])
    if threads is not None:
        check_int("threads", threads, low=1)
    data = load_run_data(settings)
    clean = clean_subset(data, settings["clean_per_class"], settings["seed"])
    trainers = {
        name: make_trainer(
            name,
            settings,
            own[name],
            data,
            out=None if out is None else out / name,
            progress=False if quiet else None,
            checkpoint_seconds=checkpoint_seconds,
            checkpoint_steps=checkpoint_steps,
        )
        for name in settings["method"]
    }
    use_threads(threads, trainers.values())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        remove_left_overs(out)
    if out is not None and not resume:
        _write_json(out / SETTINGS_FILE, {"version": __version__, "settings": settings})
    result = describe(settings, data, next(iter(trainers.values())))
    try:
        for name, trainer in trainers.items():
            done = fit(trainer, data, clean, resume=resume)
            result[name] = figures(done)
            if out is not None:
                _write_labels(out / name, done, data)
                write_samples(out / name / SAMPLES_FILE, _samples(done, data))
    except KeyboardInterrupt:
        if out is not None:
            print(f"als-ext: go on with: als-ext run --out {out} --resume", file=sys.stderr)
        raise
    if out is not None:
        _write_json(out / RESULT_FILE, result)
    if json:
        print(json_module.dumps(result, allow_nan=False))
    else:
        _print_table(result, list(trainers))


def _settings(given: dict[str, Any], out: Path | None, resume: bool) -> dict[str, Any]:
    """Given settings over defaults, or those of the run to resume."""
    if not resume:
        if out is not None and out.exists() and (not out.is_dir() or any(_strange(out))):
            raise FileExistsError(
                f"out: expected a new or an empty folder, got {out}; --resume goes on with the "
                "run in it"
            )
        return {**DEFAULTS, **given}
    if out is None:
        raise ValueError("resume: expected --out with the folder of a run, got none")
    file = out / SETTINGS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"resume: expected the folder of a run, got no {file}")
    try:
        saved = json_module.loads(file.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"resume: {file} is damaged ({type(error).__name__})") from error
    if not isinstance(saved, dict):
        raise ValueError(f"resume: {file} is damaged: expected settings by name")
    check_same_settings({name: saved.get(name) for name in given}, given)
    return {**DEFAULTS, **saved}


def _strange(out: Path) -> Iterator[Path]:
    """What is in the folder, but for what a run killed before it had written its settings left."""
    return (file for file in out.iterdir() if not file.name.startswith(f".{SETTINGS_FILE}."))


def _write_labels(folder: Path, done: TrainResult, data: RunData) -> None:
    """The corrected labels, and the report that says which were changed and why."""
    if done.report is None:
        return
    write_labels(folder / "labels.npy", done.labels, overwrite=True)
    names = [name for name in ("share", "margin", "suspect") if name in done.report]
    rows = [",".join(["index", "old", "new", *names, *(["file"] if data.files else [])])]
    columns = zip(
        data.source_index.tolist(),
        done.given_labels.tolist(),
        done.labels.tolist(),
        *(done.report[name].float().tolist() for name in names),
        strict=True,
    )
    for row, values in enumerate(columns):
        line = ",".join(
            f"{value:.6g}" if isinstance(value, float) else f"{value}" for value in values
        )
        rows.append(f"{line},{json_module.dumps(data.files[row])}" if data.files else line)
    atomic_write_text(folder / "report.csv", "\n".join(rows) + "\n", overwrite=True)


def _samples(done: TrainResult, data: RunData) -> RunSamples:
    """What ``als-ext report`` needs of each sample, beside the data set."""
    judged = done.report or {}
    tensors = {
        "index": data.source_index,
        "given": done.given_labels,
        "label": done.labels,
        "true": data.true_labels,
        "loss": done.losses,
        "log_pi": done.log_pi,
        "neighbours": done.neighbours,
        **{name: judged.get(name) for name in ("suspect", "share", "margin")},
    }
    arrays: dict[str, Any] = {
        name: None if value is None else value.numpy() for name, value in tensors.items()
    }
    return RunSamples(class_names=data.class_names, files=data.files, **arrays)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json_module.dumps(content, indent=2, allow_nan=False) + "\n"
    atomic_write_text(path, text, overwrite=True)


def _print_table(result: dict[str, Any], methods: list[str]) -> None:
    rate = result["noise_rate"]
    wrong = "" if rate is None else f" ({100 * rate:.1f} % wrong)"
    title = f"{result['dataset']}, {result['samples']} samples, noise {result['noise']}{wrong}"
    table = Table(title=title, caption="– is undefined: nothing to count, or truth unknown")
    table.add_column("method")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for name in methods:
        found = result[name]
        cells = ["–" if found[key] is None else f"{found[key]:.4f}" for key in COLUMNS]
        cells[-1] = f"{found['seconds']:.1f}"
        table.add_row(name, *cells)
    Console().print(table)
