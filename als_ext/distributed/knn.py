"""Exact nearest neighbours of rows that are spread over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from als_ext.distributed.processes import Facts, Processes
from als_ext.ops.knn import check_k, check_rows, search

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BLOCK = 1 << 22  # candidates merged in one go: 64 MiB with their order


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
        ValueError: as :func:`als_ext.ops.knn`, or settings that differ between processes. An
            argument that is wrong on one process is an error on all.

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
    distance = query.new_empty(query.shape[0], 0, dtype=torch.float32)
    index = query.new_empty(query.shape[0], 0, dtype=torch.int64)
    for source, shard in processes.ring(database.detach().contiguous(), rows):
        alone = exclude_self and source == processes.rank
        width = min(k, shard.shape[0] - alone)
        if width < 1:
            continue
        near, at = search(query, shard, width, metric, alone, precision)
        at += sum(rows[:source])
        distance, index = _merge(distance, index, near, at, k) if index.shape[1] else (near, at)
    return distance, index


def _merge(
    distance: Tensor, index: Tensor, near: Tensor, at: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k first of two lists a row by (distance, index); NaN last."""
    width = min(k, index.shape[1] + at.shape[1])
    out = distance.new_empty(len(distance), width), index.new_empty(len(index), width)
    step = max(1, _BLOCK // (index.shape[1] + at.shape[1]))
    for start in range(0, len(index), step):
        rows = slice(start, start + step)
        both, order = torch.cat([index[rows], at[rows]], dim=1).sort(dim=1)
        far, place = (
            torch.cat([distance[rows], near[rows]], dim=1)
            .gather(1, order)
            .sort(dim=1, stable=True)  # equal distances keep the order of the indices
        )
        out[0][rows] = far[:, :width]
        out[1][rows] = both.gather(1, place[:, :width])
    return out
