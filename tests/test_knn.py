from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from als_ext import _library
from als_ext.ops import knn
from als_ext.reference.knn import distances
from als_ext.reference.knn import knn as knn_reference

METRICS = ["l2", "cosine", "ip"]
LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16"]


CUDA_PATHS = ["cuda", "cuda_packed"]


@pytest.fixture
def device_of():
    """Name -> device. Queries or rows of these tests are few: "cuda" reads the database as it
    lies, "cuda_packed" may not."""

    def choose(name):
        _library._cuda.allow_small_input_paths(name == "cuda")
        return torch.device("cuda")

    yield choose
    if _library._cuda is not None:
        _library._cuda.allow_small_input_paths(True)


@pytest.fixture(
    params=[*LEVELS, *(pytest.param(path, marks=pytest.mark.cuda) for path in CUDA_PATHS)]
)
def device(request, cpu_level, device_of):
    """Every test runs with every instruction set; bf16, so forced, also serves short rows."""
    if request.param in CUDA_PATHS:
        return device_of(request.param)
    cpu_level(request.param)
    return torch.device("cpu")


def gaussian(rows, dim, device, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_same(got, want):
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0], want[0])


def check(query, database, k, **options):
    got = knn(query, database, k, **options)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == torch.int64
    assert_same(got, knn_reference(query, database, k, **options))
    return got


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 16, 17, 127, 128, 129, 300, 768, 1025])
def test_any_dimension(dim, metric, device):
    database = gaussian(333, dim, device)
    database[200:] = database[:133]  # ties: the lower index comes first
    check(torch.cat([gaussian(20, dim, device, 1), database[:5]]), database, 20, metric=metric)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 63, 64, 65, 500, 2048])
def test_any_k(k, device):
    check(gaussian(17, 5, device, 1), gaussian(2048 if k == 2048 else 3001, 5, device), k)


@pytest.mark.parametrize("k", [1, 33, 2048])
def test_lists_that_are_cut_many_times(k, device):
    """More rows than a candidate list holds, so that what is kept depends on the cuts."""
    check(gaussian(18, 4, device, 1), gaussian(30_011, 4, device), k)


