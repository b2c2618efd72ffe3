"""Exact nearest neighbours against the ways they are found today.

What each peer is given is made before the clock starts: a faiss index that holds the database
already, scikit-learn's fitted brute force, numpy arrays for both. Ceilings: the matrix product of
the same shape alone, float32 and bfloat16, its result thrown away; on a GPU, bfloat16 products at
the rate of a large square matrix product; for few queries, a read of the database.
"""

import functools
from functools import partial

import torch

import als_ext
from als_ext.ops import knn
from als_ext.reference.knn import knn as float64_knn
from bench import peers
from bench.curve import Curve
from bench.inputs import DTYPES
from bench.race import Counts, Lineup, Race

BLOCK = 2048  # queries at a time for peers that make a Q × M matrix
DIMS, KS = (8, 64, 128, 512, 768), (1, 10, 64, 500)
ROWS, QUERIES = 60_000, 4096
CHECKED = 20  # queries compared with float64
PEAK = "bfloat16 products at their peak"
PEAK_SIZE = 8192
READ = "read of the database"
PRODUCT = {"float32": "float32 product", "bfloat16": "bfloat16 product"}
# queries, rows, D, k, order, dtype on a GPU beside the others -> targets: neighbour graphs, growing
# D, growing k, few queries
GPU_SIZES = {
    (100_000, 100_000, 128, 10, "self", "bfloat16"): {peers.FLASHLIB: 2.5, PEAK: 0.45},
    (100_000, 100_000, 256, 10, "self", "bfloat16"): {peers.FLASHLIB: 2.0},
    (100_000, 100_000, 128, 10, "self", "float32"): {peers.FLASHLIB: 1.5},
    (16_384, 100_000, 512, 10, "random", "bfloat16"): {PRODUCT["bfloat16"]: 0.9},
    (16_384, 100_000, 768, 10, "random", "bfloat16"): {PRODUCT["bfloat16"]: 0.9},
    (1, 1_000_000, 128, 10, "random", "float32"): {READ: 0.8},
    (16, 1_000_000, 128, 10, "random", "float32"): {READ: 0.8},
    **{(16_384, 100_000, 128, k, "random", "bfloat16"): {} for k in (4, 16, 32)},
}
QUICK_GPU_SIZES = {
    (40, 600, 24, 4, "random", "bfloat16"): {},
    (300, 300, 24, 4, "self", "bfloat16"): {},
}
MANY, FEW = 64, 8  # neighbours
GROWTH = f"time_at_k_{MANY}_over_k_{FEW}"
# (queries, rows, D, k) with the database in host memory: bound by the copy, and not
HOST_SIZES = [(count, 2_000_000, 128, 10) for count in (1024, 65_536)]
COPY, RESIDENT = "copy of the database", "database on the device"
STREAMED = "time_over_the_longer_of_copy_and_search"
ORDERS = ("nearest first", "farthest first")


@functools.lru_cache(maxsize=4)  # the largest is 512 MB
def points(count, dim, seed):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(maxsize=1)
def clusters(count, dim):
    """100 Gaussian clusters, their rows a third as far from the centre as the centre from 0."""
    g = torch.Generator().manual_seed(2)
    return (
        points(100, dim, 3)[torch.randint(100, (count,), generator=g)] + points(count, dim, 0) / 3
    )


def inputs(queries, rows, dim, order):
    """Gaussian rows; ``order`` sorts the database by its distance from the first query, or names
    what else the rows are: the queries themselves, or in clusters."""
    if order == "self":
        return (points(rows, dim, 0),) * 2
    if order == "self, 100 clusters":
        return (clusters(rows, dim),) * 2
    query, database = points(queries, dim, 1), points(rows, dim, 0)
    if order != "random":
        far = (database - query[0]).square().sum(dim=1)
        database = database[far.argsort(descending=order == "farthest first")]
    return query, database


def cdist_topk(query, database, k):
    parts = [
        torch.cdist(part, database).topk(k, dim=1, largest=False) for part in query.split(BLOCK)
    ]
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def product(query, database):
    """What no exact method that multiplies can undercut: the scores, into memory that is there."""
    transposed, buffer = database.T, query.new_empty(min(BLOCK, len(query)), len(database))

    def call():
        for part in query.split(BLOCK):
            torch.mm(part, transposed, out=buffer[: len(part)])

    return call


def mismatch(got, want):
    """Share of neighbours that are not those of the float64 search, or not in its order."""
    return (got != want).float().mean().item()


def has_bf16_products():
    return any("bf16" in name and there for name, there in als_ext.build_info()["cpu"].items())


def faiss_flat(database):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(database.shape[1])
    index.add(database.numpy())
    return index


def sklearn_brute(database, k):
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(database.numpy())


