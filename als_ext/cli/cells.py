"""Training the cells of a comparison: one after the other, or some at a time in processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import re
import signal
import threading
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from als_ext import __version__
from als_ext.cli.display import Display
from als_ext.cli.inputs import clean_subset, load_run_data
from als_ext.cli.training import describe, figures, fit, make_trainer, use_threads
from als_ext.compare.figures import cell_figures
from als_ext.compare.grid import Cell, Variant
from als_ext.compare.samples import SAMPLES_FILE, map_rows, save_samples
from als_ext.compare.store import Result
from als_ext.embedding import make_embedder
from als_ext.io import atomic_write_text, remove_left_overs
from als_ext.methods import METHODS
from als_ext.trainer import CHECKPOINT

ERROR_FILE = "error.txt"
_DESCRIBED = ("samples", "clean_per_class", "model", "device", "threads", "noise_rate")


@dataclass(frozen=True)
class Job:
    """One cell to train.

    Args:
        cell: what it is called.
        variant: the method and its settings.
        settings: of ``als-ext run``.
        folder: its own, for the checkpoint and what is kept of it.
        threads: CPU threads; None is ``usual_threads``, but 1 for an MLP.
        usual_threads: CPU threads without further ado.
        checkpoint_seconds: seconds between checkpoints.
    """

    cell: Cell
    variant: Variant
    settings: dict[str, Any]
    folder: Path
    threads: int | None
    usual_threads: int
    checkpoint_seconds: float


def train(job: Job, progress: bool | Progress = False) -> Result:
    """Train a cell, or what is left of it, and keep what the plots need in its folder."""
    torch.set_num_threads(job.usual_threads)
    data = load_run_data(job.settings)
    clean = clean_subset(data, job.settings["clean_per_class"], job.settings["seed"])
    trainer = make_trainer(
        job.variant.method,
        job.settings,
        dict(job.variant.settings),
        data,
        out=job.folder,
        progress=progress,
        checkpoint_seconds=job.checkpoint_seconds,
    )
    make_embedder(trainer.model, trainer.config.embedding)  # says now what would fail at the map
    use_threads(job.threads, [trainer])
    done = fit(trainer, data, clean, resume=True)
    rows = map_rows(len(data.given_labels))
    embedding = trainer.embeddings()[rows.to(trainer.device)]
    save_samples(job.folder / SAMPLES_FILE, done, data.true_labels, rows, embedding)
    facts = describe(job.settings, data, trainer)
    kind = METHODS[job.variant.method]
    if not (kind.takes_clean or kind.needs_clean):  # it got them and did not look
        facts["clean_per_class"] = 0
    return {
        "status": "done",
        "kind": job.variant.method,
        "settings": dict(job.variant.settings),
        **figures(done),
        **cell_figures(done, data.true_labels, trainer.config.epochs),
        **{name: facts[name] for name in _DESCRIBED},
        "device": trainer.device.type,
        "versions": {
            "als_ext": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def attempt(job: Job, progress: bool | Progress = False) -> Result:
    """``train``, or what went wrong: one line in the result, the traceback in the folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    remove_left_overs(job.folder)
    (job.folder / ERROR_FILE).unlink(missing_ok=True)
    try:
        return train(job, progress)
    except Exception as error:
        atomic_write_text(job.folder / ERROR_FILE, traceback.format_exc(), overwrite=True)
        return failed(f"{type(error).__name__}: {error}")


def failed(error: str) -> Result:
    """The result of a cell that came to nothing, without folders and line breaks."""
    one_line = " ".join(error.split())
    return {"status": "failed", "error": re.sub(r"(?:\w:)?[\\/](?:[^\\/\s]+[\\/])+", "", one_line)}


def drop_checkpoint(folder: Path) -> None:
    """Remove the large file of a finished cell."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def results_of(
    jobs: Sequence[Job], processes: int, display: Display
) -> Generator[tuple[Job, Result], None, None]:
    """Train all, and give each result as soon as it is there.

    Args:
        jobs: the cells.
        processes: how many at a time; 1 trains in this process, one after the other.
        display: shows the cell that is being trained in this process.
    """
    if processes == 1:
        for job in jobs:
            display.started(job.cell)
            yield job, attempt(job, display.bars or False)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    waiting = list(reversed(jobs))
    running: dict[Any, tuple[Any, Job]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop()
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, job), name=str(job.cell))
                with _deaf_to_interrupts():
                    process.start()
                theirs.close()
                running[mine] = (process, job)
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)  # the type of what wait gives is wider
                process, job = running[pipe]
                try:
                    result = pipe.recv()
                except (EOFError, OSError):  # killed, or out of memory
                    process.join()
                    result = failed(f"its process ended with code {process.exitcode}")
                process.join()
                del running[pipe]
                pipe.close()
                yield job, result
    finally:
        for process, _ in running.values():
            process.kill()  # checkpoints are whole at any moment
            process.join()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside leave Ctrl-C, which the terminal sends to all, to this one."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: Connection, job: Job) -> None:
    """Train in a process of its own, which ends as soon as its parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        return  # killed before this one had started: another comparison may be at work by now

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    pipe.send(attempt(job))