@pytest.mark.parametrize("queries", [1, 16, 17, 23, 24, 25, 191, 192, 193])
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 65, 130])
def test_ragged_tiles(queries, rows, device):
    check(gaussian(queries, 9, device, 1), gaussian(rows, 9, device), min(3, rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes(dtype, metric, device):
    check(
        gaussian(30, 33, device, 1).to(dtype), gaussian(500, 33, device).to(dtype), 7, metric=metric
    )


def test_float64_finer_than_float32(device):
    """Rows that float32 cannot tell apart: their distances can, from an equally fine query."""
    database = 1.0 + 1e-12 * torch.arange(100.0, dtype=torch.float64, device=device)[:, None]
    _, index = check(database.flip(0)[:10], database, 3)
    assert index[:, 0].tolist() == list(range(99, 89, -1))


@pytest.mark.parametrize("shift", [1e4, -3e6])
def test_translation_does_not_collapse_distances(shift, device):
    """On an integer grid the shift is exact, so nothing may change (faiss #5285)."""
    g = torch.Generator().manual_seed(0)
    database = torch.randint(-9, 9, (2000, 24), generator=g).float().to(device)
    query = torch.randint(-9, 9, (50, 24), generator=g).float().to(device)
    assert_same(knn(query + shift, database + shift, 30), knn(query, database, 30))
    check(query + shift, database + shift, 30)


def test_zero_padding_changes_nothing(device):
    """faiss #5327."""
    query, database = gaussian(40, 30, device, 1), gaussian(900, 30, device)
    want = knn(query, database, 12)
    for columns in (1, 34, 200):
        padded = [torch.nn.functional.pad(t, (0, columns)) for t in (query, database)]
        assert torch.equal(knn(*padded, 12)[1], want[1])
        check(*padded, 12)


def test_batch_size_changes_nothing(device):
    """faiss #563."""
    query, database = gaussian(70, 40, device, 1) + 100, gaussian(3000, 40, device) + 100
    want = knn(query, database, 9)
    for size in (1, 3, 16, 33):
        parts = [knn(part, database, 9) for part in query.split(size)]
        assert_same([torch.cat(p) for p in zip(*parts, strict=True)], want)


def test_order_of_the_database_changes_only_the_names(device):
    query, database = gaussian(40, 16, device, 1), gaussian(2000, 16, device)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(2)).to(device)
    distance, index = knn(query, database, 25)
    shuffled = knn(query, database[order], 25)
    assert torch.equal(shuffled[0], distance)
    assert torch.equal(order[shuffled[1]], index)


@pytest.mark.parametrize("descending", [False, True])
def test_sorted_databases(descending, device):
    """Every row nearer than all before it, or none."""
    query = gaussian(20, 3, device, 1)
    database = gaussian(20_000, 3, device)
    far = (database - query[0]).square().sum(dim=1)
    check(query, database[far.argsort(descending=descending)], 40)


def test_near_points_of_equal_norm(device):
    """cuVS #1632: |x|^2 + |y|^2 - 2<x, y> is 0 or negative here."""
    angle = torch.linspace(0, 1e-3, 500, dtype=torch.float64)
    database = (1000 * torch.stack([angle.cos(), angle.sin()], dim=1)).float().to(device)
    distance, index = check(database, database, 20, exclude_self=True)
    assert (distance > 0).all()
    assert (distance >= 0).all()
    assert not (index == torch.arange(500, device=device)[:, None]).any()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_self_is_nearest_at_distance_zero(metric, device):
    points = gaussian(400, 30, device) + 50
    distance, index = check(points, points, 3, metric=metric)
    assert index[:, 0].tolist() == list(range(400))
    assert (distance[:, 0] == 0).all()
    assert (distance[:, 1:] > 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_exclude_self_goes_by_index_not_by_distance(metric, device):
    points = gaussian(300, 8, device)
    points[1::2] = points[::2]  # everyone has a twin
    distance, index = check(points, points, 299, metric=metric, exclude_self=True)
    assert not (index == torch.arange(300, device=device)[:, None]).any()
    if metric != "ip":
        assert index[:, 0].tolist() == [i ^ 1 for i in range(300)]
        assert (distance[:, 0] == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_all_rows_equal(metric, device):
    points = torch.full((2500, 3), 3.25, device=device)
    check(points[:400], points[:400], 10, metric=metric, exclude_self=True)
    check(points[:20], points, 10, metric=metric)
    check(points[:17], points, 2048, metric=metric)


def test_few_distinct_distances(device):
    """Thousands of ties at every rank, on both sides of the k-th."""
    g = torch.Generator().manual_seed(0)
    database = torch.randint(0, 2, (6000, 6), generator=g).float().to(device)
    check(database[:60], database, 150)


def test_half_duplicates(device):
    database = gaussian(3000, 20, device)
    twin = torch.randperm(3000, generator=torch.Generator().manual_seed(1))[:1500]
    database[twin] = database[7].clone()
    check(torch.cat([database[7:8], gaussian(20, 20, device, 2)]), database, 33)


def test_clusters_far_from_the_mean(device):
    """Distances inside a cluster are 1e-10 of the norms: float32 scores alone see noise."""
    g = torch.Generator().manual_seed(0)
    centres = 100 * torch.randn(4, 10, generator=g)
    database = centres[torch.arange(4000) % 4] + 1e-3 * torch.randn(4000, 10, generator=g)
    check(database[:100].to(device), database.to(device), 15)


def test_one_huge_row_spoils_nothing(device):
    database = gaussian(3000, 10, device)
    database[1234] = 1e15
    check(torch.cat([database[:50], database[1234:1235]]), database, 15)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e17, 1e19, 3e37])
def test_overflow_and_underflow_of_float32(scale, metric, device):
    """Distances that round to 0 or to infinity tie, and go by index."""
    check(scale * gaussian(20, 5, device, 1), scale * gaussian(700, 5, device), 12, metric=metric)


def test_queries_far_from_the_database(device):
    database = 1e-3 * gaussian(700, 5, device)
    check(1e12 * gaussian(20, 5, device, 1), database, 12)
    check(1e30 * gaussian(20, 5, device, 1), database, 12)


def test_zero_rows_under_cosine(device):
    database = gaussian(400, 12, device)
    database[::5] = 0
    query = torch.cat([database[:30], -database[:30]])
    distance, _ = check(query, database, 350, metric="cosine")
    assert ((distance >= 0) & (distance <= 2)).all()


def test_cosine_distance_is_one_minus_the_cosine(device):
    query, database = gaussian(30, 12, device, 1), 10 * gaussian(300, 12, device)
    distance, index = knn(query, database, 300, metric="cosine")
    cosine = torch.nn.functional.cosine_similarity(
        query.double()[:, None], database.double()[index], dim=2
    )
    torch.testing.assert_close(distance, (1 - cosine).float(), rtol=1e-6, atol=1e-7)


def test_top_10_is_a_prefix_of_top_100(device):
    query, database = gaussian(200, 24, device, 1), gaussian(5000, 24, device)
    short, long = knn(query, database, 10), knn(query, database, 100)
    assert_same(short, [t[:, :10] for t in long])


def test_non_contiguous_views(device):
    query, database = gaussian(24, 40, device, 1), gaussian(600, 40, device)
    want = knn(query[:, ::2].contiguous(), database[:, ::2].contiguous(), 5)
    assert_same(knn(query[:, ::2], database[:, ::2], 5), want)
    assert_same(knn(query[:, ::2].t().contiguous().t(), database[:, ::2], 5), want)
    check(query[:1].expand(20, 40), database, 5)


def test_no_queries(device):
    distance, index = knn(torch.empty(0, 4, device=device), gaussian(10, 4, device), 3)
    assert distance.shape == index.shape == (0, 3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_sort_last_in_the_operator(bad, metric, device):
    """The public function refuses them on the CPU; the operator, which cannot look, is safe."""
    query, database = gaussian(40, 6, device, 1), gaussian(600, 6, device)
    database[100:400, 3] = bad
    query[3, 0] = bad
    got = torch.ops.als_ext.knn(query, database, 500, METRICS.index(metric), False, True)
    d = distances(query, database, metric=metric)
    want = d.sort(dim=1, stable=True)
    assert torch.equal(got[1], want.indices[:, :500])
    torch.testing.assert_close(got[0], want.values[:, :500], rtol=0, atol=0, equal_nan=True)
    few = torch.ops.als_ext.knn(query, database, 20, METRICS.index(metric), False, True)
    assert torch.equal(few[1], got[1][:, :20])


def test_fast_returns_exact_distances_of_nearly_the_same_rows(device):
    query, database = gaussian(300, 32, device, 1), gaussian(4000, 32, device)
    distance, index = knn(query, database, 20, precision="fast")
    exact = knn(query, database, 20)
    assert (index == exact[1]).float().mean() > 0.999
    d = (query.double()[:, None] - database.double()[index]).square().sum(dim=2).float()
    assert torch.equal(distance, d)
    assert (distance.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("level", LEVELS)
def test_instruction_sets_agree_to_the_bit(level, metric, cpu_level):
    query, database = gaussian(50, 203, "cpu", 1) + 5, gaussian(1500, 203, "cpu") + 5
    want = knn(query, database, 70, metric=metric)
    cpu_level(level)
    assert_same(check(query, database, 70, metric=metric), want)


needs_bf16 = pytest.mark.skipif(
    not _library._C.cpu_capability().get("avx512bf16"), reason="no avx512_bf16"
)


def clustered(rows, dim, spread):
    """Four clusters, their radius `spread` of their distance from one another."""
    centres = gaussian(4, dim, "cpu", 2)
    return centres[torch.arange(rows) % 4] + spread * gaussian(rows, dim, "cpu", 3)


@needs_bf16
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-5])
def test_clusters_that_bf16_cannot_tell_apart(spread, metric, cpu_level):
    database = clustered(30_000, 64, spread)
    query = database[7:30_000:199]
    cpu_level("avx512")
    want = knn(query, database, 10, metric=metric)
    cpu_level("avx512_bf16")
    before = _library._C.counters()["knn_bf16_given_up"]
    assert_same(knn(query, database, 10, metric=metric), want)
    assert_same([t[:20] for t in want], knn_reference(query[:20], database, 10, metric=metric))
    if metric != "ip" and spread <= 1e-2:
        assert _library._C.counters()["knn_bf16_given_up"] > before


@needs_bf16
def test_bf16_serves_what_it_can_tell_apart(cpu_level):
    cpu_level("avx512_bf16")
    before = _library._C.counters()["knn_bf16_given_up"]
    for k in (1, 10, 300):
        check(gaussian(60, 128, "cpu", 1), gaussian(9000, 128, "cpu"), k)
    assert _library._C.counters()["knn_bf16_given_up"] == before


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-20, 1e15, 1e30])
@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_every_size(scale, metric, device):
    """Elements over 30 orders of magnitude; some become subnormal or 0 in bf16."""
    g = torch.Generator().manual_seed(0)
    size = 10.0 ** (-30 * torch.rand(700, 40, generator=g, dtype=torch.float64))
    database = (scale * size * torch.randn(700, 40, generator=g, dtype=torch.float64)).float()
    database = database.to(device)
    check(database[:60], database, 12, metric=metric)


