"""Values of rows that other processes have, again and again for the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from als_ext.distributed.processes import Processes


class Exchange:
    """Fetches values of the rows that an index names, each row once.

    Who asks for which rows is settled when it is made; then a call moves the values alone.

    Args:
        processes: the group; all of them have to make the same calls.
        rows: how many each process has.
        index: int64 of any shape, numbers of rows over all processes.

    Attributes:
        at: where in what a call returns the rows of ``index`` are; its shape.
    """

    def __init__(self, processes: Processes, rows: Sequence[int], index: Tensor) -> None:
        # Ascending, so the rows of one process after those of another.
        named, self.at = torch.unique(index, return_inverse=True)
        ends = torch.tensor(rows, device=index.device).cumsum(0)
        upto = torch.searchsorted(named, ends)
        asked = upto.diff(prepend=upto.new_zeros(1))
        wanted = torch.empty_like(asked)
        dist.all_to_all_single(wanted, asked, group=processes.group)
        self._processes = processes
        self._received, self._sent = asked.tolist(), wanted.tolist()
        requests = self._move(named, self._sent, self._received)
        self._own = requests - sum(rows[: processes.rank])

    def __call__(self, values: Tensor) -> Tensor:
        """Values of the named rows, from values [rows here, ...] of every process."""
        return self._move(values[self._own], self._received, self._sent)

    def _move(self, out: Tensor, received: list[int], sent: list[int]) -> Tensor:
        into = out.new_empty(sum(received), *out.shape[1:])
        dist.all_to_all_single(into, out, received, sent, group=self._processes.group)
        return into
