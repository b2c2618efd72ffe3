"""Exact nearest neighbours of rows that are spread over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from als_ext.distributed.processes import Facts, Processes
from als_ext.ops.knn import check_k, check_rows, search

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BLOCK = 1 << 22  # candidates merged in one go: 96 MiB
_LOW = (1 << 32) - 1  # the bits of a row's number in a key


def knn(
    query: Tensor,
    database: Tensor,
    k: int,
    *,
    metric: str = "l2",
    exclude_self: bool = False,
    precision: str = "exact",
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k rows nearest to each query in a database that no process holds as a whole.

    The database is the rows of all processes, in their order: row j of process r has the number
    j + (rows of the processes before r). Shards travel around a ring, the next one while this one
    is searched, and the lists of a query are merged by (distance, index). With
    ``precision="exact"`` the result is that of :func:`als_ext.ops.knn` on one process, to the bit:
    a distance does not depend on the other rows.

    Args:
        query: [Q, D] of this process; as for :func:`als_ext.ops.knn`. Q may differ, and be 0.
        database: [M, D] of this process, on the device of ``query``. M may differ, and be 0.
        k: neighbours per query, at most the rows of all processes (one less with
            ``exclude_self``); at most 2048 on CUDA.
        metric: "l2", "cosine" or "ip".
        exclude_self: row i of this process's query never gets row i of its database.
        precision: "exact" or "fast"; "fast" is about the shard that is searched.
        group: the processes; None: all of them.

    Returns:
        distance [Q, k] float32 and index [Q, k] int64, which counts over all processes.

    Raises:
        RuntimeError: torch.distributed is not initialised, or a process is gone.
        TypeError: as :func:`als_ext.ops.knn`.
        ValueError: as :func:`als_ext.ops.knn`, settings that differ between processes, or more than
            2^32 rows. An argument that is wrong on one process is an error on all.

    Note:
        Every process of the group has to call it. Memory: that of the search, the lists, and two
        shards of the largest size. Traffic: every row passes every process once. docs/scale.md has
        the costs.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from als_ext import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> points = torch.tensor([[0.0], [3.0], [1.0]])
        >>> distributed.knn(points, points, 1, exclude_self=True)[1].tolist()
        [[2], [2], [0]]
        >>> dist.destroy_process_group()
    """
    processes = Processes(group)

    def check() -> tuple[Facts, Facts]:
        rows = check_rows(query, database, metric, exclude_self, precision)
        if database.device != query.device:
            raise ValueError(f"database: expected on '{query.device}', got '{database.device}'")
        settings = {"columns": query.shape[1], "dtype": str(query.dtype), "k": k, "metric": metric}
        settings |= {"exclude_self": bool(exclude_self), "precision": precision}
        return settings, {"rows": rows}

    rows = [int(facts["rows"]) for facts in processes.agree(check)]
    check_k(k, sum(rows) - 1 if exclude_self else sum(rows), query.device)
    if sum(rows) > _LOW + 1:
        raise ValueError(f"database: expected at most 2^32 rows in all, got {sum(rows)}")
    best = query.new_empty(query.shape[0], 0, dtype=torch.int64)
    for source, shard in processes.ring(database.detach().contiguous(), rows):
        alone = exclude_self and source == processes.rank
        width = min(k, shard.shape[0] - alone)
        if width > 0:
            distance, index = search(query, shard, width, metric, alone, precision)
            best = _merge(best, _keys(distance, index + sum(rows[:source])), k)
    return _unpacked(best)


def _keys(distance: Tensor, index: Tensor) -> Tensor:
    """(distance, index) as int64 in the same order, NaN last: the float's bits, then the index."""
    return (_mirrored(distance.view(torch.int32)).long() << 32) | index


def _unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:
    return _mirrored((keys >> 32).int()).view(torch.float32), keys & _LOW


def _mirrored(bits: Tensor) -> Tensor:
    """Negative floats have their magnitude in ascending order: turned round. Its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _merge(one: Tensor, other: Tensor, k: int) -> Tensor:
    """The k smallest of two lists a row, or all if they are fewer."""
    width = min(k, one.shape[1] + other.shape[1])
    out = one.new_empty(len(one), width)
    step = max(1, _BLOCK // (one.shape[1] + other.shape[1]))
    for start in range(0, len(one), step):
        rows = slice(start, start + step)
        both = torch.cat([one[rows], other[rows]], dim=1)
        out[rows] = both.sort(dim=1, stable=True).values[:, :width]  # stable: the faster sort
    return out
