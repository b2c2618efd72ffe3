"""bench/scale_model.py counts what moves: compared with what the code fetches and sends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import als_ext
from als_ext.correction import CorrectionConfig, survival
from bench import results_page, scale_model

ROOT = Path(__file__).resolve().parents[1]


def test_constants_are_those_of_the_procedure():
    config = CorrectionConfig()
    assert scale_model.RATES == survival.RATES
    assert scale_model.FOLDS == survival._FOLDS
    assert config.rounds == scale_model.ROUNDS
    assert max(config.spread) == scale_model.NEIGHBOURS
    assert (len(config.spread),) * survival._ROUNDS == scale_model.TURNS


def test_bytes_that_two_processes_move():
    """Those of the loopback interface: no fewer; others may use it, so more proves nothing."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "scale.py"), "--quick", "2"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) == 4
    for point in points:
        assert point["bytes"] >= point["model_bytes"] > 0
    columns = {point["columns"] for point in points if "columns" in point}
    turns = [(5, *rest) for rest in [(), *((h,) for h in range(1, 6))]]
    turns += [(5, a, b) for a in range(1, 6) for b in range(1, 6)]
    assert columns <= {scale_model.columns(10, some) for some in turns}


def received(group, n, dim, batch):
    """Bytes that a search and a step hand to torch.distributed to be filled, by count."""
    from als_ext.distributed import processes

    found, size = {"knn": 0, "step": 0}, dist.get_world_size(group)
    plain = dist.batch_isend_irecv, processes._all_gather

    def passing(operations):
        found["knn"] += sum(op.tensor.nbytes for op in operations if op.op is dist.irecv)
        return plain[0](operations)

    def gathering(whole, own, **options):
        found["step"] += whole.nbytes - own.nbytes
        return plain[1](whole, own, **options)

    dist.batch_isend_irecv, processes._all_gather = passing, gathering
    try:
        x = torch.randn(n // size, dim)
        als_ext.distributed.knn(x, x, 3, exclude_self=True, group=group)
        weights = als_ext.SampleWeights(n, group=group, batch_size=batch)
        index = torch.arange(batch)
        weights.batch_share(index)
        weights.update_(index, torch.rand(batch))
    finally:
        dist.batch_isend_irecv, processes._all_gather = plain
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_by_count(workers, size):
    for found in workers.run(size, received, 600, 16, 32):
        assert found["knn"] == scale_model.knn(600, 16, 3, size).received
        assert found["step"] == scale_model.also_step(600, 32, size).received


def test_the_most_that_can_be_fetched():
    assert scale_model.named(1e6, 1) == 0
    assert scale_model.named(1e6, 2) == 5e5
    assert scale_model.named(1e6, 1000) == 50_000
    assert scale_model.columns(10, (5, 1)) == 1714  # as counted, docs/scale.md


def test_plan_by_hand():
    table = results_page.plan_table("h100").splitlines()
    row = [cell.strip() for cell in table[-1].strip("|").split("|")]
    assert row[:3] == ["10^9", "1,024", "1.2e+17"]
    own = 1e9 / 1024
    assert row[3] == f"{1e9 * own * 128 / 1.3e14:,.0f}"
    assert row[4] == f"{(1e9 - own) * 512 / 1e9:,.0f}"
    assert float(row[6]) == pytest.approx((3 * own * 512 + 1000 * own) / 1e9, rel=0.05)
