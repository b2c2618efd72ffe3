"""``als-ext decide``: labels after what a person decided in the report about a run."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import torch
import typer

from als_ext.cli import options
from als_ext.correction import read_decisions
from als_ext.data import write_labels
from als_ext.ops._checks import check_choice
from als_ext.report.run_folder import read_run


def decide(
    run_dir: Annotated[Path, typer.Argument(help="Folder of als-ext run --out.")],
    decisions: Annotated[Path, typer.Argument(help="File that the report exported.")],
    out: Annotated[Path, typer.Option(help="Labels to write: npy, npz, csv or json.")],
    method: Annotated[
        str | None,
        typer.Option(help="Which method of the run.", show_default="that of the decisions"),
    ] = None,
    undecided: Annotated[
        str, typer.Option(help="accept or reject the relabels that nobody decided about.")
    ] = "accept",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --out.")] = False,
    json: options.Json = False,
) -> None:
    """Write the labels of a run with the relabels that were accepted in its report."""
    check_choice("undecided", undecided, ("accept", "reject"))
    found = read_decisions(decisions)
    samples = read_run(run_dir, found.method if method is None else method).samples
    given, label = torch.from_numpy(samples.given), torch.from_numpy(samples.label)
    base = label if undecided == "accept" else given
    labels = found.apply(given, len(samples.class_names), base)
    write_labels(out, labels, overwrite=force)
    accepted = int(found.accepted.sum())
    counts = {
        "accepted": accepted,
        "rejected": len(found) - accepted,
        "changed": int((labels != given).sum()),
    }
    if json:
        print(json_module.dumps({**counts, "samples": len(labels), "out": str(out)}))
        return
    print(
        f"{counts['accepted']} accepted, {counts['rejected']} rejected, {counts['changed']} of "
        f"{len(labels)} labels changed: {out}"
    )