@functools.lru_cache(maxsize=1)  # seconds at D = 768 on a CPU, and the same for every k
def nearest(queries, rows, dim, order, dtype, device):
    query, database = (x.to(device, DTYPES[dtype]) for x in inputs(queries, rows, dim, order))
    found = float64_knn(
        query[:CHECKED], database, min(max(KS), rows - 1), exclude_self=order.startswith("self")
    )
    return [part.cpu() for part in found]


def gated(ours, want, measure="share of neighbours out of set or order, against float64"):
    """A lineup whose gate compares the first queries with float64."""

    def error():
        distance, index = (part[:CHECKED].cpu() for part in ours())
        return max((distance != want[0]).float().mean().item(), mismatch(index, want[1]))

    lineup = Lineup(measure, 0.0)
    lineup.ours(ours, error)
    return lineup


def setup(queries, rows, dim, k, order, dtype, few, quick, device):
    query, database = (x.to(device, DTYPES[dtype]) for x in inputs(queries, rows, dim, order))
    if order.startswith("self"):
        query = database  # one tensor, as FlashLib knows a graph by
    exclude = order.startswith("self")
    want = [part[:, :k] for part in nearest(queries, rows, dim, order, dtype, device)]
    lineup = gated(partial(knn, query, database, k, exclude_self=exclude), want)
    reason = "raced at D = 8 and 128, k = 10, to bound the time"
    if device.type == "cuda" or not few:
        fast = partial(knn, query, database, k, exclude_self=exclude, precision="fast")
        lineup.variant("fast", fast)
    if few:
        for name in ("fast", "scikit-learn", "cdist + topk")[device.type == "cuda" :]:
            lineup.skip(name, reason)
    else:
        lineup.peer("cdist + topk", partial(cdist_topk, query, database, k + exclude))
    if device.type == "cpu" and dtype == "float32":
        _cpu_peers(lineup, query, database, k + exclude, few, None if exclude else want[1])

    def third_party_error(search):
        return mismatch(search(query[:CHECKED], database, k)[1].cpu().long(), want[1])

    own = None if exclude else third_party_error
    peers.add_knn(lineup, query, database, k + exclude, own, quick)
    lineup.at_least = {"faiss": 1.0}
    if exclude:
        lineup.at_least = {"faiss": 2.5 if has_bf16_products() else 1.5, "float32 product": 1 / 1.1}
    _ceilings(lineup, query, database)
    return lineup


def _ceilings(lineup, query, database):
    if len(query) <= 16:
        lineup.ceiling(READ, lambda: database.amax())
    for dtype, name in PRODUCT.items():
        kind = DTYPES[dtype]
        lineup.ceiling(name, product(query.to(kind), database.to(kind)))
    if query.is_cuda and len(query) > 16:
        square = torch.randn(PEAK_SIZE, PEAK_SIZE, device=query.device).bfloat16()
        out = torch.empty_like(square)
        share = 2 * PEAK_SIZE**3 / (2 * len(query) * database.numel())
        lineup.ceiling(PEAK, partial(torch.mm, square, square, out=out), repeat=share)


def setup_growth(queries, rows, dim, quick, device):
    """k = MANY against k = FEW on the same data."""
    query, database = (x.to(device, torch.bfloat16) for x in inputs(queries, rows, dim, "random"))
    want = nearest(queries, rows, dim, "random", "bfloat16", device)
    lineup = gated(partial(knn, query, database, MANY), [part[:, :MANY] for part in want])
    lineup.part("ours, fewer neighbours", partial(knn, query, database, FEW))
    lineup.derive = lambda median: {GROWTH: median["ours"] / median["ours, fewer neighbours"]}
    peers.add_knn(lineup, query, database, MANY, None, quick)
    _ceilings(lineup, query, database)
    return lineup


def setup_host(queries, rows, dim, k, device):
    """The database in pinned memory, against the same search of it on the device."""
    database = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))  # 1 GB: not kept
    query, resident = points(queries, dim, 1).to(device), database.to(device)
    if device.type == "cuda":
        database = database.pin_memory()
    ours, search = (partial(knn, query, place, k) for place in (database, resident))
    buffer = torch.empty_like(resident)

    def error():
        return max(mismatch(got, want) for got, want in zip(ours(), search(), strict=True))

    def derive(median):
        return {STREAMED: median["ours"] / max(median[COPY], median[RESIDENT])}

    measure = "share of neighbours that the same search on the device does not find"
    lineup = Lineup(measure, 0.0, derive=derive)
    lineup.note = f"{database.nbytes / 1e9:.1f} GB in pinned host memory"
    lineup.ours(ours, error)
    lineup.variant(RESIDENT, search)
    lineup.peer("copy, then search", lambda: knn(query, database.to(device, non_blocking=True), k))
    lineup.ceiling(COPY, partial(buffer.copy_, database, non_blocking=True))
    return lineup


