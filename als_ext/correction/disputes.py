r"""Given labels that neighbours dispute: whether they are evidence, and what holds without them.

Bayes' rule lets a given label win where neighbours are of two minds, and where classes overlap that
is right. It is wrong where mistakes gather in just these places, as when annotators fail at what is
hard: one confuses what lies between two classes, and does not what lies in their midst. Graph and
labels look the same in both cases. What tells them apart is who can be believed from afar: a linear
classifier, learned where first guess and given label agree, draws a straight border through what
lies between. Right labels follow it more often than mistakes do. This project's own procedure.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from als_ext.correction.config import (
    CorrectionConfig,
    local_neighbours,
    neighbours_that_vote,
)
from als_ext.correction.graph import Graph

_WORTH = 0.05  # of the samples are in question, or nothing is to be gained
_FOLLOWED = 0.2  # of them follow the classifier, or their labels are no evidence
_RIDGE = 1e-3  # of the mean square of a feature
_FAR = 300  # neighbours that vote at first, of which only those with an undisputed label do
_STEPS = 10  # votes of the nearest after that
_BLOCK = 1 << 22  # numbers looked at in one go


def labels_are_evidence(
    x: Tensor, given: Tensor, guess: Tensor, winner: Tensor, num_classes: int
) -> bool:
    """Whether given labels are to be believed where the first guess says otherwise.

    In question are the samples of which Bayes' rule took the given label against the first guess.
    A ridge regression on the classes of the samples where both agree names one of the two for each;
    the labels are evidence if enough of them are named, or if few samples are in question.

    Args:
        x: [n, D] float32, embeddings; their lengths are not looked at.
        given: [n] int64, the given labels.
        guess: [n] int64, the first guess.
        winner: [n] int64, what Bayes' rule made of both.
        num_classes: C.

    Returns:
        True also where all or none of the samples are in dispute.

    Note:
        Cost: n D (D + 2 C) multiplications, in float64. It waits for the device.
    """
    agreed = guess == given
    asked = ~agreed & (winner == given)
    if int(asked.sum()) < max(1, _WORTH * len(given)) or not bool(agreed.any()):
        return True
    score = _linear_scores(x, agreed, given, asked, num_classes)
    own = score.gather(1, given[asked, None])
    other = score.gather(1, guess[asked, None])
    return float((own > other).double().mean()) >= _FOLLOWED


def propagated_labels(
    x: Tensor, given: Tensor, guess: Tensor, num_classes: int, config: CorrectionConfig
) -> Tensor:
    """Labels that spread from where first guess and given label agree, int64 [n].

    First the plurality of many neighbours, of those that agree alone; then ten times that of the
    nearest, all of them. It smooths a border in the way of a majority, whatever is given there.

    Args:
        x: [n, D] float32, embeddings.
        given: [n] int64, the given labels.
        guess: [n] int64, the first guess.
        num_classes: C.
        config: settings of the graph.
    """
    n = len(given)
    far = min(_FAR, local_neighbours(n, num_classes))
    near = neighbours_that_vote(config.k, n, num_classes)
    graph = Graph(x, max(far, near), config.metric, config.precision)
    trusted = given.masked_fill(given != guess, -1)
    label = _plurality(graph, trusted, guess, num_classes, far)
    for _ in range(_STEPS):
        label = _plurality(graph, label, label, num_classes, near)
    return label


def _plurality(graph: Graph, voter: Tensor, label: Tensor, num_classes: int, k: int) -> Tensor:
    """The class with the most votes, the first of equals; ``label`` where nobody votes."""
    out = torch.empty_like(label)
    for rows, count in graph.votes(voter, num_classes, k):
        votes, which = count.max(dim=1)
        out[rows] = torch.where(votes > 0, which, label[rows])
    return out


def _linear_scores(
    x: Tensor, known: Tensor, label: Tensor, asked: Tensor, num_classes: int
) -> Tensor:
    """Least squares on one-hot classes of the ``known`` rows, float64 [rows asked, C]."""
    step = max(1, _BLOCK // x.shape[1])

    def features(rows: Tensor) -> Tensor:
        unit = F.normalize(x[rows].double(), dim=1)
        return F.pad(unit, (0, 1), value=1.0)  # a constant, for the offsets

    width = x.shape[1] + 1
    gram = torch.zeros(width, width, dtype=torch.float64, device=x.device)
    moment = torch.zeros(width, num_classes, dtype=torch.float64, device=x.device)
    for rows in torch.split(known.nonzero()[:, 0], step):
        part = features(rows)
        gram += part.T @ part
        moment += part.T @ F.one_hot(label[rows], num_classes).double()
    gram.diagonal().add_(_RIDGE * gram.diagonal()[:-1].mean())
    weight = torch.linalg.solve(gram, moment)
    return torch.cat([features(rows) @ weight for rows in torch.split(asked.nonzero()[:, 0], step)])
