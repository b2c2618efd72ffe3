r"""The first guess at the true labels: the class whose labels survive everywhere alike.

A plurality fails where mistakes depend on where a sample lies: there one wrong label can outnumber
the right one. What such labels still have in common is that a right one survives with about the
same probability everywhere, while wrong ones come and go from place to place.

For the region of a row, its k nearest neighbours and itself, with the counts :math:`c_y` of given
labels and :math:`N = k + 1`, the log-likelihood of the region being of class :math:`z` is

.. math:: \ell(z) = \log\frac{B(c_z + \rho M,\; N - c_z + (1 - \rho) M)}{B(\rho M, (1 - \rho) M)}
   + \log\frac{\Gamma((C-1)\alpha)}{\Gamma((C-1)\alpha + N - c_z)}
   + \sum_{j \ne z} \log\frac{\Gamma(\alpha + c_j)}{\Gamma(\alpha)}

so :math:`c_z` is beta-binomial around :math:`\rho N` (concentration :math:`M`), and the wrong
labels are Dirichlet-multinomial: of any distribution, which is the region's own. Neighbours are
mostly of one class, so :math:`\ell / N` is averaged over neighbourhoods, several times; a row gets
the class with the largest mean. The survival rate :math:`\rho` is the one that makes the labels
likeliest. This project's own procedure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from als_ext.correction.graph import Graph

# The rates tried first; then the share of labels that agree with their row is one, twice.
RATES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
_REFINEMENTS = 2
_CONCENTRATION = 100.0  # M: the rate of a region is within a few hundredths of rho
_SPARSITY = 0.1  # alpha: a region has few kinds of wrong labels
# Labels that are all moved in one way, as by pair noise, are explained as well by the moved classes
# at the rate of the mistakes. This many nats a row speak for the larger rate.
_FAVOUR = 0.17
_FOLDS = 5
_ROUNDS = 3  # of choosing the rate, then the averagings
_BLOCK = 1 << 22  # numbers [n, classes] in one go
_FINE = 1 << 24  # steps of a log-likelihood in a nat; the sum of 10^9 rows stays below 2^63


def surviving_labels(
    graph: Graph, voter: Tensor, num_classes: int, region: int, spread: tuple[int, ...]
) -> tuple[Tensor, float]:
    """A class for every row and the survival rate.

    Args:
        graph: neighbours, at least as many as ``region`` and the largest of ``spread``.
        voter: [n] int64, the given labels; -1 for those that are not to be counted.
        num_classes: C, >= 1.
        region: neighbours that make a region, >= 1.
        spread: neighbours of each averaging, in order; the last ones are left out where that
            predicts labels better.

    Returns:
        int64 [n], and the rate in (0, 1); it is the share of the given labels that are right, as
        far as their regions are of one class.
    """
    if num_classes == 1:
        return torch.zeros_like(voter), RATES[-1]
    counts = _Regions(graph, voter, num_classes, region)
    rates = [rate for rate in RATES if rate >= 1.0 / num_classes]
    hops = len(spread)
    for _ in range(_ROUNDS):
        before, guess = hops, _Guess(-float("inf"), RATES[-1], voter)
        guess = _best(rates, counts, spread[:hops], guess)
        for _ in range(_REFINEMENTS):
            guess = _best([counts.kept(guess.label)], counts, spread[:hops], guess)
        hops, label = _enough_hops(counts, spread, guess.rate)
        if hops == before:
            break
    return label, counts.kept(label)


class _Guess(NamedTuple):
    merit: float
    rate: float
    label: Tensor


def _best(
    rates: Sequence[float], counts: _Regions, spread: tuple[int, ...], guess: _Guess
) -> _Guess:
    """The best of ``guess`` and of what these rates give."""
    for rate, (label, likelihood) in zip(rates, counts.labels(rates, spread), strict=True):
        kept = counts.kept(label)
        merit = likelihood + _FAVOUR * rate
        # Without its own support a rate explains every region by a class that is not there.
        if rate / 2 <= kept <= rate * 2 and merit > guess.merit:
            guess = _Guess(merit, rate, label)
    return guess


def _enough_hops(counts: _Regions, spread: tuple[int, ...], rate: float) -> tuple[int, Tensor]:
    """How many averaging steps to make, and the guess after them.

    Too few leave the guess to chance, too many drown small classes.

    Taken are those after which a label that was hidden is guessed most often, times the share of
    neighbours that are guessed alike: a wrong label that rules a neighbourhood is easily guessed,
    but it ends where the neighbourhood does.
    """
    guesses = counts.labels_by_hop(rate, spread)
    if len(spread) == 1:
        return 1, guesses[0]
    voter = counts.voter
    found = torch.zeros(len(spread), dtype=torch.int64, device=voter.device)
    fold = counts.folds()
    for number in range(_FOLDS):
        hidden = (fold == number) & (voter >= 0)
        for hop, label in enumerate(counts.without(hidden).labels_by_hop(rate, spread)):
            found[hop] += (label == voter)[hidden].sum()
    total = counts.sum(found).tolist()
    merit = [n * counts.alike(label) for n, label in zip(total, guesses, strict=True)]
    best = max(range(len(spread)), key=merit.__getitem__)
    return best + 1, guesses[best]


class _Regions:
    """Counts of the given labels around every row."""

    def __init__(self, graph: Graph, voter: Tensor, num_classes: int, region: int) -> None:
        n = len(graph)
        self._graph, self.voter, self._num_classes = graph, voter, num_classes
        self._region = region
        width = max(1, _BLOCK // graph.size)  # classes at a time, the same in all processes
        self._blocks = [
            torch.arange(start, min(start + width, num_classes), device=voter.device)
            for start in range(0, num_classes, width)
        ]
        self._size = torch.zeros(n, 1, dtype=torch.float64, device=voter.device)
        self._everything = torch.zeros_like(self._size)  # the sum over all classes
        for block in self._blocks:
            count = self._count(block)
            self._size += count.sum(dim=1, keepdim=True)
            self._everything += _log_rising(_SPARSITY, count).sum(dim=1, keepdim=True)

    def _count(self, block: Tensor) -> Tensor:
        own = (self.voter[:, None] == block).float()
        return self._graph.total(own, self._region).double()

    def labels(self, rates: Sequence[float], spread: tuple[int, ...]) -> list[tuple[Tensor, float]]:
        """For each rate the likeliest class of every row, and the mean of its log-likelihood."""
        best = [_Likeliest(self.voter) for _ in rates]
        for block in self._blocks:
            count = self._count(block)  # once for all rates; kept, it would be n x C numbers
            for likeliest, rate in zip(best, rates, strict=True):
                *_, mean = self._means(count, rate, spread)
                likeliest.see(block, mean)
        return [(likeliest.label, self._mean(likeliest.value)) for likeliest in best]

    def labels_by_hop(self, rate: float, spread: tuple[int, ...]) -> list[Tensor]:
        """The likeliest class of every row after each of the averagings."""
        best = [_Likeliest(self.voter) for _ in spread]
        for block in self._blocks:
            means = self._means(self._count(block), rate, spread)
            for likeliest, mean in zip(best, means, strict=True):
                likeliest.see(block, mean)
        return [likeliest.label for likeliest in best]

    def _means(self, count: Tensor, rate: float, spread: tuple[int, ...]) -> Iterator[Tensor]:
        mean = self._likelihood(count, rate)
        for k in spread:
            mean = self._graph.mean(mean, k)
            yield mean

    def _likelihood(self, count: Tensor, rate: float) -> Tensor:
        others = self._size - count
        right, wrong = rate * _CONCENTRATION, (1.0 - rate) * _CONCENTRATION
        log = _log_rising(right, count) + _log_rising(wrong, others)
        log -= _log_rising(_CONCENTRATION, self._size)
        log += self._everything - _log_rising(_SPARSITY, count)
        log -= _log_rising(_SPARSITY * (self._num_classes - 1), others)
        return (log / self._size.clamp_min(1.0)).float()

    def _mean(self, value: Tensor) -> float:
        """Mean over all rows, in fixed point: the same in any order, so for any shards."""
        steps = (value.double() * _FINE).round_().to(torch.int64).sum()
        return int(self.sum(steps)) / (_FINE * self._graph.size)

    def sum(self, count: Tensor) -> Tensor:
        """The sum over all rows, from that over the rows here."""
        return self._graph.rows.sum(count)

    def folds(self) -> Tensor:
        """Which fold each row is in, uint8 [n]; drawn for all rows, wherever they are."""
        generator = torch.Generator().manual_seed(0)
        fold = torch.randint(_FOLDS, (self._graph.size,), generator=generator, dtype=torch.uint8)
        first = self._graph.first
        return fold[first : first + len(self._graph)].to(self.voter.device)

    def without(self, hidden: Tensor) -> _Regions:
        """The counts without the labels of these rows, bool [n]."""
        seen = self.voter.masked_fill(hidden, -1)
        return _Regions(self._graph, seen, self._num_classes, self._region)

    def alike(self, label: Tensor) -> float:
        """Share of the neighbours of a region, over all rows, with the label of the row."""
        return self._graph.alike(label, self._region)

    def kept(self, label: Tensor) -> float:
        """Share of the given labels that agree with ``label``, within the rates tried."""
        counted = self.voter >= 0
        both = torch.stack([(label == self.voter)[counted].sum(), counted.sum()])
        agreeing, all_counted = self.sum(both).tolist()
        share = int(agreeing) / max(1, int(all_counted))
        return min(max(share, RATES[0]), RATES[-1])


class _Likeliest:
    """The class of the largest value of every row, over classes that come in blocks."""

    def __init__(self, like: Tensor) -> None:
        self.label = torch.zeros_like(like)
        self.value = torch.full_like(like, -float("inf"), dtype=torch.float32)

    def see(self, block: Tensor, values: Tensor) -> None:
        """Values [n, b] of the classes ``block`` [b]; the first of equals stays."""
        value, at = values.max(dim=1)
        better = value > self.value
        self.value = torch.where(better, value, self.value)
        self.label = torch.where(better, block[at], self.label)


def _log_rising(start: float, count: Tensor) -> Tensor:
    """log Γ(start + count) / Γ(start)."""
    base = torch.lgamma(torch.tensor(start, dtype=torch.float64, device=count.device))
    return torch.lgamma(count + start) - base