@pytest.mark.parametrize("rows", [40, 700])
def test_a_few_queries_as_many(rows, device):
    """The paths for few and for many queries agree, ties and all."""
    points = gaussian(rows, 32, device)
    points[rows // 2 :] = points[: rows - rows // 2]
    want = knn(points, points, 20, exclude_self=True)
    many = knn(points.repeat(3, 1), points, 21)
    assert_same([t[:rows] for t in many], [t[rows : 2 * rows] for t in many])
    assert_same(knn(points[:5], points, 21), [t[:5] for t in many])
    check(points, points, 20, exclude_self=True)
    assert not (want[1] == torch.arange(rows, device=device)[:, None]).any()


ORDERED = "knn_in_order"
GIVEN_UP = "knn_in_order_given_up"


def islands(rows, dim, spread=0.05, count=40, seed=0):
    """Clusters that a search may leave out as a whole, with what makes that hard: copies, ties, an
    island of one row far away, and zero rows."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, dim, generator=torch.Generator().manual_seed(9))
    x = centre[torch.randint(count, (rows,), generator=g)]
    x += spread * torch.randn(rows, dim, generator=g)
    x[100:400] = x[100]
    x[1000:1100] = x[2000:2100]
    x[7] = 1e3 * centre[0]
    x[-20:] = 0
    return x


def taken(search):
    """The result, and by how much each counter grew."""
    before = _library._C.counters()
    result = search()
    return result, {name: n - before[name] for name, n in _library._C.counters().items()}


def in_parts(query, database, k, **options):
    """Few queries at a time look at every panel."""
    parts = [taken(lambda p=p: knn(p, database, k, **options)) for p in query.split(3000)]
    assert all(counts[ORDERED] == counts[GIVEN_UP] == 0 for _, counts in parts)
    return [torch.cat(each) for each in zip(*(result for result, _ in parts), strict=True)]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dim", [3, 24, 131])
@pytest.mark.parametrize("level", LEVELS)
def test_panels_out_of_reach_change_nothing(level, dim, metric, cpu_level):
    cpu_level(level)
    query, database = islands(4999, dim, seed=1), islands(8999, dim)
    got, counts = taken(lambda: knn(query, database, 20, metric=metric))
    assert counts[ORDERED] == 1
    assert_same(got, in_parts(query, database, 20, metric=metric))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 33, 400])
def test_reach_in_a_self_graph(k, dtype):
    x = islands(9001, 20, spread=0.2).to(dtype)
    got, counts = taken(lambda: knn(x, x, k, exclude_self=True))
    assert counts[ORDERED] == 1
    some = torch.tensor([0, 7, 100, 399, 1050, 2050, 5000, 8980, 9000])
    distance, index = knn_reference(x[some], x, k + 1)
    for row, d, i in zip(some.tolist(), distance, index, strict=True):
        others = i != row
        others[-1] &= bool((~others[:-1]).any())  # self may lie behind k others at its distance
        want = i[others][:k], d[others][:k]
        assert torch.equal(got[1][row], want[0])
        assert torch.equal(got[0][row], want[1])


def test_reach_with_shifted_rows():
    """On an integer grid the shift is exact, so nothing may change."""
    g = torch.Generator().manual_seed(0)
    centre = torch.randint(-300, 300, (30, 24), generator=g).float()
    x = centre[torch.randint(30, (9000,), generator=g)]
    x += torch.randint(-4, 5, x.shape, generator=g)
    (got, counts), (shifted, again) = (
        taken(lambda y=y: knn(y, y, 30, exclude_self=True)) for y in (x, x - 3e6)
    )
    assert counts[ORDERED] == again[ORDERED] == 1
    assert_same(shifted, got)


def test_reach_with_rows_that_are_not_finite():
    x = islands(9000, 16)
    x[50, 3], x[4000, 0] = float("nan"), float("inf")
    search = torch.ops.als_ext.knn.default
    (distance, index), counts = taken(lambda: search(x, x, 5, 0, True, True))
    assert counts[ORDERED] == 1
    finite = x.isfinite().all(dim=1)
    assert torch.isin(index[finite], torch.tensor([50, 4000])).sum() == 0
    clean = torch.where(finite[:, None], x, torch.full_like(x, 1e6))  # far from all others
    want = in_parts(x[finite], clean, 6)
    rows = finite.nonzero()[:, 0]
    keep = (want[1] != rows[:, None]).long().argsort(dim=1, descending=True, stable=True)[:, :5]
    assert torch.equal(distance[finite], want[0].gather(1, keep))
    assert distance[~finite].isnan().all()


@pytest.mark.parametrize("level", LEVELS)
def test_reach_that_does_not_pay_is_given_up(level, cpu_level):
    """Rows of every size, so near neighbours, but no clusters: all panels are looked at."""
    cpu_level(level)
    x = gaussian(9000, 20, "cpu", 2) * (3 * gaussian(9000, 1, "cpu", 12)).exp()
    got, counts = taken(lambda: knn(x, x, 20))
    assert counts[GIVEN_UP] == 1
    assert counts[ORDERED] == 0
    assert_same(got, in_parts(x, x, 20))


def test_rows_without_clusters_are_not_put_in_order():
    x = gaussian(9000, 32, "cpu")
    for query, database, metric in ((x, x, "l2"), (islands(9000, 8),) * 2 + ("ip",)):
        _, counts = taken(lambda q=query, y=database, m=metric: knn(q, y, 10, metric=m))
        assert counts[ORDERED] == counts[GIVEN_UP] == 0


@pytest.mark.slow
def test_reach_over_chunks_of_the_database_and_spans_of_queries():
    """D = 2000: fewer than 9,500 rows are a chunk. k = 500: 3,300 queries are a span."""
    x = islands(9500, 2000, spread=0.1)
    got, counts = taken(lambda: knn(x, x, 30))
    assert counts[ORDERED] == 1
    assert_same(got, in_parts(x, x, 30))
    y = islands(20_000, 8)
    got, counts = taken(lambda: knn(y, y, 500))
    assert counts[ORDERED] == 1
    assert_same(got, in_parts(y, y, 500))


def test_threads_change_nothing_in_order():
    x = islands(9000, 20)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            result, counts = taken(lambda: knn(x[:5000], x, 30))
            assert counts[ORDERED] == 1
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_an_unknown_instruction_set_is_named():
    with pytest.raises(ValueError, match=r"level: expected 'auto'.*got 'sse9'"):
        _library._C.set_cpu_level("sse9")


@pytest.mark.parametrize("queries", [2, 30, 400])
def test_number_of_threads_changes_nothing(queries):
    query, database = gaussian(queries, 20, "cpu", 1), gaussian(9000, 20, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(knn(query, database, 30))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def samples(device):
    query, database = gaussian(9, 5, device, 1), gaussian(20, 5, device)
    yield (query, database, 3, 0, False, True)
    yield (query.t().contiguous().t(), database[::2], 3, 1, False, True)
    yield (query[:1].expand(6, 5), database, 20, 2, False, False)
    yield (database.double(), database.double(), 2, 0, True, True)
    yield (query[:0], database, 3, 0, False, True)


def test_opcheck(device):
    for args in samples(device):
        opcheck(torch.ops.als_ext.knn.default, args)


def test_compiles_with_fullgraph(device):
    query, database = gaussian(9, 5, device, 1), gaussian(20, 5, device)
    compiled = torch.compile(
        lambda q, y: knn(q, y, 3, metric="cosine"), fullgraph=True, backend="aot_eager"
    )
    assert_same(compiled(query, database), knn(query, database, 3, metric="cosine"))


def test_compiles_once_for_any_number_of_rows(device):
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(
        lambda q, y: knn(q, y, 3), fullgraph=True, backend=backend, dynamic=True
    )
    for queries, rows in ((9, 20), (10, 30), (11, 50)):
        query, database = gaussian(queries, 5, device, 1), gaussian(rows, 5, device)
        assert_same(compiled(query, database), knn(query, database, 3))
    assert len(graphs) == 1


def test_vmap_over_either_argument(device):
    queries, databases = gaussian(4 * 6, 5, device, 1).view(4, 6, 5), gaussian(20, 5, device)
    want = [knn(q, databases, 3) for q in queries]
    want = [torch.stack(t) for t in zip(*want, strict=True)]
    assert_same(torch.vmap(lambda q: knn(q, databases, 3))(queries), want)
    batch = gaussian(4 * 6, 5, device, 2).view(4, 6, 5)
    want = [torch.stack(t) for t in zip(*[knn(y, y, 3) for y in batch], strict=True)]
    assert_same(torch.vmap(lambda y: knn(y, y, 3))(batch), want)


def test_no_gradient_flows(device):
    query = gaussian(5, 4, device).requires_grad_()
    distance, _ = knn(query, gaussian(9, 4, device), 2)
    assert not distance.requires_grad


def with_bad_row(value):
    points = torch.zeros(5, 3)
    points[3, 1] = value
    return points


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [[0.0]]}, TypeError, "query: expected a torch.Tensor, got list"),
        ({"query": torch.zeros(5)}, ValueError, r"query: expected shape \[Q, D\], got \[5\]"),
        ({"query": torch.zeros(5, 3, dtype=torch.int64)}, TypeError, "query: expected dtype float"),
        ({"database": torch.zeros(5, 4)}, ValueError, r"database: expected shape \[M, 3\]"),
        (
            {"database": torch.zeros(5, 3).bfloat16()},
            TypeError,
            "database: expected dtype float32, got bfloat16",
        ),
        ({"query": torch.zeros(5, 0), "database": torch.zeros(5, 0)}, ValueError, "one column"),
        ({"database": torch.zeros(0, 3)}, ValueError, "k: expected at most 0.*got 2"),
        ({"k": 0}, ValueError, "k: expected >= 1, got 0"),
        ({"k": 6}, ValueError, "k: expected at most 5, the rows available, got 6"),
        ({"k": 5, "exclude_self": True}, ValueError, "k: expected at most 4"),
        ({"k": 2.0}, TypeError, "k: expected an int, got float"),
        (
            {"query": torch.zeros(4, 3), "exclude_self": True},
            ValueError,
            "query: expected 5 rows, those of database, with exclude_self, got 4",
        ),
        ({"metric": "l1"}, ValueError, "metric: expected one of 'l2', 'cosine', 'ip', got 'l1'"),
        ({"precision": "tf32"}, ValueError, "precision: expected one of.*got 'tf32'"),
        ({"query": with_bad_row(float("nan"))}, ValueError, "query: expected finite.*in row 3"),
        ({"database": with_bad_row(float("inf"))}, ValueError, "database: expected fin.*in row 3"),
        ({"database": with_bad_row(-float("inf"))}, ValueError, "database: expected.*in row 3"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"query": torch.zeros(5, 3), "database": torch.zeros(5, 3), "k": 2}
    with pytest.raises(error, match=message):
        knn(**{**arguments, **change})


@pytest.mark.parametrize(
    "args",
    [
        (torch.zeros(5, 3), torch.zeros(5, 4), 1, 0, False, True),
        (torch.zeros(5, 3), torch.zeros(5, 3), 6, 0, False, True),
        (torch.zeros(5, 3), torch.zeros(6, 3), 1, 0, True, True),
        (torch.zeros(5, 3), torch.zeros(5, 3), 1, 3, False, True),
        (torch.zeros(5, 3), torch.zeros(5, 3).double(), 1, 0, False, True),
        (torch.zeros(5, 3).long(), torch.zeros(5, 3).long(), 1, 0, False, True),
    ],
)
def test_the_operator_protects_memory_by_itself(args):
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.als_ext.knn(*args)


def peak_bytes(call):
    """Highest growth of the resident set while ``call`` runs, from the kernel's own mark."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system keeps no resettable mark of the resident set")
    status = Path("/proc/self/status")

    def mark(name):
        return 1024 * int(status.read_text().split(name)[1].split()[0])

    before = mark("VmRSS:")
    call()
    return mark("VmHWM:") - before


@pytest.mark.cuda
def test_spans_of_queries_and_chunks_of_the_database_on_cuda():
    """More queries than are served at a time, more rows than a part has.

    40 MiB are 327,680 packed rows of 64 features, and 128 MiB the maxima of 1536 queries.
    """
    query, database = gaussian(2000, 64, "cuda", 1), gaussian(400_000, 64, "cuda")
    distance, index = knn(query, database, 10)
    some = [0, 255, 256, 1535, 1536, 1999]
    want = knn(query[some].cpu(), database.cpu(), 10)
    assert_same((distance[some].cpu(), index[some].cpu()), want)


@pytest.mark.cuda
def test_more_rows_than_are_searched_at_a_time_on_cuda():
    part = 655_360  # rows of one slab of features, 64 bytes each: 40 MiB
    points = gaussian(part + 77, 4, "cuda")
    points[-40:] = points[7:47]  # ties over both parts
    some = [7, 8, 40, 1000, part - 1, part, part + 76]
    distance, index = knn(points, points, 20, exclude_self=True)
    assert not (index == torch.arange(len(points), device="cuda")[:, None]).any()
    want = knn(points[some].cpu(), points.cpu(), 21)
    for row, d, i in zip(some, *want, strict=True):
        others = i != row
        assert torch.equal(index[row].cpu(), i[others][:20])
        assert torch.equal(distance[row].cpu(), d[others][:20])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("queries", "dim", "k"), [(1, 128, 10), (5, 50, 1), (16, 33, 2048)])
