"""What the GPU gate runs beside the tests: every operation small, in graphs, on streams, and large.

    python -m bench.gpu_cases small       once each: what compute-sanitizer looks at
    python -m bench.gpu_cases graphs      captured in a CUDA graph; replays give the bits of calls
    python -m bench.gpu_cases streams     on two streams at a time; the bits of calls one by one
    python -m bench.gpu_cases large       more than 2^31 elements or products; against float64

--only knn,pi_step runs the cases of these names. --device cpu runs the same code without a GPU:
graphs are plain calls, streams take turns, and large is a few thousand elements.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from als_ext import SampleWeights, _library
from als_ext.ops import knn, knn_vote, sample_loss, weighted_loss
from als_ext.ops.also_step import also_step_
from als_ext.ops.pi_step import pi_rule, pi_state, pi_step_, pi_weight
from als_ext.reference.knn import knn as float64_knn
from als_ext.reference.knn_vote import knn_vote as float64_vote
from als_ext.reference.sample_loss import sample_loss as float64_loss
from bench.inputs import deviation
from bench.race import device_is_lost

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-3}
BF16 = torch.bfloat16


class Skipped(Exception):
    """A case that this device cannot hold; the message says why."""


class Job:
    """An operation on tensors that stay where they are, as graphs need it.

    Args:
        name: of the case.
        inputs: tensors, each with the function of a generator that draws new values for it.
        state: tensors that a call changes.
        call: returns further results.
    """

    def __init__(
        self,
        name: str,
        inputs: list[tuple[Tensor, Callable[[torch.Generator], Tensor]]],
        call: Callable[[], Any],
        state: list[Tensor] | None = None,
    ) -> None:
        self.name, self.inputs, self.call, self.state = name, inputs, call, state or []
        self.start = [t.clone() for t in self.state]

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """New inputs, and the state of before the first call."""
        g = torch.Generator().manual_seed(seed)
        for tensor, draw in self.inputs:
            tensor.copy_(draw(g))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The state of before the first call; nothing comes from the host."""
        for tensor, start in zip(self.state, self.start, strict=True):
            tensor.copy_(start)

    def run(self) -> list[Tensor]:
        return [*(self.call() or []), *self.state]


# ---- the operations ----------------------------------------------------------------------------


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: 3 * torch.randn(*shape, generator=g)


