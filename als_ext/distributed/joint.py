"""The batches that the processes of a group hold in one step, as one batch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from als_ext.distributed.processes import Facts, Processes
from als_ext.ops._checks import check_choice, check_int
from als_ext.ops.pi_step import NO_INDEX

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REPEATS = ("once", "add")


class JointBatch:
    """What a step needs to know of the batches of the other processes, by one all-gather.

    Sizes do not travel, since the host would have to wait for them: every batch is padded to
    ``batch_size`` with ``NO_INDEX``.

    Args:
        group: the processes of a step.
        batch_size: the most samples that one of them has, the same everywhere.
        repeats: "once": of equal indices the first counts; "add": all of them do.
        settings: of what is stepped; they have to be the same everywhere.
    """

    def __init__(
        self, group: ProcessGroup, batch_size: int | None, repeats: str, settings: Facts
    ) -> None:
        if batch_size is None:
            raise ValueError(
                "batch_size: expected, with a group, the most samples of a process in a step, "
                "got None"
            )
        check_int("batch_size", batch_size, low=1)
        check_choice("repeats", repeats, REPEATS)
        self.processes = Processes(group)
        self._batch_size, self._once = batch_size, repeats == "once"
        settings = {**settings, "batch_size": batch_size, "repeats": repeats}
        self.processes.agree(lambda: (settings, {}))

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.processes.size

    def count(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples of this process's batch count, float64 [B] of 0 and 1, and how many of the
        joint batch do, 0-dim float64."""
        joint = self._gather(self._padded(index))
        counted = self._counted(joint.flatten()).double()
        own = counted.view(joint.shape)[self.processes.rank, : index.shape[0]]
        return own, counted.sum().clamp_min(1.0)

    def gather(
        self, index: Tensor, loss: Tensor, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The joint batch, in the order of the processes: index, loss (float64), found_inf.

        What does not count has the loss 0 and an index that does.
        """
        losses = loss.new_zeros(self._batch_size + 1, dtype=torch.float64)
        losses[: loss.shape[0]] = loss.detach()
        if found_inf is not None:
            losses[-1:] = found_inf
        joint = self._gather(torch.cat([self._padded(index), losses.view(torch.int64)]))
        joint_index = joint[:, : self._batch_size].flatten()
        joint_loss = joint[:, self._batch_size :].contiguous().view(torch.float64)
        if found_inf is not None:
            found_inf = joint_loss[:, -1].amax().float()
        least = joint_index.min()
        some = torch.where(least == NO_INDEX, 0, least)
        losses = joint_loss[:, :-1].flatten()
        losses = torch.where(self._counted(joint_index), losses, 0.0)
        return torch.where(joint_index == NO_INDEX, some, joint_index), losses, found_inf

    def _padded(self, index: Tensor) -> Tensor:
        if index.shape[0] > self._batch_size:
            raise ValueError(
                f"index: expected at most batch_size = {self._batch_size} entries, "
                f"got {index.shape[0]}"
            )
        padded = index.new_full((self._batch_size,), NO_INDEX)
        padded[: index.shape[0]] = index
        return padded

    def _gather(self, own: Tensor) -> Tensor:
        joint = own.new_empty(self.size * own.shape[0])
        self.processes.gather_into(joint, own)
        return joint.view(self.size, -1)

    def _counted(self, index: Tensor) -> Tensor:
        """Which entries of the joint index count, bool."""
        counted = index != NO_INDEX
        if self._once:
            ordered, place = index.sort(stable=True)
            first = torch.ones_like(counted)
            first[1:] = ordered[1:] != ordered[:-1]
            counted &= torch.empty_like(first).scatter_(0, place, first)
        return counted

    def __deepcopy__(self, memo: dict[int, Any]) -> JointBatch:
        return self  # a group is what it is: a copy would be the same one

    def __reduce__(self) -> NoReturn:
        raise TypeError("group: a group of processes cannot be pickled; keep state_dict() instead")


def joint_batch(
    group: ProcessGroup | None, batch_size: int | None, repeats: str, settings: Facts
) -> JointBatch | None:
    """A JointBatch where there is a group; else only checks, so that one script does both.

    Raises:
        ValueError: a batch size without a group, where there are several processes: each would
            keep weights of its own.
    """
    if group is not None:
        return JointBatch(group, batch_size, repeats, settings)
    check_choice("repeats", repeats, REPEATS)
    if batch_size is not None:
        check_int("batch_size", batch_size, low=1)
        started = dist.is_available() and dist.is_initialized()
        size = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1:
            raise ValueError(
                f"group: expected that of the {size} processes, as batch_size is given, got None"
                + ("" if started else "; call torch.distributed.init_process_group first")
            )
    return None