def test_few_queries_on_cuda(queries, dim, k, metric, dtype):
    """Aligned rows and rows that are not, of a large database, with rows that tie."""
    query = gaussian(queries, dim, "cpu", 1).to(dtype)
    database = gaussian(100_003, dim, "cpu").to(dtype)
    database[50_000:50_100] = database[:100]
    for first in (0, 1):  # in the view, row 0 is not aligned where rows are not
        got = knn(query.cuda(), database.cuda()[first:], k, metric=metric)
        assert_same([t.cpu() for t in got], knn(query, database[first:], k, metric=metric))


@pytest.mark.cuda
@pytest.mark.parametrize("far", [False, True])
def test_lengths_that_float32_does_not_have_on_cuda(far):
    """Finite products of a query that is too long for float32, and of rows so long that |y|² is."""
    query, database = gaussian(1, 4, "cpu", 1).double(), gaussian(20_000, 4, "cpu").double()
    query, database = query * 1e50, database * 1e-50
    if far:
        query[:, 3], database[:, 3] = 0, 1e25
    got = knn(query.cuda(), database.cuda(), 5, metric="ip")
    assert_same([t.cpu() for t in got], knn(query, database, 5, metric="ip"))


@pytest.mark.cuda
def test_extra_memory_of_few_queries_on_cuda_is_bounded():
    query, database = gaussian(16, 2, "cuda", 1), torch.randn(100_000_000, 2, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    knn(query, database, 10)
    assert torch.cuda.max_memory_allocated() - before <= 256 << 20


@pytest.mark.cuda
@pytest.mark.parametrize("path", CUDA_PATHS)
@pytest.mark.parametrize("k", [5, 2048])
def test_captured_in_a_cuda_graph(k, path, device_of):
    device_of(path)
    query, database = gaussian(40, 6, "cuda", 1), gaussian(3000, 6, "cuda")
    knn(query, database, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = knn(query, database, k)
    query.copy_(gaussian(40, 6, "cuda", 2))
    graph.replay()
    assert_same(got, knn(query, database, k))


# ---- a database that stays in host memory ----


@pytest.fixture
def parts_of():
    """Makes a host database of rows of ``row_bytes`` reach the device ``rows`` at a time."""
    changed = []

    def set_part(rows, row_bytes):
        changed.append(_library._cuda.set_staging_bytes(rows * row_bytes))

    yield set_part
    if changed:
        _library._cuda.set_staging_bytes(changed[0])


def streamed(query, database, k, **options):
    """Equal to the search of the same rows on the device."""
    got = knn(query, database, k, **options)
    assert_same(got, knn(query, database.cuda(), k, **options))
    assert got[0].is_cuda
    return got


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("part", [100, 128, 1000, 2999])
def test_a_database_in_pinned_memory(part, metric, dtype, parts_of):
    parts_of(part, 33 * dtype.itemsize)
    query, database = gaussian(40, 33, "cuda", 1).to(dtype), gaussian(3000, 33, "cpu").to(dtype)
    database[2000:2500] = database[100:600]  # ties over parts
    for k in (1, 9, 300, 2048):  # more than a part has rows, too
        streamed(query, database.pin_memory(), k, metric=metric)
    got = [part.cpu() for part in knn(query, database.pin_memory(), 9, metric=metric)]
    assert_same(got, knn_reference(query.cpu(), database, 9, metric=metric))


@pytest.mark.cuda
def test_a_database_in_pinned_memory_of_the_usual_parts(parts_of):
    """Two and a half buffers of 24 MiB, more queries than a span."""
    query, database = gaussian(20_000, 128, "cuda", 1), gaussian(120_000, 128, "cpu")
    streamed(query, database.pin_memory(), 10)


@pytest.mark.cuda
@pytest.mark.parametrize("part", [1, 64, 500])
def test_self_is_left_out_of_whichever_part_it_is_in(part, parts_of):
    parts_of(part, 4 * 8)
    points = gaussian(700 if part > 1 else 30, 8, "cpu")
    points[1::2] = points[::2]  # everyone has a twin
    for k in (1, 65, len(points) - 1):
        if k < len(points):
            _, index = streamed(points.cuda(), points.pin_memory(), k, exclude_self=True)
            assert not (index.cpu() == torch.arange(len(points))[:, None]).any()


@pytest.mark.cuda
def test_pinned_slices_and_rows_that_are_not_finite(parts_of):
    parts_of(200, 4 * 6)
    memory = torch.empty(1500, 6).pin_memory()
    memory.copy_(gaussian(1500, 6, "cpu"))
    memory[300:1000, 2] = float("nan")
    for rows in (slice(1, None), slice(7, 800), slice(3, 4)):
        database = memory[rows]
        assert database.is_pinned()
        k = min(500, len(database))
        got = knn(gaussian(20, 6, "cuda", 1), database, k)
        want = knn(gaussian(20, 6, "cuda", 1), database.cuda(), k)
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.cuda
def test_a_pinned_database_in_a_cuda_graph(parts_of):
    """A replay reads query and host memory anew."""
    parts_of(300, 4 * 6)
    query, database = gaussian(40, 6, "cuda", 1), gaussian(3000, 6, "cpu").pin_memory()
    knn(query, database, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = knn(query, database, 5)
    for seed in (2, 3):
        query.copy_(gaussian(40, 6, "cuda", seed))
        database.copy_(gaussian(3000, 6, "cpu", seed + 10))
        graph.replay()
        assert_same(got, knn(query, database.cuda(), 5))
        torch.cuda.synchronize()


@pytest.mark.cuda
def test_a_pinned_database_on_another_stream_and_dropped_at_once(parts_of):
    """Host memory is not handed out again before it was read, nor buffers before they were used."""
    parts_of(20_000, 4 * 64)
    query = gaussian(3000, 64, "cuda", 1)
    source = gaussian(200_000, 64, "cpu")
    want = knn(query, source.cuda(), 10)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            database = source.pin_memory()
            results.append(knn(query, database, 10))
            del database
            torch.full_like(source, float("nan")).pin_memory()  # where the rows were, if it may
            torch.full((50 << 20,), float("nan"), device="cuda")  # the same on the device
    torch.cuda.synchronize()
    for got in results:
        assert_same(got, want)


@pytest.mark.cuda
def test_a_pinned_database_is_not_waited_for():
    query, database = gaussian(100, 64, "cuda", 1), gaussian(200_000, 64, "cpu").pin_memory()
    knn(query, database, 10)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = knn(query, database, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(got, knn(query, database.cuda(), 10))


@pytest.mark.cuda
def test_a_pinned_database_compiles_with_fullgraph():
    query, database = gaussian(9, 5, "cuda", 1), gaussian(20, 5, "cpu").pin_memory()
    arguments = (query, database, 3, 0, False, True)
    # Not test_schema: it copies its arguments, into memory that is not pinned
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(torch.ops.als_ext.knn.default, arguments, test_utils=utils)
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(lambda q, y: knn(q, y, 3), fullgraph=True, backend=backend)
        assert_same(compiled(query, database), knn(query, database, 3))


@pytest.mark.cuda
def test_extra_device_memory_of_a_pinned_database_is_bounded():
    query, database = gaussian(4000, 512, "cuda", 1), gaussian(200_000, 512, "cpu").pin_memory()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    knn(query, database, 10)
    outputs = 4000 * 10 * 12
    assert torch.cuda.max_memory_allocated() - before - outputs <= 256 << 20


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y, r"database: expected on 'cuda:0' or in pinned host memory .*got pageable"),
        (lambda y: y.pin_memory()[:, ::2], r"database: expected contiguous rows.*strides \[8, 2\]"),
    ],
)
def test_host_memory_that_cannot_be_streamed_is_named(change, message):
    database = change(torch.zeros(20, 8))
    query = torch.zeros(3, database.shape[1], device="cuda")
    with pytest.raises(ValueError, match=message):
        knn(query, database, 2)
    with pytest.raises(RuntimeError, match=r"database: expected .*host memory"):
        torch.ops.als_ext.knn(query, database, 2, 0, False, True)
    with pytest.raises(RuntimeError, match="database: expected the device of the first argument"):
        torch.ops.als_ext.knn(database, query, 2, 0, False, True)


@pytest.fixture
def pretend_cuda(monkeypatch):
    """Tensors without data on devices that may not be there; nothing can be run on them."""
    monkeypatch.setattr(_library, "_cuda", _library._cuda or object())
    return FakeTensorMode()


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (("cuda:0", "cpu"), r"'cuda:0' or in pinned host memory .*got pageable memory on 'cpu'"),
        (("cuda:0", "cuda:1"), r"'cuda:0' or in pinned host memory .*got a tensor on 'cuda:1'"),
        (("cuda:1", "meta"), r"'cuda:1' or in pinned host memory .*got a tensor on 'meta'"),
        (("cpu", "cuda:0"), r"'cpu', got a tensor on 'cuda:0'"),
    ],
)
def test_devices_that_do_not_fit_are_named(places, message, pretend_cuda):
    with pretend_cuda:
        query, database = (torch.empty(5, 3, device=place) for place in places)
    if places[1] == "cpu":
        database = torch.zeros(5, 3)
    with pytest.raises(ValueError, match="database: expected on " + message):
        knn(query, database, 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_database_on_the_host_is_traced(dynamic, pretend_cuda):
    """The results are where the query is."""
    search = partial(knn, k=2)
    compiled = torch.compile(search, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with pretend_cuda:
        query, database = torch.empty(5, 3, device="cuda:0"), torch.empty(9, 3)
        for distance, index in (search(query, database), compiled(query, database)):
            assert distance.device == index.device == torch.device("cuda:0")
            assert distance.shape == index.shape == (5, 2)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1.0, 1e-4])  # bf16 scores alone; then both kinds
def test_extra_memory_is_bounded(spread):
    database = clustered(150_000, 512, spread)
    query = database[:300].clone()
    outputs = 300 * 1000 * 12
    assert peak_bytes(lambda: knn(query, database, 1000)) - outputs < 256 << 20


@pytest.mark.slow
def test_extra_memory_is_bounded_in_order():
    database = islands(1_000_000, 8)
    query = database[:4200].clone()
    before = _library._C.counters()[ORDERED]
    extra = peak_bytes(lambda: knn(query, database, 20)) - 4200 * 20 * 12
    assert _library._C.counters()[ORDERED] == before + 1
    assert extra < 256 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_finite_rows_whose_sum_overflows(dtype):
    large = torch.finfo(dtype).max
    database = torch.full((40, 8), large, dtype=dtype)
    distance, index = knn(database, database, 1)
    assert distance.squeeze(1).tolist() == [0.0] * 40
    assert (index == 0).all()
    database[3, 1], database[7, 2] = float("inf"), float("-inf")
    with pytest.raises(ValueError, match=r"database: expected finite values, .* in row 3"):
        knn(database[:2], database, 1)
