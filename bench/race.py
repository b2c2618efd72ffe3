"""A race: ours, its peers and a ceiling on the same inputs, interleaved, behind an accuracy gate.

Every ``bench_*.py`` defines its races once, as ``races(quick)``; ``python -m bench`` and pytest run
them through :func:`run`, which gives one row of the table.
"""

from __future__ import annotations

import gc
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.clock import FIRST_S, CudaClock

WARM_UP = 3
LEAST, USUAL, MOST = 5, 20, 40  # rounds where a round takes long, takes < 1 s, takes little
SHORT_S, LONG_S = 1.5, 2.0  # aimed at: a race of short rounds; one contender of long ones
SLOW_S = {
    "peer": 12.0,
    "ceiling": 1.0,
    "part": 1.0,
}  # slower ones get FEW rounds: the table ends in minutes
FEW = 3


class Unavailable(Exception):
    """What is to be raced does not exist here; the message says why."""


class OutOfTime(Exception):
    """The time limit would be passed."""


@dataclass(frozen=True)
class Counts:
    """The least that an operation has to do: each input read once, each result written once.

    Args:
        bytes: of memory, read and written.
        flops: additions and multiplications.
        unit: what does them, "float32" or "bfloat16" (tensor cores).
    """

    bytes: float
    flops: float
    unit: str = "float32"


@dataclass(frozen=True)
class Contender:
    name: str
    role: str  # ours, variant (also ours), peer, ceiling, part (of a derived figure)
    call: Callable[[], Any]
    error: Callable[[], float] | None
    repeat: float  # operations a call
    compiled: bool  # its first call compiles


@dataclass
class Lineup:
    """Who races, and what ours must not exceed: ``limit`` on ``measure``, the error that is meant.

    Args:
        measure: the error in words.
        limit: largest error of ours that passes.
        note: what a reader has to know about this row.
    """

    measure: str
    limit: float
    note: str = ""
    contenders: list[Contender] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    least: int = LEAST  # rounds of those whose call takes less than a second
    settle: float = 0.0  # seconds between calls, where peers bring threads that spin on
    at_least: dict[str, float] = field(default_factory=dict)  # targets: contender -> ratio
    at_most: dict[str, float] = field(default_factory=dict)  # targets: derived figure -> value
    derive: Callable[[dict[str, float]], dict[str, float]] | None = None  # from the medians

    def _add(
        self,
        name: str,
        role: str,
        call: Callable[[], Any],
        error: Callable[[], float] | None = None,
        repeat: float = 1,
        compiled: bool = False,
    ) -> None:
        self.contenders.append(Contender(name, role, call, error, repeat, compiled))

    def ours(self, call: Callable[[], Any], error: Callable[[], float], **more: Any) -> None:
        """The subject; ``error`` is called once and decides about the gate."""
        self._add("ours", "ours", call, error, **more)

    def variant(self, name: str, call: Callable[[], Any], **more: Any) -> None:
        """Another way of ours."""
        self._add(name, "variant", call, **more)

    def peer(self, name: str, call: Callable[[], Any], **more: Any) -> None:
        """What people use instead. Its error is recorded and gates nothing."""
        self._add(name, "peer", call, **more)

    def ceiling(self, name: str, call: Callable[[], Any], **more: Any) -> None:
        """What the machine does at best with the same bytes or the same products."""
        self._add(name, "ceiling", call, **more)

    def part(self, name: str, call: Callable[[], Any], **more: Any) -> None:
        """What only enters a derived figure."""
        self._add(name, "part", call, **more)

    def skip(self, name: str, reason: str) -> None:
        """Name a peer that does not race, and why."""
        self.skipped[name] = reason


