import pytest
import torch
from torch.library import opcheck

from als_ext.ops import knn_vote
from als_ext.reference.knn_vote import knn_vote as knn_vote_reference


def make(rows, k, n, classes, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    distance = torch.rand(rows, k, generator=g).sort(dim=1).values
    index = torch.randint(0, n, (rows, k), generator=g)
    label = torch.randint(0, classes, (n,), generator=g)
    return distance.to(device), index.to(device), label.to(device)


@pytest.mark.parametrize("weighting", ["uniform", "distance", "softmax"])
@pytest.mark.parametrize(
    ("rows", "k", "classes"),
    [(1, 1, 1), (7, 3, 2), (300, 10, 10), (65, 129, 1000), (3, 2048, 5), (513, 33, 100_000)],
)
def test_agrees_with_float64_reference(rows, k, classes, weighting, device):
    distance, index, label = make(rows, k, 1000, classes, device)
    label[::7] = -1
    index[:, 0] = -1
    got = knn_vote(distance, index, label, classes, weighting=weighting)
    want = knn_vote_reference(distance, index, label, classes, weighting=weighting)
    if weighting == "uniform":  # exact counts: ties must break the same way
        assert torch.equal(got[0], want[0])
    else:
        clear = want[2] > 1e-6
        assert torch.equal(got[0][clear], want[0][clear])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[2], want[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("classes", [1, 16, 17, 300])
def test_few_rows_of_many_labels_vote_like_many(classes, k):
    """On the CPU labels are narrowed for many rows and read as they are for few."""
    distance, index, label = make(500, k, 600, classes, "cpu")
    index[::3, 0], label[::5], distance[::4, -1] = -1, -9, float("nan")
    many = knn_vote(distance, index, label, classes, ignore_label=-9)
    for row in (0, 3, 4, 12, 499):
        few = knn_vote(
            distance[row : row + 1], index[row : row + 1], label, classes, ignore_label=-9
        )
        for a, b in zip(few, many, strict=True):
            assert torch.equal(a[0], b[row])


def test_the_cpu_operator_refuses_a_label_out_of_range():
    distance, index, label = make(6, 5, 20, 4, "cpu")
    label[3] = 4
    with pytest.raises(RuntimeError, match=r"label: .*got 4 at position 3"):
        torch.ops.als_ext.knn_vote(distance, index, label, 4, 0, 0.1, -1)


def test_ties_go_to_the_smaller_class(device):
    distance = torch.tensor([[0.1, 0.2, 0.3, 0.4]], device=device)
    index = torch.tensor([[0, 1, 2, 3]], device=device)
    winner, share, margin = knn_vote(distance, index, torch.tensor([2, 1, 1, 2], device=device), 3)
    assert (winner.item(), share.item(), margin.item()) == (1, 0.5, 0.0)


def test_a_row_without_votes_returns_ignore_label(device):
    distance = torch.full((2, 3), float("nan"), device=device)
    distance[1] = 0.5
    index = torch.tensor([[0, 1, 2], [-1, 9, 3]], device=device)
    label = torch.tensor([0, 1, 0, -7], device=device)
    winner, share, margin = knn_vote(distance, index, label, 2, ignore_label=-7)
    assert winner.tolist() == [-7, -7]
    assert share.tolist() == [0.0, 0.0]
    assert margin.tolist() == [0.0, 0.0]


def test_exact_hits_take_the_whole_distance_vote(device):
    distance = torch.tensor([[0.0, 0.5, 0.5]], device=device)
    index = torch.tensor([[0, 1, 2]], device=device)
    label = torch.tensor([1, 0, 0], device=device)
    winner, share, _ = knn_vote(distance, index, label, 2, weighting="distance")
    assert (winner.item(), share.item()) == (1, 1.0)


@pytest.mark.parametrize(("rows", "k"), [(0, 5), (4, 0)])
def test_empty(rows, k, device):
    winner, share, margin = knn_vote(
        torch.empty(rows, k, device=device),
        torch.empty(rows, k, dtype=torch.int64, device=device),
        torch.zeros(3, dtype=torch.int64, device=device),
        2,
    )
    assert winner.tolist() == [-1] * rows
    assert share.tolist() == margin.tolist() == [0.0] * rows


def test_order_of_neighbours_does_not_change_a_bit(device):
    distance, index, label = make(200, 50, 500, 7, device)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1)).to(device)
    a = knn_vote(distance, index, label, 7, weighting="softmax")
    b = knn_vote(distance[:, order], index[:, order], label, 7, weighting="softmax")
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.cuda
@pytest.mark.parametrize("k", [2049, 4096])
def test_the_longest_rows_on_cuda(k):
    distance, index, label = make(5, k, 10_000, 3000, "cuda")
    got = knn_vote(distance, index, label, 3000, weighting="distance")
    want = knn_vote(distance.cpu(), index.cpu(), label.cpu(), 3000, weighting="distance")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.cpu(), b)
    with pytest.raises(ValueError, match="distance: expected at most 4096 neighbours"):
        knn_vote(*make(1, 4097, 10, 3, "cuda"), 3)


