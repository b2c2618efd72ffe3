"""The processes of a torch.distributed group: what is checked, summed and gathered over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Facts = dict[str, Any]
# torch 2.13 has a new name for it, and warns of the old one.
_NAMES = ("all_gather_single", "all_gather_into_tensor")
_all_gather: Any = next((getattr(dist, name) for name in _NAMES if hasattr(dist, name)), None)


def all_rows(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Gather the rows of all processes, in their order.

    Args:
        values: [m, ...] of this process, of any dtype; m may differ, the rest not.
        group: the processes; None: all of them. Every one has to call it.

    Returns:
        [sum of m, ...], in every process.

    Raises:
        RuntimeError: torch.distributed is not initialised, or a process is gone.
        TypeError: no tensor.
        ValueError: no rows at all (0-dim), dtypes or row shapes that differ.

    Note:
        Waits for the device. No gradient. Traffic: (processes) x (largest m) rows to each.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from als_ext import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> distributed.all_rows(torch.tensor([3, 5])).tolist()
        [3, 5]
        >>> dist.destroy_process_group()
    """
    processes = Processes(group)

    def check() -> tuple[Facts, Facts]:
        if not isinstance(values, Tensor):
            raise TypeError(f"values: expected a torch.Tensor, got {type(values).__name__}")
        if values.dim() == 0:
            raise ValueError("values: expected at least one dimension, got shape []")
        settings = {"dtype": str(values.dtype), "shape of a row": list(values.shape[1:])}
        return settings, {"rows": values.shape[0]}

    facts = processes.agree(check)
    return processes.gather(values.detach(), [fact["rows"] for fact in facts])


class Processes:
    """A process group, seen from one of its processes.

    Args:
        group: a group that this process belongs to; None: all processes.

    Raises:
        RuntimeError: ``torch.distributed.init_process_group`` was not called.
        ValueError: this process is not in the group.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "group: expected an initialised torch.distributed; call "
                "torch.distributed.init_process_group first"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError("group: expected a group that this process belongs to, got another")
        self.size = dist.get_world_size(self.group)

    def agree(self, check: Callable[[], tuple[Facts, Facts]]) -> list[Facts]:
        """Run a check everywhere, so that a wrong argument on one process is an error on all.

        Args:
            check: returns settings, which have to be the same everywhere, and facts of its own.

        Returns:
            The facts of every process.

        Raises:
            TypeError, ValueError: what the check raised here, or on another process.
            ValueError: a setting that is not the same everywhere.
        """
        own: Exception | None = None
        settings: Facts = {}
        facts: Facts = {}
        try:
            settings, facts = check()
        except (TypeError, ValueError) as error:
            own = error
        found: list[Any] = [None] * self.size
        told = None if own is None else (type(own), str(own))
        dist.all_gather_object(found, (told, settings, facts), group=self.group)
        if own is not None:
            raise own
        for rank, (problem, _, _) in enumerate(found):
            if problem is not None:
                kind, text = problem
                raise kind(f"process {rank}: {text}")
        for rank, (_, other, _) in enumerate(found):
            for name, value in found[0][1].items():
                if other[name] != value:
                    raise ValueError(
                        f"{name}: expected the same on every process, "
                        f"got {value!r} on process 0 and {other[name]!r} on process {rank}"
                    )
        return [facts for _, _, facts in found]

    def sum(self, count: Tensor) -> Tensor:
        """Sum of an integer tensor over all processes; exact."""
        total = count.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """The rows of all processes, in their order: [sum of rows, ...].

        Args:
            values: [rows[rank], ...], the rows here; the other sizes are the same everywhere.
            rows: how many each process has.

        Note:
            Every process receives size * max(rows) rows: the shorter ones are padded.
        """
        longest = max(rows)
        if longest == 0:
            return values
        if min(rows) == longest:
            whole = values.new_empty(self.size * longest, *values.shape[1:])
            self.gather_into(whole, values.contiguous())
            return whole
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: values.shape[0]] = values
        parts = values.new_empty(self.size * longest, *values.shape[1:])
        self.gather_into(parts, padded)
        starts = range(0, self.size * longest, longest)
        return torch.cat([parts[s : s + count] for s, count in zip(starts, rows, strict=True)])

    def gather_into(self, whole: Tensor, own: Tensor) -> None:
        """All-gather of equal parts: ``whole`` [size * m, ...] from ``own`` [m, ...]."""
        _all_gather(whole, own, group=self.group)

    def ring(self, own: Tensor, rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The rows of every process in turn, with its number; those of this one first.

        The next ones are on their way while the caller works on these. Two buffers of max(rows)
        are all that is held beside ``own``.

        Args:
            own: [rows[rank], D], contiguous.
            rows: how many each process has.
        """
        here, longest = own, max(rows)
        buffers: list[Tensor] = []
        for step in range(self.size):
            source = (self.rank - step) % self.size
            works: list[Any] = []
            coming = here
            if step + 1 < self.size:
                if len(buffers) < 2:
                    buffers.append(own.new_empty(longest, *own.shape[1:]))
                coming = buffers[step % 2][: rows[(source - 1) % self.size]]
                works = self._pass_on(here, coming)
            yield source, here
            for work in works:
                work.wait()
            here = coming

    def _pass_on(self, here: Tensor, coming: Tensor) -> list[Any]:
        """Send to the next process and receive from the one before; empty tensors do not travel."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        steps = [(dist.isend, here, after), (dist.irecv, coming, before)]
        operations = [
            dist.P2POp(call, rows, group=self.group, group_peer=peer)
            for call, rows, peer in steps
            if rows.numel() > 0
        ]
        return dist.batch_isend_irecv(operations) if operations else []