@dataclass(frozen=True)
class Race:
    """One row of the table; nothing is allocated before ``setup(device)`` is called.

    Args:
        gpu_only: a size that a CPU is not asked for.
        counts: by formula, so that limits can be estimated without a run.
        gpu_at_least, gpu_at_most: targets on a GPU, in place of the lineup's, which are a CPU's.
    """

    op: str
    case: str
    setup: Callable[[torch.device], Lineup]
    cpu_only: bool = False
    gpu_only: bool = False
    counts: Counts | None = None
    gpu_at_least: dict[str, float] = field(default_factory=dict)
    gpu_at_most: dict[str, float] = field(default_factory=dict)

    def runs_on(self, device: str) -> bool:
        """Whether the race is one of a table of ``device``."""
        return not (self.gpu_only if device == "cpu" else self.cpu_only)

    @property
    def name(self) -> str:
        return f"{self.op}/{self.case}"

    @property
    def has_gpu_targets(self) -> bool:
        return bool(self.gpu_at_least or self.gpu_at_most)


def modules() -> list[Any]:
    """The files bench_*.py of this folder."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    return [importlib.import_module(f"bench.{name}") for name in names]


def all_races(quick: bool) -> Iterator[Race]:
    """Every race; ``quick`` for small sizes."""
    for module in modules():
        if hasattr(module, "races"):
            yield from module.races(quick)


def compile_peer(function: Callable[..., Any], quick: bool) -> Callable[..., Any] | None:
    """``torch.compile``, for fixed shapes, or None in a quick run, which does not compile."""
    if quick:
        return None
    # What was compiled before counts towards a limit, after which torch silently runs eager code.
    torch.compiler.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.compile_threads = 1  # worker processes would run beside the next race
    return torch.compile(function, dynamic=False)


NOT_COMPILED = "a quick run compiles nothing"


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, until the device is done; its caches as they are."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_is_lost() -> bool:
    """Whether an error of the GPU has come that this process cannot get rid of."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def quantile(times: list[float], q: float) -> float:
    """Linear between the sorted times."""
    ordered = sorted(times)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def plan(
    estimates: dict[str, float], roles: dict[str, str], quick: bool, least: int = LEAST
) -> dict[str, int]:
    """Rounds of each contender from the seconds of one call."""
    if quick:
        return dict.fromkeys(estimates, 2)
    whole = sum(estimates.values())
    if whole < 1.0:
        return dict.fromkeys(estimates, min(MOST, max(USUAL, int(SHORT_S / whole))))
    rounds = {}
    for name, seconds in estimates.items():
        low = least if seconds < 1.0 else LEAST
        rounds[name] = min(USUAL, max(low, int(LONG_S / seconds)))
        if seconds > SLOW_S.get(roles[name], math.inf):
            rounds[name] = FEW
    return rounds


def interleave(
    calls: dict[str, Callable[[], Any]],
    rounds: dict[str, int],
    device: torch.device,
    settle: float = 0.0,
    clock: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, list[float]]:
    """Time the calls in turn, each as often as ``rounds`` says, spread over the whole time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, total = list(calls), max(rounds.values())
    gc.collect()
    gc.disable()
    try:
        for number in range(total):
            turn = number % len(names)  # nobody always comes after the same one
            for name in names[turn:] + names[:turn]:
                if (number + 1) * rounds[name] // total > number * rounds[name] // total:
                    if settle:
                        time.sleep(settle)
                    call = calls[name]
                    times[name].append(timed(call, device) if clock is None else clock(call))
    finally:
        gc.enable()
    return times


def first_line(error: Exception) -> str:
    """An exception in one line of a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def _errors(lineup: Lineup) -> dict[str, float]:
    """Errors against float64. A peer that raises is named as skipped."""
    errors = {}
    for contender in list(lineup.contenders):
        if contender.error is None:
            continue
        try:
            errors[contender.name] = float(contender.error())
        except Exception as error:
            if contender.role != "peer":
                raise
            lineup.contenders.remove(contender)
            lineup.skip(contender.name, first_line(error))
    return errors


def _warm_up(lineup: Lineup, device: torch.device) -> dict[str, float]:
    """Call everybody; seconds of one warm call. A peer that raises is named as skipped."""
    estimates = {}
    for contender in list(lineup.contenders):
        try:
            again = timed(contender.call, device)
            if contender.compiled or again < 1.0:
                again = timed(contender.call, device)
            for _ in range(0 if again > 0.3 else WARM_UP - 2):
                timed(contender.call, device)
        except Exception as error:
            if contender.role != "peer":
                raise
            lineup.contenders.remove(contender)
            lineup.skip(contender.name, first_line(error))
            continue
        estimates[contender.name] = again
    return estimates


