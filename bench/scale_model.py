"""What work on several processes costs, by count: docs/scale.md has the derivations.

All figures are those of one process, the rows spread evenly. ``size`` is the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

NEIGHBOURS = 50  # of the graph of a correction
RATES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
TURNS = (5, 5, 5)  # averagings in each turn of choosing rate and averagings, at most
FOLDS, ROUNDS = 5, 6
# Multiply-adds and bytes a second of one process. H100: the search of 65,536 queries (measured on
# one, docs/ops/knn.md), and a 200 Gbit/s link (assumed).
RATES_OF = {"h100": (1.3e14, 25e9)}
PLANS = ((10**6, 1), (10**6, 8), (10**7, 8), (10**8, 64), (10**9, 256), (10**9, 1024))


@dataclass(frozen=True)
class Cost:
    """Of one process: multiply-adds, bytes that come in, bytes held."""

    products: float
    received: float
    held: float


def knn(n: float, dim: int, k: int, size: int, element: int = 4) -> Cost:
    """Exact nearest neighbours of all n rows: every shard comes by once, two are in flight."""
    own = n / size
    shards = 1 + min(2, size - 1)
    return Cost(
        products=n * own * dim,
        received=(n - own) * dim * element,
        held=shards * own * dim * element + 20.0 * k * own,  # lists: their keys, the last search's
    )


def named(n: float, size: int, k: int = NEIGHBOURS) -> float:
    """Rows elsewhere that a process needs for its graph, at most: rows in no order."""
    own = n / size
    return min(n - own, k * own)


def columns(classes: int, turns: tuple[int, ...] = TURNS) -> float:
    """Numbers of 4 bytes that are fetched for each row that is needed.

    One a class for the counts around every row and for each averaging, two for a label.
    """
    rates = sum(rate >= 1 / classes for rate in RATES) + 2
    of_classes = 1 + sum(rates * hops + 3 + 1 + 5 + FOLDS * (2 + 5) for hops in turns)
    labels = 2 * ROUNDS + 5 * len(turns)
    return classes * of_classes + 2.0 * labels


def correction(n: float, classes: int, size: int, turns: tuple[int, ...] = TURNS) -> Cost:
    """The procedure after its graph; adds as products."""
    own, elsewhere, width = n / size, named(n, size), columns(classes, turns)
    return Cost(
        products=width * NEIGHBOURS * own,
        received=4.0 * width * elsewhere,
        held=20.0 * NEIGHBOURS * own + 4.0 * (elsewhere + own) + 156.0 * own,
    )


def also_step(n: float, batch: int, size: int) -> Cost:
    """One step's exchange of indices and losses (without the gradients); pi is whole everywhere."""
    return Cost(
        products=0.0,
        received=(size - 1) * (8.0 * batch + 16.0 * batch + 8.0),
        held=8.0 * n,
    )
