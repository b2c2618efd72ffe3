"""What torchrun starts in test_distributed_failures.py: one process dies at the first attempt."""

import os
import signal
import sys
from pathlib import Path

import test_distributed_also as also
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import als_ext
from als_ext.checkpoint import load_checkpoint, save_checkpoint

STEPS, BREAK_AT = 12, 6


def main(folder: Path) -> None:
    """What holds the group is gone when this returns: see docs/scale.md."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, y = also.data(torch.float64)
    model = also.network(torch.float64)
    spread = DistributedDataParallel(model)
    optimizer = als_ext.ALSO(
        model.parameters(), group=dist.group.WORLD, batch_size=8, **also.settings({})
    )
    first, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for at, joint in list(enumerate(also.batches(STEPS, 12)))[first:]:
        if at == BREAK_AT and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        also.step(spread, optimizer, x, y, joint.tensor_split(size)[rank], also.same)
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(checkpoint, {**state, "step": at + 1})
    torch.save([first, also.state(model, optimizer)], folder / f"found{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