@pytest.mark.cuda
def test_captured_in_a_cuda_graph():
    distance, index, label = make(30, 7, 50, 4, "cuda")
    knn_vote(distance, index, label, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = knn_vote(distance, index, label, 4)
    label.copy_(make(30, 7, 50, 4, "cuda", seed=1)[2])
    graph.replay()
    for a, b in zip(got, knn_vote(distance, index, label, 4), strict=True):
        assert torch.equal(a, b)


def samples(device):
    distance, index, label = make(6, 5, 20, 4, device)
    yield (distance, index, label, 4, 0, 0.1, -1)
    yield (distance.t().contiguous().t(), index, label, 4, 1, 0.1, -1)
    yield (distance[:, :1].expand(6, 5), index[:, ::1], label[::2], 4, 2, 0.5, -1)
    yield (distance[:0], index[:0], label, 4, 0, 0.1, -1)


def test_opcheck(device):
    for args in samples(device):
        opcheck(torch.ops.als_ext.knn_vote.default, args)


def test_compiles_with_fullgraph(device):
    distance, index, label = make(6, 5, 20, 4, device)
    compiled = torch.compile(lambda *a: knn_vote(*a, 4), fullgraph=True, backend="aot_eager")
    for x, y in zip(
        compiled(distance, index, label), knn_vote(distance, index, label, 4), strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("in_dims", [(0, 0, None), (0, 0, 0), (None, 1, 0), (None, None, 1)])
def test_vmap(in_dims, device):
    distance, index, label = make(6, 5, 20, 4, device)
    index[2, 1], index[3, 2] = -1, 20
    many = torch.stack([distance, distance.flip(0), distance.flip(1)])
    indices = torch.stack([index, index.flip(0), index.flip(1)])
    labels = torch.stack([label, label.flip(0), label.roll(1)])
    batched = [many, indices, labels]
    arguments = [
        single if dim is None else batch.movedim(0, dim)
        for single, batch, dim in zip((distance, index, label), batched, in_dims, strict=True)
    ]
    got = torch.vmap(lambda *a: knn_vote(*a, 4), in_dims=in_dims)(*arguments)
    for b in range(3):
        chosen = [
            single if dim is None else batch[b]
            for single, batch, dim in zip((distance, index, label), batched, in_dims, strict=True)
        ]
        for x, y in zip(got, knn_vote(*chosen, 4), strict=True):
            assert torch.equal(x[b], y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"distance": torch.zeros(2, 3, dtype=torch.float64)},
            TypeError,
            "distance: expected dtype float32",
        ),
        ({"distance": [[0.0]]}, TypeError, "distance: expected a torch.Tensor, got list"),
        (
            {"index": torch.zeros(2, 4, dtype=torch.int64)},
            ValueError,
            r"index: expected shape \[2, 3\]",
        ),
        (
            {"label": torch.zeros(4, 1, dtype=torch.int64)},
            ValueError,
            r"label: expected shape \[N\]",
        ),
        (
            {"label": torch.tensor([0, 1, 5])},
            ValueError,
            r"label: expected values in \[0, 2\).*got 5 at position 2",
        ),
        ({"num_classes": 0}, ValueError, "num_classes: expected >= 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes: expected an int, got float"),
        ({"weighting": "cosine"}, ValueError, "weighting: expected one of 'uniform'.*got 'cosine'"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "distance": torch.zeros(2, 3),
        "index": torch.zeros(2, 3, dtype=torch.int64),
        "label": torch.zeros(4, dtype=torch.int64),
        "num_classes": 2,
    }
    with pytest.raises(error, match=message):
        knn_vote(**{**arguments, **change})
