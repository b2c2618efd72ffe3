"""``als-ext info``: what this installation is and what the machine has."""

from __future__ import annotations

import json as json_module
import platform
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from als_ext import build_info
from als_ext.methods import METHODS


def info(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the build, the CPU's capabilities and the GPUs."""
    facts = _facts()
    if json:
        print(json_module.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(k for k, v in value.items() if v) or "none"
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)


def _facts() -> dict[str, Any]:
    gpus = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            gpus.append(
                f"{properties.name} (sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB)"
            )
    return {
        **build_info(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch_cuda": torch.version.cuda,
        "gpus": gpus,
        "methods": sorted(METHODS),
    }
