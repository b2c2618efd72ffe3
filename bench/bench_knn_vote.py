"""The vote of the neighbours. Ceiling: a copy that moves the bytes of the indices."""

from functools import partial

import torch

from als_ext.ops import knn_vote
from als_ext.reference.knn_vote import knn_vote as float64_vote
from bench.inputs import COPY, copy_of
from bench.race import NOT_COMPILED, Lineup, Race, compile_peer


def eager(distance, index, label, num_classes):
    """The usual way: one-hot counts by scatter_add, then max."""
    votes = torch.zeros(index.shape[0], num_classes, device=index.device)
    votes.scatter_add_(1, label[index], torch.ones_like(distance))
    best, winner = votes.max(dim=1)
    return winner, best / index.shape[1]


def setup(rows, k, num_classes, quick, device):
    g = torch.Generator().manual_seed(0)
    distance = torch.rand(rows, k, generator=g).to(device)
    index = torch.randint(0, rows, (rows, k), generator=g).to(device)
    label = torch.randint(0, num_classes, (rows,), generator=g).to(device)
    data = (distance, index, label, num_classes)
    want = float64_vote(*data)

    def error(function):
        got = function(*data)[:2]
        wrong = (got[0] != want[0]).float().mean().item()
        return wrong + (got[1] - want[1]).abs().max().item()

    lineup = Lineup("share of wrong winners plus largest error of a share, against float64", 1e-6)
    lineup.ours(partial(knn_vote, *data), partial(error, knn_vote))
    lineup.peer("torch eager", partial(eager, *data), error=partial(error, eager))
    compiled = compile_peer(eager, quick)
    if compiled is None:
        lineup.skip("torch.compile", NOT_COMPILED)
    else:
        lineup.peer("torch.compile", partial(compiled, *data), compiled=True)
    lineup.ceiling(COPY, copy_of(index.numel() * 8, device))
    return lineup


def races(quick):
    rows = 256 if quick else 60_000
    for k, classes in [(10, 10)] if quick else [(10, 10), (50, 10), (500, 10), (50, 1000)]:
        case = f"{rows} rows, k = {k}, {classes} classes"
        yield Race("knn_vote", case, partial(setup, rows, k, classes, quick))
