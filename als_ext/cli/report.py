"""``als-ext report``: one HTML file about a run, to look at and to decide in."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from als_ext.cli import options
from als_ext.report import write_report


def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of als-ext run --out.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write.", show_default="RUN_DIR/report.html")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Which method of the run.", show_default="the last that changed a label"),
    ] = None,
    pictures: Annotated[
        int, typer.Option(help="Relabels shown with their sample; the least sure ones.")
    ] = 1000,
    picture_size: Annotated[int, typer.Option(help="Longest side of a picture, pixels.")] = 64,
    features: Annotated[int, typer.Option(help="Numbers shown of a sample that is no image.")] = 12,
    dataset: Annotated[
        str | None,
        typer.Option(help="Where the data is now, as of run.", show_default="where it was"),
    ] = None,
    data_dir: options.DataDir = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --out.")] = False,
    json: options.Json = False,
) -> None:
    """Write one HTML file about a run: what was found and changed, to accept or reject."""
    written = write_report(
        run_dir,
        run_dir / "report.html" if out is None else out,
        method=method,
        pictures=pictures,
        picture_size=picture_size,
        features=features,
        dataset=dataset,
        data_dir=None if data_dir is None else str(data_dir),
        overwrite=force,
    )
    if json:
        found = {
            "out": str(written.path),
            "bytes": written.size,
            "method": written.method,
            "relabels": written.relabels,
            "pictured": written.pictured,
            "missing": written.missing,
        }
        print(json_module.dumps(found))
        return
    print(
        f"{written.path}: {written.relabels} relabels of {written.method}, {written.pictured} with "
        f"their samples, {written.size / 1e6:.1f} MB"
    )
    if written.missing:
        print(f"No samples are shown. {written.missing}")
