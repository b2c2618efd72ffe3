"""Points of docs/scale.md's cost model: Gloo processes on this machine, a thread each.

    python bench/scale.py > bench/results/scale-gloo.jsonl    1, 2 and 3 processes
    python bench/scale.py --quick 2                           a rehearsal, 2 processes

Bytes are those of the loopback interface (Linux), of all processes together and with what TCP adds.
Times are the least of three: wall time, and CPU time of the process that takes most of it, which
other work on the machine disturbs less. A line a point.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import als_ext
from als_ext.distributed.exchange import Exchange
from bench import scale_model

SIZES = (1, 2, 3)
FEATURES, CLASSES = 32, 10  # of the correction


@dataclass(frozen=True)
class Points:
    knn: tuple[tuple[int, int, int], ...]  # n, D, k
    rows: int  # of the correction
    weights: tuple[tuple[int, int], ...]  # n, samples of a process in a step
    steps: int
    repeats: int


FULL = Points(
    knn=((20_000, 128, 10), (40_000, 128, 10), (20_000, 512, 10), (40_000, 128, 50)),
    rows=20_000,
    weights=((100_000, 64), (10_000_000, 64), (10_000_000, 4096)),
    steps=200,
    repeats=3,
)
QUICK = Points(knn=((2000, 64, 5),), rows=600, weights=((10_000, 4096),), steps=3, repeats=1)


def loopback() -> int:
    """Bytes that the loopback interface has received."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    raise RuntimeError("/proc/net/dev: expected the interface 'lo', got none")


def measured(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Least seconds, wall and CPU, and bytes of all processes."""
    seconds, busy, moved = [], [], []
    for _ in range(repeats):
        dist.barrier()
        before, begun, working = loopback(), time.perf_counter(), time.process_time()
        work()
        own = torch.tensor(time.process_time() - working)
        dist.barrier()
        seconds.append(time.perf_counter() - begun)
        moved.append(loopback() - before)
        dist.all_reduce(own, dist.ReduceOp.MAX)
        busy.append(float(own))
    return {"seconds": min(seconds), "cpu_seconds": min(busy), "bytes": min(moved)}


def own_rows(values: torch.Tensor) -> torch.Tensor:
    return values.tensor_split(dist.get_world_size())[dist.get_rank()]


def knn_points(points: Points) -> None:
    for n, dim, k in points.knn:
        x = own_rows(torch.randn(n, dim, generator=torch.Generator().manual_seed(0)))

        def work(x=x, k=k):
            als_ext.distributed.knn(x, x, k, exclude_self=True)

        found = measured(work, points.repeats)
        cost = scale_model.knn(n, dim, k, dist.get_world_size())
        say("knn", f"n = {n:,}, D = {dim}, k = {k}", found, cost.received, products=cost.products)


def correction_points(points: Points) -> None:
    """Rows in no order, and those of a class in one process: then few neighbours are elsewhere."""
    g, rows = torch.Generator().manual_seed(0), points.rows
    truth = torch.randint(0, CLASSES, (rows,), generator=g)
    x = torch.randn(rows, FEATURES, generator=g) + 2 * torch.eye(FEATURES)[truth] * 3
    wrong = torch.rand(rows, generator=g) < 0.4
    given = torch.where(wrong, torch.randint(0, CLASSES, (rows,), generator=g), truth)
    for order, where in ((torch.arange(rows), "in no order"), (truth.argsort(), "by class")):
        fetched = _count_fetches()
        mine, labels = own_rows(x[order]), own_rows(given[order])

        def work(mine=mine, labels=labels):
            als_ext.correct_labels(mine, labels, num_classes=CLASSES, group=dist.group.WORLD)

        found = measured(work, points.repeats)
        graph = scale_model.knn(rows, FEATURES, 50, dist.get_world_size()).received
        columns = sum(width for width, _ in fetched) / points.repeats
        named = fetched[0][1] if fetched else 0
        received = sum(4 * width * count for width, count in fetched) / points.repeats
        say(
            "correct_labels",
            f"n = {rows:,}, C = {CLASSES}, rows {where}",
            found,
            graph + received,
            columns=columns,
            elsewhere=named / rows,
        )


def _count_fetches() -> list[tuple[float, int]]:
    """Filled with columns of 4 bytes and rows from elsewhere, of each fetch."""
    fetched: list[tuple[float, int]] = []
    plain = Exchange.__call__ if not hasattr(Exchange, "plain") else Exchange.plain
    Exchange.plain = plain

    def counted(self, values):
        out = plain(self, values)
        elsewhere = sum(self._received) - self._received[dist.get_rank()]
        width = values[:1].numel() * values.element_size() / 4
        fetched.append((width, elsewhere))
        return out

    Exchange.__call__ = counted
    return fetched


def also_points(points: Points) -> None:
    for n, batch in points.weights:
        weights = als_ext.SampleWeights(n, group=dist.group.WORLD, batch_size=batch)
        index, loss = torch.randint(0, n, (batch,)), torch.rand(batch)

        def work(weights=weights, index=index, loss=loss):
            for _ in range(points.steps):
                weights.batch_share(index)
                weights.half_weight(index)
                weights.update_(index, loss)

        work()
        found = measured(work, points.repeats)
        found = {name: value / points.steps for name, value in found.items()}
        cost = scale_model.also_step(n, batch, dist.get_world_size())
        say("step of ALSO's weights", f"n = {n:,}, {batch:,} a process", found, cost.received)


def say(what: str, point: str, found: dict[str, float], received: float, **more: float) -> None:
    """One line; ``received`` is the model's, of this process: those of all are added."""
    total = torch.tensor(received, dtype=torch.float64)
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        line = {"what": what, "point": point, "processes": dist.get_world_size(), **found}
        print(json.dumps({**line, "model_bytes": float(total), **more}), flush=True)


def process(rank: int, size: int, store: str, points: Points) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(minutes=10), size, rank)
    knn_points(points)
    correction_points(points)
    also_points(points)
    dist.destroy_process_group()


def main() -> None:
    """Print a line a point."""
    points = QUICK if "--quick" in sys.argv else FULL
    for size in [int(word) for word in sys.argv[1:] if word.isdigit()] or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(process, (size, f"{folder}/store", points), nprocs=size)


if __name__ == "__main__":
    main()
