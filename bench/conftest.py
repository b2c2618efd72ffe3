"""Makes the folder importable as ``bench``, and shows the table of :mod:`bench.test_races`."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: an installed als_ext goes before the checkout's

from bench import machine, report  # noqa: E402


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def pytest_benchmark_update_machine_info(machine_info):
    machine_info.update(machine.facts())


def pytest_terminal_summary(terminalreporter, config):
    from bench.test_races import ROWS

    rows = config.stash.get(ROWS, [])
    if rows and not config.getoption("--benchmark-disable"):
        from rich.console import Console

        table = report.console({**machine.facts(), "rows": rows})
        Console(file=terminalreporter._tw._file).print(table)