def _uniform(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(*shape, generator=g) + 0.5


def _integers(high: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(0, high, shape, generator=g)


def _losses(
    device: torch.device, classes: int, dtype: torch.dtype, soft: bool = False, **settings: Any
) -> Job:
    """Both loss operations with their gradients; the logits are at the odd address of a view.

    Args:
        soft: targets are numbers [rows, classes]: probabilities, or what is to be hit.
    """
    rows = 33
    shift = 0 if classes % 8 == 0 else 1
    memory = torch.zeros(rows * classes + shift, dtype=dtype, device=device)
    logits = memory[shift:].view(rows, classes).requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64, device=device)
    draw = _integers(classes, rows)
    if soft:
        target, draw = torch.zeros_like(logits, requires_grad=False), _uniform(rows, classes)
    weight = torch.zeros(rows, device=device)

    def call() -> list[Tensor]:
        losses = sample_loss(logits, target, **settings)
        slopes = torch.autograd.grad(losses, logits, weight.to(losses.dtype))
        total, again = weighted_loss(logits, target, weight, **settings)
        return [losses.detach(), *slopes, again, *torch.autograd.grad(total, logits)]

    inputs = [(logits, _normal(rows, classes)), (target, draw)]
    name = f"losses, {classes} classes, {str(dtype).removeprefix('torch.')}"
    name += ", soft targets" if soft else ""
    name += f", {settings}" if settings else ""
    return Job(name, [*inputs, (weight, _uniform(rows))], call)


def _knn(
    device: torch.device,
    rows: int,
    dim: int,
    k: int,
    dtype: torch.dtype,
    ties: bool = False,
    few: bool = False,
    **settings: Any,
) -> Job:
    """A search; with ``ties`` among rows of few different distances, which score again.

    Args:
        few: the database is read as it lies, as it is where so little is asked; else it is packed.
    """
    query, database = (torch.zeros(n, dim, dtype=dtype, device=device) for n in (65, rows))
    draw = partial(_integers, 2) if ties else _normal
    inputs = [(query, draw(65, dim)), (database, draw(rows, dim))]
    name = f"knn, {rows} × {dim}, k = {k}, {str(dtype).removeprefix('torch.')}"
    name += ", ties" if ties else ""
    name += ", as it lies" if few else ""
    name += f", {settings}" if settings else ""

    def call() -> tuple[Tensor, Tensor]:
        if device.type == "cuda":
            _library._cuda.allow_small_input_paths(few)
        return knn(query, database, k, **settings)

    return Job(name, inputs, call)


def _knn_from_host(device: torch.device, rows: int, dim: int, k: int) -> Job:
    """The database stays in pinned memory and comes in parts of at most 16 KiB."""
    query, database = torch.zeros(65, dim, device=device), torch.zeros(rows, dim)
    if device.type == "cuda":
        _library._cuda.set_staging_bytes(1 << 14)
        database = database.pin_memory()
    inputs = [(query, _normal(65, dim)), (database, _normal(rows, dim))]
    name = f"knn, {rows} × {dim} from the host, k = {k}"
    return Job(name, inputs, lambda: knn(query, database, k))


def _vote(device: torch.device) -> Job:
    distance = torch.zeros(300, 7, device=device)
    index = torch.zeros(300, 7, dtype=torch.int64, device=device)
    label = torch.zeros(50, dtype=torch.int64, device=device)
    inputs = [
        (distance, _uniform(300, 7)),
        (index, _integers(50, 300, 7)),
        (label, _integers(4, 50)),
    ]
    return Job("knn_vote", inputs, lambda: knn_vote(distance, index, label, 4))


def _pi(device: torch.device, lazy: bool, prior: bool) -> Job:
    n, batch = 10_001, 67
    rule = pi_rule(lr=0.1, decay=0.01, temperature=1.0, direction="max")
    given = torch.linspace(-1, 1, n, device=device) if prior else None
    state = pi_state(n, rule, capacity=batch, log_prior=given, lazy=lazy, device=device)
    index = torch.zeros(batch, dtype=torch.int64, device=device)
    loss = torch.zeros(batch, device=device)

    def call() -> list[Tensor]:
        for _ in range(2):
            pi_step_(state, rule, index, loss)
        return [pi_weight(state, rule, index, half=True), pi_weight(state, rule)]

    changed = [t for t in (*state[:5], state.sums) if t is not None]
    name = f"pi_step, {'lazy' if lazy else 'dense'}{', prior' if prior else ''}"
    return Job(name, [(index, _integers(n, batch)), (loss, _uniform(batch))], call, changed)


def _also(device: torch.device, dtype: torch.dtype, half: bool) -> Job:
    sizes = (1, 1000, 4099)

    def lists(kind: torch.dtype) -> list[Tensor]:
        return [torch.zeros(size, dtype=kind, device=device) for size in sizes]

    params, grads, means, squares = lists(dtype), *map(lists, (dtype, torch.float32, torch.float32))
    bases = lists(torch.float32) if half else []
    steps = [torch.zeros((), dtype=torch.int64, device=device) for _ in sizes]

    def call() -> None:
        also_step_(params, grads, means, squares, [], bases, steps, **SETTINGS)

    inputs = [(gradient, _normal(gradient.numel())) for gradient in grads]
    name = f"also_step, {str(dtype).removeprefix('torch.')}{', half step' if half else ''}"
    return Job(name, inputs, call, [*params, *means, *squares, *bases, *steps])


def jobs(device: torch.device) -> list[Job]:
    """Every kernel at least once: short, long and ragged rows, aligned or not, all state."""
    return [
        *(_losses(device, c, t) for c in (10, 104, 600, 5000) for t in (torch.float32, BF16)),
        _losses(device, 100, torch.float32, label_smoothing=0.1),
        _losses(device, 5003, torch.float16, loss="gce", q=0.7),
        _losses(device, 12, torch.float64),
        _losses(device, 40_000, BF16, loss="bootstrap", kind="soft"),  # two blocks a row, then four
        _losses(device, 50_257, torch.float32),
        *(_losses(device, c, torch.float32, soft=True) for c in (100, 5000)),
        *(_losses(device, 7, t, soft=True, loss="squared_error") for t in (torch.float32, BF16)),
        *(_knn(device, 1031, 17, 10, dtype) for dtype in (torch.float32, BF16, torch.float16)),
        _knn(device, 300, 128, 64, torch.float32),
        _knn(device, 2500, 300, 100, BF16, metric="cosine"),
        _knn(device, 2500, 64, 20, torch.float32, ties=True),
        _knn(device, 700, 40, 5, torch.float64, metric="ip"),
        *(_knn(device, 1031, d, 10, t, few=True) for d, t in ((17, torch.float32), (64, BF16))),
        _knn(device, 2500, 300, 100, torch.float16, few=True, metric="cosine"),
        _knn(device, 2500, 64, 20, torch.float32, ties=True, few=True, metric="ip"),
        _knn(device, 70, 5, 20, torch.float64, few=True),
        *(_knn_from_host(device, 1031, 17, k) for k in (10, 300)),
        _vote(device),
        *(_pi(device, lazy, prior) for lazy in (False, True) for prior in (False, True)),
        *(_also(device, dtype, half) for dtype in (torch.float32, BF16) for half in (False, True)),
    ]


def _same(got: list[Tensor], want: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        if not torch.equal(a, b):
            wrong = int((a != b).sum())
            raise AssertionError(f"result {number}: {wrong} of {a.numel()} elements differ")


# ---- what is done with them --------------------------------------------------------------------


def small(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    def once(job: Job) -> None:
        job.fill(0)
        for result in job.run():
            assert result.isfinite().all()

    for job in jobs(device):
        yield job.name, partial(once, job)


def captured(job: Job, device: torch.device) -> tuple[Callable[[], Any], list[Tensor]]:
    """Replays a call of a job, and its results' place; on a CPU a plain call into that place."""
    if device.type != "cuda":
        place = [t.clone() for t in job.run()]

        def again() -> None:
            for tensor, value in zip(place, job.run(), strict=True):
                tensor.copy_(value)

        return again, place
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        job.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        place = job.run()
    return graph.replay, place


def graphs(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    def replayed(job: Job, other: Job) -> None:
        job.fill(0)
        replay, place = captured(job, device)
        for seed in (1, 2):
            job.fill(seed)
            other.fill(seed)
            replay()
            _same(place, other.run())

    for job, other in zip(jobs(device), jobs(device), strict=True):
        yield job.name, partial(replayed, job, other)


def streams(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    def together(first: Job, second: Job) -> None:
        pair, want = (first, second), []
        for seed, job in enumerate(pair):
            job.fill(seed)
            want.append([t.clone() for t in job.run()])
        two = [nullcontext(), nullcontext()]
        if device.type == "cuda":
            torch.cuda.synchronize()
            two = [torch.cuda.stream(torch.cuda.Stream()) for _ in pair]
        for _ in range(10 if device.type == "cuda" else 1):
            got = []
            for job, stream in zip(pair, two, strict=True):
                with stream:
                    job.reset()
                    got.append(job.run())
            if device.type == "cuda":
                torch.cuda.synchronize()
            for results, wanted in zip(got, want, strict=True):
                _same(results, wanted)

    first, second = jobs(device), jobs(device)
    for number, job in enumerate(first):
        yield f"{job.name}, twice", partial(together, job, second[number])
        if number:
            other = second[number - 1]
            yield f"{job.name} beside {other.name}", partial(together, job, other)


# ---- more than 2^31 ----------------------------------------------------------------------------


def _room(device: torch.device, gib: float) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            raise Skipped(f"needs {gib:.0f} GiB of the device, {free:.0f} are free")


def _large_losses(device: torch.device, limit: int, classes: int) -> None:
    _room(device, 22)
    rows = limit // classes + 5
    logits = torch.empty(rows, classes, dtype=BF16, device=device).normal_().requires_grad_()
    target = torch.arange(rows, device=device) % classes
    weight = torch.linspace(0.5, 1.5, rows, device=device)
    for weighted in (False, True):
        if weighted:
            total, losses = weighted_loss(logits, target, weight)
            (slope,) = torch.autograd.grad(total, logits)
        else:
            losses = sample_loss(logits, target)
            (slope,) = torch.autograd.grad(losses, logits, weight)
        for some in (slice(0, 5), slice(rows - 5, rows)):
            exact = logits[some].detach().double().requires_grad_()
            value = float64_loss(exact, target[some])
            want = value.detach(), torch.autograd.grad(value, exact, weight[some].double())[0]
            error = deviation((losses[some].detach(), slope[some]), want)
            assert error <= 2**-8, error
        del losses, slope


def _large_knn(device: torch.device, limit: int) -> None:
    """More products than 2^31; the last queries are checked."""
    _room(device, 4)
    rows = int(limit**0.5) + 100
    g = torch.Generator().manual_seed(0)
    query, database = (torch.randn(rows, 8, generator=g).to(device) for _ in range(2))
    distance, index = knn(query, database, 4)
    want = float64_knn(query[-20:].cpu(), database.cpu(), 4)
    _same([distance[-20:].cpu(), index[-20:].cpu()], list(want))


def _large_database(device: torch.device, limit: int, queries: int) -> None:
    """More elements than 2^31: the nearest rows are planted behind the last 2^31st."""
    _room(device, 20)
    rows, k = limit // 128 + 50, 5
    database = torch.empty(rows, 128, device=device).normal_()
    query = torch.empty(queries, 128, device=device).normal_()
    for place in range(k):
        database[rows - 1 - place] = query[3] + 1e-3 * (place + 1)
    _, index = knn(query, database, k)
    assert index[3].tolist() == [rows - 1 - place for place in range(k)], index[3]


def _large_host_database(device: torch.device, limit: int) -> None:
    """As above, in host memory, of a process that may allocate an eighth of that on the device."""
    rows, k, fill = limit // 128 + 50, 5, 1 << 20
    size = rows * 128 * BF16.itemsize
    # pinned memory comes in powers of two
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 2.5 * size:
        raise Skipped(f"needs {2.5 * size / 2**30:.0f} GiB of host memory")
    cuda = device.type == "cuda"
    database = torch.empty(rows, 128, dtype=BF16, pin_memory=cuda)
    for first in range(0, rows, fill):
        part = database[first : first + fill]
        part.copy_(torch.randn(part.shape, device=device))
    query = torch.randn(16, 128, device=device).to(BF16)
    for place in range(k):
        database[rows - 1 - place] = query[3]
        database[rows - 1 - place, 0] += place + 1
    if cuda:
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(size / 8 / whole)
    try:
        _, index = knn(query, database, k)
        got = index[3].tolist()
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert got == [rows - 1 - place for place in range(k)], got


def _large_vote(device: torch.device, limit: int) -> None:
    _room(device, 40)
    k = 64
    rows = limit // k + 5
    index = torch.randint(0, 1000, (rows, k), device=device)
    distance = torch.rand(rows, k, device=device)
    label = torch.arange(1000, device=device) % 10
    got = knn_vote(distance, index, label, 10)
    want = float64_vote(distance[-5:], index[-5:], label, 10)
    assert torch.equal(got[0][-5:], want[0])
    assert (got[1][-5:] - want[1]).abs().max() <= 1e-6


def _large_pi(device: torch.device, limit: int, mode: str) -> None:
    from bench.bench_pi_step import DECAY, LR, STEPS, exact_weights

    _room(device, 30)
    n = limit + 5
    weights = SampleWeights(n, lr=LR, decay=DECAY, mode=mode, device=device)
    index = torch.tensor([0, 7, n - 1, n - 2, n - 1], device=device)
    loss = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], device=device)
    for _ in range(STEPS):
        weights.update_(index, loss)
    asked = torch.cat([index, torch.arange(n - 100, n, device=device)])
    want = exact_weights(n, None, index, loss, asked)
    error = ((weights.weight(asked) - want).abs() / want).max().item()
    assert error <= 2e-6, error


def _large_also(device: torch.device, limit: int) -> None:
    _room(device, 40)
    size = limit + 5

    def lists(count: int) -> list[list[Tensor]]:
        kinds = (BF16, BF16, torch.float32, torch.float32, torch.float32)
        return [[torch.zeros(count, dtype=kind, device=device)] for kind in kinds]

    def step(params: Any, grads: Any, means: Any, squares: Any, bases: Any) -> list[Tensor]:
        steps = [torch.zeros((), dtype=torch.int64, device=device)]
        also_step_(params, grads, means, squares, [], bases, steps, **SETTINGS)
        return [params[0][-5:], means[0][-5:], squares[0][-5:], bases[0][-5:]]

    many, few = lists(size), lists(5)
    for gradient in (many[1][0], few[1][0]):
        gradient[-5:] = torch.linspace(-1, 1, 5, device=device)
    got = step(*many)
    assert (got[3] != 0).sum() >= 4, "the last elements were not stepped"
    _same(got, step(*few))


def large(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    limit = 2**31 if device.type == "cuda" else 2**13
    for classes in (1024, 65_544) if device.type == "cuda" else (100, 1100):
        yield f"losses, {classes} classes", partial(_large_losses, device, limit, classes)
    yield "knn, products", partial(_large_knn, device, limit)
    for queries in (16, 65):  # read as it lies, and packed
        yield f"knn, database, {queries} queries", partial(_large_database, device, limit, queries)
    yield "knn, database of the host", partial(_large_host_database, device, limit)
    yield "knn_vote", partial(_large_vote, device, limit)
    for mode in ("dense", "lazy"):
        yield f"pi_step, {mode}", partial(_large_pi, device, limit, mode)
    yield "also_step", partial(_large_also, device, limit)


KINDS = {"small": small, "graphs": graphs, "streams": streams, "large": large}


def main(arguments: list[str] | None = None) -> int:
    """Run one kind; a line a case, exit status 1 where one failed. The rest is run all the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--only", help="names of cases, separated by commas")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    failed = skipped = count = 0
    only = None if options.only is None else set(options.only.split(","))
    for name, case in KINDS[options.kind](torch.device(options.device)):
        if only is not None and name.split(",")[0] not in only:
            continue
        start = time.perf_counter()
        count += 1
        try:
            case()
            if options.device == "cuda":
                torch.cuda.synchronize()
            said = "ok"
        except Skipped as reason:
            skipped += 1
            said = f"SKIPPED: {reason}"
        except Exception as error:  # the next case may tell where it comes from
            failed += 1
            said = f"FAILED: {type(error).__name__}: {error}"
        print(f"{options.kind}: {name}: {said} ({time.perf_counter() - start:.1f} s)", flush=True)
        if options.device == "cuda":
            if said.startswith("FAILED") and device_is_lost():
                print("the device is lost to this process: the cases that follow were not run")
                break
            torch.cuda.empty_cache()
    print(f"{count} cases on {options.device}: {failed} failed, {skipped} skipped")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
