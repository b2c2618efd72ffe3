"""Races: ours and its peers, interleaved in one process, behind an accuracy gate.

    python -m pytest bench --benchmark-json=out.json    # measure
    python -m pytest bench --benchmark-disable          # smoke test: small sizes, one round, gates
    still checked

pytest-benchmark times ``ours``; the interleaved rounds behind the ratios are stored in its
``extra_info`` and
printed at the end. A ratio is peer / ours, of medians over the same rounds: above 1 we are faster.
"""

import platform
import statistics
import time
from dataclasses import dataclass, field

import pytest
import torch

import als_ext

ROUNDS = 20
WARM_UP = 3
rows = []


def timed(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quantile(times, q):
    return statistics.quantiles(times, n=10, method="inclusive")[int(q * 10) - 1]


@dataclass
class Race:
    """Callable fixture: ``race({"ours": f, "eager": g, "copy (ceiling)": h}, error=, limit=)``."""

    benchmark: object
    smoke: bool
    name: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def size(self, full, small):
        """The size to measure, or the small one in a smoke run."""
        return small if self.smoke else full

    def __call__(self, contenders, *, error, limit):
        """Race the contenders; ``error`` of ours against float64 must not exceed ``limit``."""
        assert error <= limit, f"accuracy gate: error {error:.3g} exceeds {limit:.3g}"
        times = {name: [] for name in contenders}
        for function in contenders.values():
            for _ in range(1 if self.smoke else WARM_UP):
                function()
        for _ in range(1 if self.smoke else ROUNDS):
            for name, function in contenders.items():
                times[name].append(timed(function, self.device))
        ours = statistics.median(times["ours"])
        info = {"error": error, "device": str(self.device)}
        for name, measured in times.items():
            median = statistics.median(measured)
            info[name] = {"median_s": median, "ratio": median / ours}
            if not self.smoke:
                info[name] |= {"p20_s": quantile(measured, 0.2), "p80_s": quantile(measured, 0.8)}
        self.benchmark.extra_info.update(info)
        rows.append((self.name, info))
        self.benchmark.pedantic(contenders["ours"], rounds=1 if self.smoke else ROUNDS)


@pytest.fixture
def race(benchmark, request, device):
    smoke = request.config.getoption("--benchmark-disable")
    return Race(benchmark, smoke, request.node.name, device)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["als_ext"] = als_ext.build_info()
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["platform"] = platform.platform()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()


def pytest_terminal_summary(terminalreporter, config):
    if not rows or config.getoption("--benchmark-disable"):
        return
    terminalreporter.section("races (ratio = peer / ours, medians of interleaved rounds)")
    for name, info in rows:
        ours = info["ours"]["median_s"] * 1e3
        peers = ", ".join(
            f"{peer} x{value['ratio']:.2f}"
            for peer, value in info.items()
            if isinstance(value, dict) and peer != "ours"
        )
        terminalreporter.write_line(
            f"{name}: ours {ours:.3f} ms; {peers}; error {info['error']:.1e}"
        )
