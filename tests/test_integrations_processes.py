"""Lightning and Hugging Face in several processes: the weights and labels of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import spread_trainers
import torch
from torch import nn

from als_ext.data import IndexedDataset
from als_ext.integrations._relabel import Relabelling, evaluating

pytestmark = pytest.mark.usefixtures("one_thread")


def spread(name, folder):
    """What both processes of one start of torchrun found."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(Path(spread_trainers.__file__)), name, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"found{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "package"), [("lightning", "lightning"), ("hugging_face", "transformers")]
)
def test_several_processes_train_what_one_does(tmp_path, name, package):
    pytest.importorskip(package, reason=f"needs the extra als_ext[{package}]")
    train = getattr(spread_trainers, name)
    want = train(tmp_path)
    assert len(want["history"]["sample"]) > 50
    train(tmp_path, epochs=spread_trainers.STOP)
    (checkpoint,) = [*tmp_path.glob("*.ckpt"), *tmp_path.glob("hf/checkpoint-*")]
    (tmp_path / "stopped").write_text(str(checkpoint))
    for found in spread(name, tmp_path):
        assert "group: expected one of all 2 processes, which share" in found["refused"]
        for kind in ("whole", "resumed", "accumulated"):
            got = found[kind]
            assert torch.equal(got["labels"], want["labels"]), kind
            for key in ("step", "epoch", "sample", "old", "new"):
                assert torch.equal(got["history"][key], want["history"][key]), (kind, key)
            pairs = [(got["log_pi"], want["log_pi"])]
            pairs += zip(got["parameters"], want["parameters"], strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=kind)


def of_the_first(group):
    import torch.distributed as dist

    rank = dist.get_rank(group)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    model[1].running_mean.fill_(rank + 1.0)
    model[1].num_batches_tracked.fill_(rank)
    with evaluating(model, group):
        inside = (model[1].running_mean.clone(), int(model[1].num_batches_tracked))
        assert not model.training
    assert model.training
    return inside, (model[1].running_mean, int(model[1].num_batches_tracked))


def test_all_embed_with_the_buffers_of_the_first(workers):
    for rank, (inside, after) in enumerate(workers.run(3, of_the_first)):
        assert inside[0].tolist() == [1.0, 1.0]
        assert inside[1] == 0
        assert after[0].tolist() == [rank + 1.0] * 2
        assert after[1] == rank


def rows_of(group, n):
    return Relabelling(
        IndexedDataset(torch.zeros(n, 1), torch.zeros(n).long()), 2, 1, 1, None
    ).rows(group)


@pytest.mark.parametrize("n", [3, 10])
def test_each_process_has_its_part_of_the_rows(workers, n):
    parts = workers.run(3, rows_of, n)
    assert [row for part in parts for row in part] == list(range(n))
    assert {len(part) for part in parts} <= {n // 3, n // 3 + 1}
    assert rows_of(None, n) == range(n)
