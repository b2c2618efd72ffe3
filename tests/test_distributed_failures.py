"""A process that dies or hangs: the others end with an error in bounded time; a resume works."""

import os
import signal
import time
from datetime import timedelta

import pytest
import test_distributed_also as also
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from workers import torchrun

import als_ext
from als_ext.checkpoint import load_checkpoint, save_checkpoint

SIZE, BROKEN = 3, 1
# Of the group. A process that is gone is noticed without it, one that hangs by it alone.
TIMEOUT_S = {signal.SIGKILL: 600, signal.SIGSTOP: 10}
BOUND_S = 90  # far above what it takes on a busy machine, far below the longer one of these
SAVE_AT, BREAK_AT = 4, 6


def train(rank, folder, broken):
    x, y = also.data(torch.float64)
    model = also.network(torch.float64)
    spread = DistributedDataParallel(model)
    optimizer = als_ext.ALSO(
        model.parameters(), group=dist.group.WORLD, batch_size=8, **also.settings({})
    )
    for at, joint in enumerate(also.batches(12, 12)):
        if at == SAVE_AT and rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(folder / "checkpoint.pt", state)
        if at == BREAK_AT:
            broken()
        also.step(spread, optimizer, x, y, joint.tensor_split(SIZE)[rank], also.same)


def search(rank, folder, broken):
    x = torch.randn(50, 4)
    als_ext.distributed.knn(x, x, 3)
    broken()
    als_ext.distributed.knn(x, x, 3)


def correct(rank, folder, broken):
    from als_ext.correction import survival

    counts = survival._Regions._count

    def breaking(*arguments):  # in the midst of it, between two exchanges
        broken()
        return counts(*arguments)

    survival._Regions._count = breaking
    als_ext.correct_labels(
        torch.randn(50, 4), torch.randint(0, 3, (50,)), num_classes=3, group=dist.group.WORLD
    )


def run(rank, folder, how, work):
    torch.set_num_threads(1)

    def broken():
        if rank == BROKEN:
            os.kill(os.getpid(), how)

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=TIMEOUT_S[how]),
    )
    (folder / f"ready{rank}").touch()
    try:
        work(rank, folder, broken)
    except RuntimeError as error:
        (folder / f"error{rank}").write_text(str(error))
        os._exit(7)
    os._exit(0)


def break_one(folder, how, work):
    """Seconds until the others have ended, which they must with an error."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=run, args=(r, folder, how, work)) for r in range(SIZE)]
    for process in processes:
        process.start()
    try:
        end = time.monotonic() + 180
        while len(list(folder.glob("ready*"))) < SIZE and time.monotonic() < end:
            time.sleep(0.05)
        begun = time.monotonic()
        for rank, process in enumerate(processes):
            if rank != BROKEN:
                process.join(timeout=BOUND_S)
                assert process.exitcode == 7, f"process {rank}: exit code {process.exitcode}"
                assert (folder / f"error{rank}").read_text()
        return time.monotonic() - begun
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize(
    ("how", "work"),
    [(signal.SIGKILL, search), (signal.SIGSTOP, correct)],
    ids=["killed in knn", "hanging in correct_labels"],
)
def test_the_others_end_with_an_error(tmp_path, how, work):
    assert break_one(tmp_path, how, work) < BOUND_S


def resume(group, folder):
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    x, y = also.data(torch.float64)
    model = also.network(torch.float64)
    optimizer = als_ext.ALSO(model.parameters(), group=group, batch_size=8, **also.settings({}))
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    spread = DistributedDataParallel(model, process_group=group)
    for joint in also.batches(12, 12)[SAVE_AT:]:
        index = joint.tensor_split(2)[dist.get_rank(group)]
        also.step(spread, optimizer, x, y, index, also.same)
    return also.state(model, optimizer)


def test_a_killed_run_goes_on_with_fewer_processes(tmp_path, workers):
    assert break_one(tmp_path, signal.SIGKILL, train) < BOUND_S
    found = workers.run(2, resume, tmp_path)
    also.assert_same(found, also.alone(also.batches(12, 12)), also.CLOSE[torch.float64])


def test_torchrun_starts_it_again(tmp_path):
    """As docs/scale.md says, the variable included."""
    options = ["--max-restarts=1"]
    done = torchrun(
        "restarted.py", tmp_path, options=options, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"
    )
    assert "failed (exitcode: -9)" in done.stderr
    found = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    assert found[0][0] == found[1][0] > 0  # it went on, from where it was
    want = also.alone(also.batches(12, 12))
    also.assert_same([state for _, state in found], want, also.CLOSE[torch.float64])
