r"""Given labels that neighbours dispute: whether they are evidence, and what holds without them.

Bayes' rule lets a given label win where neighbours are of two minds, and where classes overlap that
is right. It is wrong where mistakes gather in just these places, as when annotators fail at what is
hard: one confuses what lies between two classes, and does not what lies in their midst. Graph and
labels look the same in both cases. What tells them apart is who can be believed from afar: a linear
classifier, learned where first guess and given label agree, draws a straight border through what
lies between. Right labels follow it more often than mistakes do. This project's own procedure.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from als_ext.correction.clusters import explained_anywhere, named_clusters
from als_ext.correction.config import (
    CorrectionConfig,
    local_neighbours,
    neighbours_that_vote,
)
from als_ext.correction.graph import Graph
from als_ext.correction.votes import plain_vote

_WORTH = 0.05  # of the samples are in question, or nothing is to be gained
_FOLLOWED = 0.2  # of them follow the classifier, or their labels are no evidence
_RIDGE = 1e-3  # of the mean square of a feature
_WIDTH = 512  # features that the classifier has; of more, random combinations
_FAR = 300  # neighbours that vote at first, of which only those with an undisputed label do
_STEPS = 10  # votes of the nearest after that
_NAMED = range(3, 21)  # classes with which clusters are asked: of two, all wrong ones point to one
_MOSTLY = 0.5  # of the given labels are not the class of their cluster
_BLOCK = 1 << 22  # numbers looked at in one go


def labels_are_evidence(
    x: Tensor, given: Tensor, guess: Tensor, winner: Tensor, num_classes: int
) -> bool:
    """Whether given labels are to be believed where the first guess says otherwise.

    In question are the samples of which Bayes' rule took the given label against the first guess.
    A ridge regression on the classes of the samples where both agree, each class with the same
    weight, scores the two for each; the labels are evidence if enough of them have the higher
    score, or if few samples are in question.

    Args:
        x: [n, D] float32, embeddings; their lengths are not looked at.
        given: [n] int64, the given labels.
        guess: [n] int64, the first guess.
        winner: [n] int64, what Bayes' rule made of both.
        num_classes: C.

    Returns:
        True also where all or none of the samples are in dispute.

    Note:
        With d = min(D, 512): n d (d + D + 2 C) multiplications and 16 d² bytes, in float64. It
        waits for the device.
    """
    agreed = guess == given
    asked = ~agreed & (winner == given)
    count = int(asked.sum())
    if count < max(1, _WORTH * len(given)) or not bool(agreed.any()):
        return True
    classifier = _LinearClassifier(x, given, agreed, num_classes)
    followed = 0
    for rows in classifier.blocks(asked):
        score = classifier(rows)
        own, other = (score.gather(1, label[rows, None]) for label in (given, guess))
        followed += int((own > other).sum())
    return followed >= _FOLLOWED * count


class PropagatedLabels(NamedTuple):
    """Labels where given ones are no evidence."""

    label: Tensor  # int64 [n]
    origin: Tensor  # int64 [n], labels that have the classes that these are to have


def propagated_labels(
    x: Tensor, given: Tensor, guess: Tensor, num_classes: int, config: CorrectionConfig
) -> PropagatedLabels:
    """Labels that hold where given ones are no evidence (:func:`labels_are_evidence`).

    They spread from where first guess and given label agree: first the plurality of many
    neighbours, of those that agree alone; then ten times that of the nearest, all of them. Where
    most given labels are not the class of their cluster (:mod:`als_ext.correction.clusters`) the
    ten votes start from the classes of the clusters: if every given class has a cluster, and wrong
    labels point to near clusters rather than anywhere.

    Votes smooth a border in the way of a majority, whatever is given there, and may lose a class
    that is much smaller than the others.

    Args:
        x: [n, D] float32, embeddings.
        given: [n] int64, the given labels.
        guess: [n] int64, the first guess.
        num_classes: C.
        config: settings of the graph.

    Note:
        The neighbours take 12 n k bytes, k being up to 300, the clusters 24 n C. These are asked
        where 3 to 20 classes are given.
    """
    n, present = len(given), len(torch.unique(given))
    far = min(_FAR, local_neighbours(n, present))
    near = neighbours_that_vote(config.k, n, present)
    graph = Graph(x, max(far, near), config.metric, config.precision)

    def voted(label: Tensor, voter: Tensor, k: int) -> Tensor:
        vote = plain_vote(graph, voter, given, num_classes, k, config.vote_smoothing)
        return torch.where(vote.winner < 0, label, vote.winner)

    origin = _class_of_cluster(graph, x, given, config.metric)
    if origin is not None:
        label = origin
    else:
        origin, label = guess, voted(guess, given.masked_fill(given != guess, -1), far)
    for _ in range(_STEPS):
        label = voted(label, label, near)
    return PropagatedLabels(label, origin)


def _class_of_cluster(graph: Graph, x: Tensor, given: Tensor, metric: str) -> Tensor | None:
    """The class of the cluster of each sample, where clusters are to be heard."""
    classes = torch.unique(given)
    if len(classes) not in _NAMED:
        return None
    label, wrong, explained = named_clusters(graph, x, given, metric)
    if wrong <= _MOSTLY or explained <= explained_anywhere(label, given):
        return None
    return label if bool(torch.isin(classes, label).all()) else None


class _LinearClassifier:
    """Least squares on one-hot classes of the ``known`` rows, a ridge on what is not a constant."""

    def __init__(self, x: Tensor, label: Tensor, known: Tensor, num_classes: int) -> None:
        self._x, self._mix = x, None
        width = x.shape[1]
        if width > _WIDTH:
            generator = torch.Generator().manual_seed(0)
            mix = torch.randn(width, _WIDTH, generator=generator, dtype=torch.float32)
            self._mix, width = mix.to(x.device) / _WIDTH**0.5, _WIDTH
        self._step = max(1, _BLOCK // max(x.shape[1], num_classes))
        # A class of few samples would lose its side of the border to a large one.
        size = torch.bincount(label[known], minlength=num_classes).double()
        gram = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=x.device)
        moment = torch.zeros(width + 1, num_classes, dtype=torch.float64, device=x.device)
        for rows in self.blocks(known):
            part = self._features(rows)
            weighted = part / size[label[rows], None]
            gram += weighted.T @ part
            moment += weighted.T @ F.one_hot(label[rows], num_classes).double()
        gram.diagonal()[:-1].add_(_RIDGE * gram.diagonal()[:-1].mean())
        self._weight = torch.linalg.solve(gram, moment)

    def blocks(self, mask: Tensor) -> tuple[Tensor, ...]:
        """The rows of a mask, bool [n], some at a time."""
        return torch.split(mask.nonzero()[:, 0], self._step)

    def _features(self, rows: Tensor) -> Tensor:
        unit = F.normalize(self._x[rows], dim=1)
        if self._mix is not None:
            unit = unit @ self._mix
        return F.pad(unit.double(), (0, 1), value=1.0)  # a constant, for the offsets

    def __call__(self, rows: Tensor) -> Tensor:
        """Scores of these rows, float64 [B, C]."""
        scores: Tensor = self._features(rows) @ self._weight
        return scores
