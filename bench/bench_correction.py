"""The neighbour work of label correction against cleanlab's, on embeddings.

Two things that cleanlab 2.9 does with embeddings. Its neighbour graph (Datalab: outliers,
duplicates, ...) is ``create_knn_graph_and_index``: scikit-learn's NearestNeighbors, metric cosine
above three dimensions, then exact duplicates found by ``np.unique``; raced against ``knn`` with the
same metric and k. Its label issues from embeddings are the class shares of
``KNeighborsClassifier(k + 1).predict_proba``, Euclidean, the sample itself among its neighbours;
raced against ``knn`` and ``knn_vote``, counted the same way. What both do with the shares
afterwards is not raced.
"""

from functools import partial

import torch

from als_ext.ops import knn, knn_vote
from als_ext.reference.knn import knn as float64_knn
from bench.bench_knn import product
from bench.race import Lineup, Race

K, CLASSES, CHECKED = 10, 10, 50


def clustered(rows, dim):
    """Embeddings as a network gives them: ten clusters, a fifth of the labels wrong."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(0, CLASSES, (rows,), generator=g)
    x = torch.randn(rows, dim, generator=g) + 3 * torch.randn(CLASSES, dim, generator=g)[truth]
    other = torch.randint(0, CLASSES, (rows,), generator=g)
    return x, torch.where(torch.rand(rows, generator=g) < 0.2, other, truth)


def setup_graph(rows, dim, device):
    x, _ = clustered(rows, dim)
    want = float64_knn(x[:CHECKED], x, K, metric="cosine", exclude_self=True)[1]

    def error(got):
        return (torch.as_tensor(got)[:CHECKED] != want).float().mean().item()

    ours = partial(knn, x, x, K, metric="cosine", exclude_self=True)
    lineup = Lineup("share of neighbours out of set or order, against float64", 0.0)
    lineup.ours(ours, lambda: error(ours()[1]))
    try:
        from cleanlab.internal.neighbor.knn_graph import create_knn_graph_and_index

        graph = partial(create_knn_graph_and_index, x.numpy(), n_neighbors=K)
        lineup.peer("cleanlab", lambda: graph(), error=lambda: error(neighbours(graph()[0])))
    except ImportError:
        lineup.skip("cleanlab", "cleanlab is not installed")
    lineup.ceiling("float32 product", product(x, x))
    return lineup


def neighbours(graph):
    return graph.indices.reshape(graph.shape[0], -1)


def setup_vote(rows, dim, device):
    x, label = clustered(rows, dim)

    def ours():
        return knn_vote(*knn(x, x, K + 1), label, CLASSES)

    counts = torch.zeros(CHECKED, CLASSES)
    nearest = label[float64_knn(x[:CHECKED], x, K + 1)[1]]
    counts.scatter_add_(1, nearest, torch.ones(CHECKED, K + 1))
    want = counts.amax(dim=1) / (K + 1)  # a tie has one share, whoever wins it

    def error(share):
        return (torch.as_tensor(share)[:CHECKED].float() - want).abs().max().item()

    lineup = Lineup("largest error of the winner's share, against float64 neighbours", 1e-6)
    lineup.ours(ours, lambda: error(ours()[1]))
    try:
        from sklearn.neighbors import KNeighborsClassifier

        def shares():  # cleanlab.datalab: LabelIssueManager.find_issues
            model = KNeighborsClassifier(n_neighbors=K + 1).fit(x.numpy(), label.numpy())
            return model.predict_proba(x.numpy())

        lineup.peer("cleanlab", shares, error=lambda: error(shares().max(axis=1)))
    except ImportError:
        lineup.skip("cleanlab", "scikit-learn, which it calls here, is not installed")
    lineup.ceiling("float32 product", product(x, x))
    return lineup


def races(quick):
    rows, dim = (400, 24) if quick else (10_000, 128)
    size = f"{rows} × {dim}, k = {K}"
    yield Race(
        "correction", f"neighbour graph, cosine, {size}", partial(setup_graph, rows, dim), True
    )
    yield Race(
        "correction", f"neighbours and votes, l2, {size}", partial(setup_vote, rows, dim), True
    )
