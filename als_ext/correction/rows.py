"""Where the rows of a data set are: all in this process, or spread over a group of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from als_ext import distributed, ops
from als_ext.distributed.exchange import Exchange
from als_ext.distributed.processes import Processes


class Lookup(NamedTuple):
    """How to read values of rows by an index: ``fetch(values)[at]``."""

    at: Tensor
    fetch: Callable[[Tensor], Tensor]


class Rows:
    """All rows are here. What looks at one row at a time needs to know no more."""

    def span(self, count: int) -> tuple[int, int]:
        """The number of the first of the ``count`` rows here, and how many there are in all."""
        return 0, count

    def neighbours(self, x: Tensor, k: int, metric: str, precision: str) -> tuple[Tensor, Tensor]:
        """Distance and number of the k rows nearest to each row of x, itself left out."""
        return ops.knn(x, x, k, metric=metric, exclude_self=True, precision=precision)

    def lookup(self, index: Tensor) -> Lookup:
        """How values of the rows that ``index`` numbers are read."""
        return Lookup(index, lambda values: values)

    def everywhere(self, values: Tensor) -> Tensor:
        """Values of all rows, from those of the rows here."""
        return values

    def sum(self, count: Tensor) -> Tensor:
        """The sum over all rows, from that over the rows here; integers, so that it is exact."""
        return count


HERE = Rows()


class SpreadRows(Rows):
    """Each process of a group has some of the rows, in the order of the processes.

    Args:
        processes: the group; all of them have to make the same calls.
        rows: how many each has.
    """

    def __init__(self, processes: Processes, rows: list[int]) -> None:
        self._processes, self._rows = processes, rows

    def span(self, count: int) -> tuple[int, int]:
        """The number of the first row here, and how many all processes have."""
        return sum(self._rows[: self._processes.rank]), sum(self._rows)

    def neighbours(self, x: Tensor, k: int, metric: str, precision: str) -> tuple[Tensor, Tensor]:
        """As :meth:`Rows.neighbours`, over the rows of all processes."""
        return distributed.knn(
            x,
            x,
            k,
            metric=metric,
            exclude_self=True,
            precision=precision,
            group=self._processes.group,
        )

    def lookup(self, index: Tensor) -> Lookup:
        """Fetches each row that ``index`` names once."""
        exchange = Exchange(self._processes, self._rows, index)
        return Lookup(exchange.at, exchange)

    def everywhere(self, values: Tensor) -> Tensor:
        """Gathers them: n values in every process."""
        return self._processes.gather(values, self._rows)

    def sum(self, count: Tensor) -> Tensor:
        """As :meth:`Rows.sum`."""
        return self._processes.sum(count)
