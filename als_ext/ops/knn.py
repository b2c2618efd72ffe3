"""knn: exact nearest neighbours, ties included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from als_ext.ops._checks import (
    batched_first,
    check_choice,
    check_int,
    check_tensor,
    values_readable,
)

METRICS = ("l2", "cosine", "ip")  # position = the operator's enum
PRECISIONS = ("fast", "exact")  # position = the operator's flag
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CUDA_MAX_K = 2048


def knn(
    query: Tensor,
    database: Tensor,
    k: int,
    *,
    metric: str = "l2",
    exclude_self: bool = False,
    precision: str = "exact",
) -> tuple[Tensor, Tensor]:
    r"""Find the k rows of the database nearest to each query, ascending by (distance, index).

    .. math:: d_{l2} = \sum_j (x_j - y_j)^2, \qquad
              d_{\cos} = 1 - \frac{\langle x, y\rangle}{|x||y|}
                       = \tfrac12 \sum_j \left(\frac{x_j}{|x|} - \frac{y_j}{|y|}\right)^2, \qquad
              d_{ip} = -\langle x, y\rangle

    each summed in float64 in the written form (for cosine the last one, which does not cancel:
    a duplicate is at 0) and rounded to float32. An all-zero row has cosine distance 1 to
    everything.

    ``precision="exact"`` promises the set and the order of exactly these numbers, ties going to
    the lower index: under any shift of the data, zero padding, batch size, order of the database,
    with equal norms and duplicates. bf16 or float32 scores only pick the rows that are
    measured in float64, and a bound on their error decides how many rows that must be.

    Args:
        query: [Q, D] float32, bfloat16, float16 or float64; D >= 1.
        database: [M, D], dtype of ``query``; on its device or, where that is CUDA, in pinned host
            memory (``tensor.pin_memory()``), contiguous: then it may be larger than the device's
            memory. It is copied in parts, each while the one before is searched.
        k: neighbours per query, 1 <= k <= M (M - 1 with ``exclude_self``); k <= 2048 on CUDA.
        metric: "l2" (squared Euclidean), "cosine" or "ip".
        exclude_self: row i of the query never gets row i of the database (by index, not by
            distance); needs Q = M.
        precision: "exact", or "fast", which trusts the float32 scores: a row whose distance differs
            from the k-th by less than about 4 (D + 32) 2^-24 times the product of the two rows'
            distances from the database's mean may be missed (a quarter of that where a CPU scores
            in float32). What is returned carries exact distances in exact order. On CUDA "fast" is
            no faster.

    Returns:
        distance [Q, k] float32 and index [Q, k] int64.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or devices that do not fit, k out of range, and on the CPU a row with a
            NaN or an infinity. On CUDA and inside ``torch.compile``, where looking would wait for
            the device, such a row has distance NaN to everything, and NaN sorts last, by index.

    Note:
        No gradient. Works in ``torch.compile`` with fullgraph and in CUDA graphs. Deterministic to
        the bit, on any number of threads. No Q x M matrix: at most 256 MB beyond inputs and
        outputs for D <= 100,000 (and a copy of an input that is not contiguous).
        A database in pinned memory is read after the call has returned, as by a copy with
        ``non_blocking=True``, and by each replay of a CUDA graph: change it only when the device
        is done. The exact result is that of a database on the device, to the bit.

    Example:
        >>> import torch
        >>> from als_ext.ops import knn
        >>> points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> distance, index = knn(points, points, 2, exclude_self=True)
        >>> index[0].tolist(), distance[0].tolist()
        ([2, 3], [1.0, 1.0])
    """
    rows = check_rows(query, database, metric, exclude_self, precision)
    check_k(k, rows - 1 if exclude_self else rows, query.device)
    return search(query, database, k, metric, exclude_self, precision)


def check_rows(
    query: Tensor, database: Tensor, metric: str, exclude_self: bool, precision: str
) -> int:
    """Check all but k, and return the rows of database."""
    check_tensor("query", query, shape=("Q", "D"), dtypes=DTYPES)
    check_tensor("database", database, shape=("M", query.shape[1]), dtypes=[query.dtype])
    _check_place(query, database)
    if query.shape[1] == 0:
        raise ValueError(f"query: expected at least one column, got shape {list(query.shape)}")
    rows = database.shape[0]
    if exclude_self and query.shape[0] != rows:
        raise ValueError(
            f"query: expected {rows} rows, those of database, with exclude_self, "
            f"got {query.shape[0]}"
        )
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISIONS)
    if values_readable(query):
        _check_finite("query", query)
        if values_readable(database) and database is not query:
            _check_finite("database", database)
    return rows


def check_k(k: int, available: int, device: torch.device) -> None:
    """Check k against the rows that a query may get."""
    check_int("k", k, low=1)
    if k > available:
        raise ValueError(f"k: expected at most {available}, the rows available, got {k}")
    if k > CUDA_MAX_K and device.type == "cuda":
        raise ValueError(f"k: expected at most {CUDA_MAX_K} on CUDA, got {k}")


def search(
    query: Tensor, database: Tensor, k: int, metric: str, exclude_self: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """:func:`knn` without its checks."""
    distance, index = torch.ops.als_ext.knn.default(
        query.detach(),
        database.detach(),
        k,
        METRICS.index(metric),
        exclude_self,
        precision == "exact",
    )
    return distance, index


def _check_place(query: Tensor, database: Tensor) -> None:
    # Whether memory is pinned can be asked of a plain tensor alone; the operator asks again.
    if database.device == query.device:
        return
    streamed = query.is_cuda and database.is_cpu
    if not streamed or (values_readable(database) and not database.is_pinned()):
        pinned = " or in pinned host memory (tensor.pin_memory())" if query.is_cuda else ""
        raise ValueError(
            f"database: expected on '{query.device}'{pinned}, "
            f"got {'pageable memory' if streamed else 'a tensor'} on '{database.device}'"
        )
    if not database.is_contiguous():
        raise ValueError(
            "database: expected contiguous rows in pinned host memory, "
            f"got strides {list(database.stride())}"
        )


def _check_finite(name: str, value: Tensor) -> None:
    # One reduction for the usual case; a sum that overflows is looked at row by row as well.
    wide = value.dtype if value.element_size() > 2 else torch.float32
    if math.isfinite(value.sum(dtype=wide).item()):
        return
    for first in range(0, value.shape[0], 65536):
        bad = ~value[first : first + 65536].isfinite().all(dim=1)
        if bad.any():
            at = first + int(bad.nonzero()[0])
            raise ValueError(f"{name}: expected finite values, got NaN or infinity in row {at}")


@torch.library.register_fake("als_ext::knn")
def _fake(
    query: Tensor, database: Tensor, k: int, metric: int, exclude_self: bool, exact: bool
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int64)


@torch.library.register_vmap("als_ext::knn")
def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    query: Tensor,
    database: Tensor,
    k: int,
    metric: int,
    exclude_self: bool,
    exact: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    batch = info.batch_size
    query = batched_first(query, in_dims[0], batch)
    options = (k, metric, exclude_self, exact)
    if in_dims[1] is None and not exclude_self:  # one database: the batch is just more queries
        distance, index = torch.ops.als_ext.knn.default(query.flatten(0, 1), database, *options)
        shape = (batch, query.shape[1], k)
        return (distance.view(shape), index.view(shape)), (0, 0)
    databases = batched_first(database, in_dims[1], batch)
    each = [torch.ops.als_ext.knn.default(query[b], databases[b], *options) for b in range(batch)]
    distances, indices = zip(*each, strict=True)
    return (torch.stack(distances), torch.stack(indices)), (0, 0)