def _targets(lineup: Lineup, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at beside what was reached; a contender that was skipped has no target."""
    ratios = {c["name"]: c["ratio"] for c in row["contenders"]}
    found = [
        {"what": name, "least": least, "got": ratios[name], "met": ratios[name] >= least}
        for name, least in lineup.at_least.items()
        if name in ratios
    ]
    for name, most in lineup.at_most.items():
        got = row["derived"][name]
        found.append({"what": name, "most": most, "got": got, "met": got <= most})
    return found


def _statistics(times: list[float], repeat: int) -> dict[str, Any]:
    return {
        "median_s": statistics.median(times) / repeat,
        "p20_s": quantile(times, 0.2) / repeat,
        "p80_s": quantile(times, 0.8) / repeat,
        "seconds": [float(f"{t / repeat:.4g}") for t in times],
    }


def run(
    race: Race,
    *,
    device: torch.device | str = "cpu",
    quick: bool = False,
    seconds_left: float = math.inf,
) -> dict[str, Any]:
    """Run a race and return its row: gate, raw times, medians, ratios, who was skipped and why.

    Raises:
        OutOfTime: the race would take longer than ``seconds_left``.
    """
    if seconds_left <= 0:
        raise OutOfTime
    device = torch.device(device)
    row: dict[str, Any] = {"op": race.op, "case": race.case, "device": device.type}
    if device.type == "cuda":  # what the race before held
        gc.collect()
        torch.cuda.empty_cache()
    start = time.perf_counter()
    try:
        lineup = race.setup(device)
    except Unavailable as reason:
        return row | {"skipped_row": str(reason)}
    if device.type == "cuda":
        lineup.at_least, lineup.at_most = race.gpu_at_least, race.gpu_at_most
    errors = _errors(lineup)
    error = errors["ours"]
    row["gate"] = {
        "measure": lineup.measure,
        "error": error,
        "limit": lineup.limit,
        "passed": error <= lineup.limit,  # False for NaN
    }
    estimates = _warm_up(lineup, device)
    roles = {c.name: c.role for c in lineup.contenders}
    rounds = plan(estimates, roles, quick, lineup.least)
    needed = sum(rounds[name] * estimates[name] for name in rounds)
    if device.type == "cuda":  # by events, and as wall time
        needed = 2 * needed + 2 * FIRST_S * sum(rounds.values())
    if time.perf_counter() - start + needed > seconds_left:
        raise OutOfTime
    calls = {c.name: c.call for c in lineup.contenders}
    clock = CudaClock() if device.type == "cuda" else None
    by_events = None if clock is None else clock.device_seconds
    times = interleave(calls, rounds, device, lineup.settle, by_events)
    medians = {c.name: statistics.median(times[c.name]) / c.repeat for c in lineup.contenders}
    row["contenders"] = [
        {
            "name": c.name,
            "role": c.role,
            "ratio": medians[c.name] / medians["ours"],
            **_statistics(times[c.name], c.repeat),
            "rounds": len(times[c.name]),
            "repeat": c.repeat,
            "error": errors.get(c.name),
        }
        for c in lineup.contenders
    ]
    if clock is not None:  # the call as Python sees it; what is above is time of the device alone
        walls = interleave(calls, rounds, device, lineup.settle, clock.wall_seconds)
        for contender in row["contenders"]:
            contender["wall"] = _statistics(walls[contender["name"]], contender["repeat"])
            contender["waits"] = id(calls[contender["name"]]) in clock.waits
    row["counted"] = None if race.counts is None else asdict(race.counts)
    row["skipped"] = lineup.skipped
    row["note"] = lineup.note
    row["derived"] = None if lineup.derive is None else lineup.derive(medians)
    row["targets"] = _targets(lineup, row)
    row["took_s"] = round(time.perf_counter() - start, 1)
    return row
