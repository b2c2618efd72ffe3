r"""Clusters found without labels, and the classes that explain the given labels best.

Where most labels are wrong no vote finds the right ones, whoever votes. How they are wrong may tell
all the same. Who confuses a sample writes the class that it looks like beside its own: wrong labels
of a cluster point to the clusters around it. So of all ways to name the clusters by classes that is
taken under which the given labels are the likeliest, each being right or pointing to a near
cluster. The walk is a subspace iteration as in spectral clustering (Ng, Jordan, Weiss, NIPS 2001);
naming clusters by what wrong labels point to is this project's own procedure.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from als_ext.correction.graph import Graph

_PER_CLASS = 2  # clusters
_NEAREST = 15  # neighbours that the walk goes to
_WALK, _TURN = 50, 10  # steps, and after how many its vectors are made orthogonal again
_SAMPLE = 6000  # samples that clusters and names are found from
_CLUSTERINGS, _STARTS = 16, 7  # from other first middles; from other first names
_LLOYD = 30
_BLOCK = 1 << 16  # samples looked at in one go
_TEMPERATURE = 0.05
_OTHERWISE = 0.02  # share of labels that neither is right nor points anywhere
_GAIN = 1e-6  # of a mean of log P, or a search might not end
_TINY = 1e-30


class NamedClusters(NamedTuple):
    """Clusters with a class each."""

    label: Tensor  # int64 [n], the class of the cluster of each sample
    wrong: float  # share of the given labels that are not this class, in what was looked at
    explained: float  # mean of log P of these given labels


def named_clusters(graph: Graph, x: Tensor, given: Tensor, metric: str = "cosine") -> NamedClusters:
    r"""Cluster the samples and find the class of each cluster.

    Of the sample :math:`i` in cluster :math:`k` with class :math:`z_k`, the given label is

    .. math:: P(l) = .98 \, (1 - \rho) [l = z_k]
              + .98 \, \rho \, [l \ne z_k] \, r_{il} / \sum_{c \ne z_k} r_{ic} + .02 / C,
              \qquad r_{ic} = \sum_{j: z_j = c} e^{\cos(x_i, \mu_j) / T}

    with :math:`\mu_j` the middle of cluster j, and :math:`\rho` the share of labels that are not
    :math:`z_k`. Names are changed one cluster at a time as long as the mean of :math:`\log P`
    grows, from several beginnings and for several clusterings; the best are taken.

    It holds where two clusters a class are nearly pure and wrong labels point to near clusters.
    Elsewhere names and :math:`\rho` are wrong: :func:`explained_anywhere` tells.

    Args:
        graph: of x.
        x: [n, D] float32, embeddings.
        given: [n] int64, the given labels; C is the number of classes among them.
        metric: that of the graph; cosines are taken about the origin, with "l2" about the mean.

    Note:
        Deterministic. 50 means over 15 neighbours of 2 C numbers a sample, about 24 n C bytes; the
        rest is done on 6,000 samples on the CPU, in a time that grows with C³ (one thread: 10 s
        at C = 10, 80 s at C = 20).
    """
    present, given = torch.unique(given, return_inverse=True)
    count = _PER_CLASS * len(present)
    walk = _walk(graph, count)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(x), generator=generator)[:_SAMPLE].to(x.device)
    seen, unit, label = walk[rows].cpu(), x[rows].cpu(), given[rows].cpu()
    unit = F.normalize(unit - unit.mean(dim=0) if metric == "l2" else unit, dim=1)
    best = -float("inf")
    for _ in range(_CLUSTERINGS):
        middle = _k_means(seen, count, generator)
        cluster = (seen @ middle.T).argmax(dim=1)
        search = _Names(unit, cluster, label, count, len(present))
        starts = [search.plurality, *(search.random(generator) for _ in range(_STARTS))]
        value, name = max((search.climb(start) for start in starts), key=lambda found: found[0])
        if value > best:
            best, middles, names = value, middle, name
            wrong = float((name[cluster] != label).double().mean())
    middles, names = middles.to(x.device), present[names.to(x.device)]
    cluster = torch.cat([(part @ middles.T).argmax(dim=1) for part in torch.split(walk, _BLOCK)])
    return NamedClusters(names[cluster], wrong, best)


def explained_anywhere(label: Tensor, given: Tensor) -> float:
    """Mean of log P of the given labels if a wrong one is any class alike, in nats.

    Names that explain less are not to be trusted: wrong labels do not point where they say.

    Args:
        label: [n] int64, the class that is right.
        given: [n] int64, the given labels.
    """
    classes = len(torch.unique(given))
    right = float((label == given).double().mean())
    spread = _OTHERWISE / classes
    by_right = math.log((1.0 - _OTHERWISE) * right + spread)
    by_wrong = math.log((1.0 - _OTHERWISE) * (1.0 - right) / max(1, classes - 1) + spread)
    return right * by_right + (1.0 - right) * by_wrong


def _walk(graph: Graph, width: int) -> Tensor:
    """Directions that a random walk over the graph leaves last, unit rows [n, width]."""
    vectors = torch.randn(
        len(graph), width, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    vectors[:, 0] = 1.0
    vectors = vectors.to(graph.indices.device)
    for step in range(1, _WALK + 1):
        vectors = graph.mean(vectors, min(_NEAREST, graph.indices.shape[1]))
        if step % _TURN == 0:
            vectors = torch.linalg.qr(vectors).Q
    return F.normalize(vectors, dim=1)


def _k_means(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Middles of clusters of unit rows, unit as well [count, D]: k-means++, then Lloyd's steps."""
    middle = x[torch.randint(len(x), (1,), generator=generator)]
    far = 1.0 - x @ middle[0]
    for _ in range(count - 1):
        new = torch.multinomial(far.clamp_min(0.0) + 1e-9, 1, generator=generator)
        middle = torch.cat([middle, x[new]])
        far = torch.minimum(far, 1.0 - x @ x[new][0])
    for _ in range(_LLOYD):
        nearest = (x @ middle.T).argmax(dim=1)
        middle = F.normalize(torch.zeros_like(middle).index_add_(0, nearest, x), dim=1)
    return middle


