"""knn against the ways it is done today. Ceiling: the matrix product of the same shape alone."""

import functools

import pytest
import torch

from als_ext.ops import knn
from als_ext.reference.knn import knn as float64_knn

STEP = 2048  # queries at a time for peers that make a Q x M matrix


def in_batches(step, query, *args):
    return [torch.cat(p) for p in zip(*[step(q, *args) for q in query.split(STEP)], strict=True)]


def cdist_topk(query, database, k):
    return torch.cdist(query, database).topk(k, dim=1, largest=False)


def product(query, database):
    """What no exact method that multiplies can undercut: the scores, written and thrown away."""
    for part in query.split(STEP):
        part @ database.T


def sklearn_brute(database, k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    model = neighbors.NearestNeighbors(n_neighbors=k, algorithm="brute").fit(database.numpy())
    return lambda query: model.kneighbors(query.numpy())


def faiss_flat(database):
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(database.shape[1])
    index.add(database.numpy())
    return index


def ordered(points, query, order):
    if order == "random":
        return points
    far = (points - query[0]).square().sum(dim=1)
    return points[far.argsort(descending=order == "farthest first")]


@pytest.mark.parametrize(
    ("dim", "k", "order"),
    [
        (128, 10, "random"),
        (128, 10, "nearest first"),
        (128, 10, "farthest first"),
        (128, 100, "random"),
        (128, 500, "random"),
        (8, 10, "random"),
        (768, 10, "random"),
    ],
)
def test_knn(race, device, dim, k, order):
    queries, rows = race.size(2_000, 64), race.size(60_000, 600)
    g = torch.Generator().manual_seed(0)
    query = torch.randn(queries, dim, generator=g)
    database = ordered(torch.randn(rows, dim, generator=g), query, order)
    query, database = query.to(device), database.to(device)
    compiled = torch.compile(cdist_topk) if not race.smoke else cdist_topk
    contenders = {
        "ours": lambda: knn(query, database, k),
        "ours, fast": lambda: knn(query, database, k, precision="fast"),
        "cdist + topk": lambda: in_batches(cdist_topk, query, database, k),
        "torch.compile": lambda: in_batches(compiled, query, database, k),
        "product alone (ceiling)": lambda: product(query, database),
    }
    if device.type == "cpu":
        contenders["scikit-learn"] = functools.partial(sklearn_brute(database, k), query)
        index = faiss_flat(database)
        if index is not None:
            contenders["faiss"] = lambda: index.search(query.numpy(), k)
    got, want = knn(query[:20], database, k), float64_knn(query[:20], database, k)
    wrong = (got[1] != want[1]).sum() + (got[0] != want[0]).sum()
    race(contenders, error=wrong.item(), limit=0)
