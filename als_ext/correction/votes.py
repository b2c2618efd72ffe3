"""Votes of neighbours, and what Bayes' rule makes of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from als_ext.correction.graph import Graph
from als_ext.correction.suspects import noise_channel


class Vote(NamedTuple):
    """What the neighbours of each sample say."""

    winner: Tensor  # [n] int64, -1 where nobody voted
    share: Tensor  # [n] float32, of the votes
    margin: Tensor  # [n] float32, over the best other class; negative where Bayes overrules it
    log_odds: Tensor  # [n] float32, nats for the winner against the given label
    channel: Tensor  # [C, C] float64, P(given | true) that was found


def bayes_vote(
    graph: Graph,
    voter: Tensor,
    given: Tensor,
    channel: Tensor,
    k: int,
    smoothing: float,
    heard: Tensor | None = None,
) -> Vote:
    """The likeliest class w: log (s_w + a) + log T[w, y], and for w != y what the score says.

    Args:
        graph: neighbours.
        voter: [n] int64, labels of those who vote, -1 for the others.
        given: [n] int64, the given labels y.
        channel: [C, C] float64, P(given = column | true = row).
        k: neighbours that vote.
        smoothing: a, added to the shares s.
        heard: [n] float64, nats for "the given label is wrong"; None for nothing.
    """
    num_classes = channel.shape[0]
    seen = channel.log().T.contiguous()  # [given, true]
    winner = torch.empty_like(given)
    share, margin, odds = (torch.empty_like(given, dtype=torch.float32) for _ in range(3))
    for rows, count in graph.votes(voter, num_classes, k):
        total = count.sum(dim=1, keepdim=True)
        shares = count.double() / total.clamp_min(1)
        own = given[rows, None]
        evidence = (shares + smoothing).log() + seen[given[rows]]
        if heard is not None:
            evidence += heard[rows, None]
            evidence.scatter_add_(1, own, -heard[rows, None])
        best, which = evidence.max(dim=1, keepdim=True)
        winner[rows] = which[:, 0].masked_fill(total[:, 0] == 0, -1)
        odds[rows] = (best - evidence.gather(1, own))[:, 0].masked_fill(total[:, 0] == 0, 0.0)
        mine = shares.gather(1, which)
        share[rows] = mine[:, 0].float()
        margin[rows] = (mine - shares.scatter(1, which, 0.0).amax(1, keepdim=True))[:, 0].float()
    return Vote(winner, share, margin, odds, channel)


def plain_vote(
    graph: Graph, voter: Tensor, given: Tensor, num_classes: int, k: int, smoothing: float
) -> Vote:
    """The plurality; ties go to the lower class. Its log odds are those of :func:`bayes_vote`."""
    flat = torch.ones(num_classes, num_classes, dtype=torch.float64, device=given.device)
    vote = bayes_vote(graph, voter, given, flat, k, smoothing)
    voted = vote.winner >= 0
    channel = noise_channel(vote.winner[voted], given[voted], num_classes, rows=graph.rows)
    winner = vote.winner.clamp_min(0)
    ratio = channel[winner, given].log() - channel[given, given].log()
    odds = (vote.log_odds + ratio).masked_fill(~voted | (winner == given), 0.0).float()
    return vote._replace(log_odds=odds, channel=channel)