def _cpu_peers(lineup, query, database, k, few, want):
    lineup.settle = 0.003 if query.shape[0] <= 16 else 0.0
    queries = query.numpy()

    def error(search):
        if want is None:
            return None
        return lambda: mismatch(torch.from_numpy(search(queries[:CHECKED])[1]).long(), want)

    try:
        index = faiss_flat(database)
        search = partial(index.search, k=k)
        lineup.peer("faiss", partial(search, queries), error=error(search))
    except ImportError:
        lineup.skip("faiss", "faiss-cpu is not installed")
    if few:
        return
    try:
        model = sklearn_brute(database, k)
        search = partial(model.kneighbors)
        lineup.peer("scikit-learn", partial(search, queries), error=error(search))
    except ImportError:
        lineup.skip("scikit-learn", "scikit-learn is not installed")


def counts(queries, rows, dim, k, dtype, same):
    """Rows are read once, k distances and indices a query written; a product is an FMA."""
    read = (rows if same else queries + rows) * dim * DTYPES[dtype].itemsize
    return Counts(read + queries * k * 12, 2.0 * queries * rows * dim, "bfloat16")


def races(quick):
    rows, queries = (600, 64) if quick else (ROWS, QUERIES)

    def race(count, dim, k, order="random", few=False):
        case = f"D = {dim}, k = {k}, Q = {count}"
        case += "" if order == "random" else f", {order}"
        make = partial(setup, count, rows, dim, k, order, "float32", few, quick)
        size = counts(count, rows, dim, k, "float32", order.startswith("self"))
        return Race("knn", case, make, counts=size)

    grid = [(dim, k) for dim in ((8, 24) if quick else DIMS) for k in ((1, 10) if quick else KS)]
    for dim, k in grid:
        yield race(queries, dim, k, few=not (dim in (8, 128) and k == 10))
    for order in ("self", "self, 100 clusters"):
        yield race(rows, 24 if quick else 128, 10, order, few=True)
    for order in ORDERS:
        yield race(queries, 24 if quick else 128, 10, order, few=True)
    for count in (1, 16):
        yield race(count, 24 if quick else 128, 10)
    for (count, many, dim, k, order, dtype), aims in (
        QUICK_GPU_SIZES if quick else GPU_SIZES
    ).items():
        yield Race(
            "knn",
            f"D = {dim}, k = {k}, Q = {count}, M = {many}, {order}, {dtype}",
            partial(setup, count, many, dim, k, order, dtype, True, quick),
            gpu_only=not quick,
            counts=counts(count, many, dim, k, dtype, order == "self"),
            gpu_at_least=aims,
        )
    count, many, dim = (40, 600, 24) if quick else (16_384, 100_000, 128)
    yield Race(
        "knn",
        f"D = {dim}, k = {MANY} against {FEW}, Q = {count}, M = {many}, random, bfloat16",
        partial(setup_growth, count, many, dim, quick),
        gpu_only=not quick,
        counts=counts(count, many, dim, MANY, "bfloat16", False),
        gpu_at_most={GROWTH: 1.25},
    )
    for count, many, dim, k in [(64, 600, 24, 4)] if quick else HOST_SIZES:
        yield Race(
            "knn",
            f"D = {dim}, k = {k}, Q = {count}, M = {many}, database from the host",
            partial(setup_host, count, many, dim, k),
            gpu_only=not quick,
            gpu_at_most={STREAMED: 1.15},
        )


def curves(quick):
    queries, rows, dim = (64, 600, 16) if quick else (1024, ROWS, 128)

    def ours(dim, k, rows):
        query, database = inputs(queries, rows, dim, "random")
        return partial(knn, query, database, k)

    def faiss(dim, k, rows):
        query, database = inputs(queries, rows, dim, "random")
        return partial(faiss_flat(database).search, query.numpy(), k)

    def curve(x, values, fit_from, **fixed):
        letter = x[-1]
        series = {}
        for name, make in (("ours", ours), ("faiss", faiss)):
            series[name] = {v: partial(make, **{**fixed, names[letter]: v}) for v in values}
        stated = ", ".join(f"{s} = {fixed[n]}" for s, n in names.items() if s != letter)
        return Curve("knn", f"{x} ({queries} queries, {stated})", series, fit_from)

    names = {"D": "dim", "k": "k", "M": "rows"}
    dims = [4, 16] if quick else [8, 16, 32, 64, 128, 256, 512, 1024]
    ks = [1, 8] if quick else [1, 4, 10, 32, 64, 128, 256, 500]
    databases = [300, 600] if quick else [1000, 3000, 10_000, 30_000, 100_000, 300_000]
    yield curve("dimension D", dims, 0 if quick else 64, k=10, rows=rows, dim=dim)
    yield curve("neighbours k", ks, 0 if quick else 10, k=10, rows=rows, dim=dim)
    yield curve("database M", databases, 0 if quick else 10_000, k=10, rows=rows, dim=dim)