class _Names:
    """The classes of clusters that explain the labels best: the search."""

    def __init__(
        self, unit: Tensor, cluster: Tensor, label: Tensor, count: int, num_classes: int
    ) -> None:
        self._cluster, self._label, self._classes = cluster, label, num_classes
        self._inside = F.one_hot(cluster, count).bool()
        near = unit @ F.normalize(self._inside.float().T @ unit, dim=1).T
        near[:, ~self._inside.any(dim=0)] = -float("inf")  # nothing is near what is empty
        self._pull = ((near - near.amax(dim=1, keepdim=True)).double() / _TEMPERATURE).exp()
        votes = torch.bincount(cluster * num_classes + label, minlength=count * num_classes)
        self.plurality = votes.view(count, num_classes).argmax(dim=1)

    def random(self, generator: torch.Generator) -> Tensor:
        """A class for each cluster, all equally likely."""
        return torch.randint(self._classes, self.plurality.shape, generator=generator)

    def climb(self, name: Tensor) -> tuple[float, Tensor]:
        """From these names uphill: the mean of log P, of :func:`named_clusters`, and the names."""
        value, before = float(self._values(name, 0)[name[0]]), -float("inf")
        while value > before:
            before = value
            for cluster in range(len(name)):
                highest, at = self._values(name, cluster).max(dim=0)
                if float(highest) > value + _GAIN:
                    name, value = name.clone(), float(highest)
                    name[cluster] = at
        return value, name

    def _values(self, name: Tensor, cluster: int) -> Tensor:
        """Mean of log P for each class that this cluster may have, the others as named, [C]."""
        classes, inside = torch.arange(self._classes), self._inside[:, cluster, None]
        others = F.one_hot(name, self._classes).double()
        others[cluster] = 0.0
        pull, added = self._pull @ others, self._pull[:, cluster, None]
        named, label = name[self._cluster, None], self._label[:, None]
        own = torch.where(inside, classes, named)  # [m, C] like all that follows
        # Sums without a class, not differences: what is left may be 1e-17 of what is left out.
        rest = pull @ (1.0 - torch.eye(self._classes, dtype=pull.dtype))
        rest = torch.where(inside, rest, rest.gather(1, named) + added * (named != classes))
        pointed = pull.gather(1, label) + added * (~inside & (label == classes))
        right = own == label
        wrong = 1.0 - right.double().mean(dim=0)
        explained = torch.where(right, 1.0 - wrong, wrong * pointed / (rest + _TINY))
        spread = _OTHERWISE / self._classes
        return (explained * (1.0 - _OTHERWISE) + spread).log().mean(dim=0)
