"""The vote of the neighbours, alone and behind the search. Ceilings: a copy that moves the bytes of
the indices; the products of the search.
"""

from functools import partial

import torch

from als_ext.ops import knn, knn_vote
from als_ext.reference.knn_vote import knn_vote as float64_vote
from bench import peers
from bench.bench_knn import CHECKED, PRODUCT, nearest, points, product
from bench.bench_knn import counts as search_counts
from bench.inputs import COPY, copy_of
from bench.race import NOT_COMPILED, Counts, Lineup, Race, compile_peer

SEARCH, SHARE = "search alone", "search_and_vote_over_search"


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


def setup_search(rows, dim, k, quick, device):
    """A neighbour graph with its votes, which are a kernel of their own: what they add."""
    x = points(rows, dim, 0).to(device, torch.bfloat16)
    label = torch.arange(rows, device=device) % 10

    def ours():
        return knn_vote(*knn(x, x, k, exclude_self=True), label, 10)

    def error():
        distance, index = nearest(rows, rows, dim, "self", "bfloat16", device)
        want = float64_vote(distance[:, :k], index[:, :k], label.cpu(), 10)
        got = [part[:CHECKED].cpu() for part in ours()]
        return (got[0] != want[0]).float().mean().item() + (got[1] - want[1]).abs().max().item()

    lineup = Lineup("share of wrong winners plus largest error of a share, against float64", 1e-6)
    lineup.ours(ours, error)
    lineup.part(SEARCH, partial(knn, x, x, k, exclude_self=True))
    lineup.derive = lambda median: {SHARE: median["ours"] / median[SEARCH]}
    search = peers.load(lineup, peers.FLASHLIB, peers.flashlib, device, quick)
    if search is not None:

        def theirs():
            distance, index = search(x, x, k + 1)
            return eager(distance, index.long(), label, 10)

        lineup.peer(peers.FLASHLIB, theirs)
    lineup.ceiling(PRODUCT["bfloat16"], product(x, x))
    return lineup


def races(quick):
    rows = 256 if quick else 60_000
    for k, classes in [(10, 10)] if quick else [(10, 10), (50, 10), (500, 10), (50, 1000)]:
        case = f"{rows} rows, k = {k}, {classes} classes"
        size = Counts(rows * (k * 12 + 8 + 16), rows * k)
        yield Race("knn_vote", case, partial(setup, rows, k, classes, quick), counts=size)
    rows, dim, k = (300, 24, 4) if quick else (100_000, 128, 10)
    yield Race(
        "knn_vote",
        f"search and vote, D = {dim}, k = {k}, Q = {rows}, self, bfloat16",
        partial(setup_search, rows, dim, k, quick),
        gpu_only=not quick,
        counts=search_counts(rows, rows, dim, k, "bfloat16", True),
        gpu_at_most={SHARE: 1.03},
    )
