"""kNN over processes: the bits of one process, whatever the shards."""

import pytest
import torch
from workers import shards

from als_ext import ops


def spread_knn(group, queries, databases, k, options):
    import torch.distributed as dist

    from als_ext import distributed

    rank = dist.get_rank(group)
    return distributed.knn(queries[rank], databases[rank], k, group=group, **options)


def check(workers, rows, x, k, query_rows=None, query=None, **options):
    query = x if query is None else query
    parts = shards(query, query_rows or rows), shards(x, rows)
    found = workers.run(len(rows), spread_knn, *parts, k, options)
    want = ops.knn(query, x, k, **options)
    assert torch.equal(torch.cat([index for _, index in found]), want[1])
    got = torch.cat([distance for distance, _ in found])
    assert torch.equal(got.view(torch.int32), want[0].view(torch.int32))  # bits, not values


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("rows", [(100, 100), (150, 50), (70, 60, 70), (1, 199, 0), (0, 0, 200)])
def test_bits_of_one_process(workers, rows, metric):
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    check(workers, rows, x, 10, metric=metric, exclude_self=True)


def test_ties_go_to_the_lower_index_over_all_shards(workers):
    x = torch.randint(0, 2, (90, 4), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 40, 89):
        check(workers, (30, 1, 59), x, k, exclude_self=True)
    check(workers, (30, 60), torch.zeros(90, 3), 90)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(workers, dtype):
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(workers, (20, 13, 27), x, 7)


def test_queries_are_sharded_by_themselves(workers):
    g = torch.Generator().manual_seed(0)
    x, query = torch.randn(500, 33, generator=g), torch.randn(40, 33, generator=g)
    check(workers, (250, 0, 250), x, 20, query_rows=(0, 39, 1), query=query)


def test_clustered_rows_and_many_of_them(workers):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 16, generator=g) + 8 * torch.randn(20, 16, generator=g).repeat(300, 1)
    check(workers, (4500, 1500), x, 15, exclude_self=True)


def test_one_process_alone(workers):
    check(workers, (50,), torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), 5)


def refusals(workers, match, k=3, options=({}, {}), x=None):
    x = x or [torch.randn(10, 4), torch.randn(10, 4)]
    answers = workers.answers(2, one_of, x, k, options)
    for kind, name, text, _ in answers:
        assert (kind, name) == ("error", "ValueError"), text
        assert match in text
    return [text for _, _, text, _ in answers]


def one_of(group, x, k, options):
    import torch.distributed as dist

    rank = dist.get_rank(group)
    return spread_knn(group, x, x, k, options[rank])


def test_an_error_on_one_process_is_an_error_on_all(workers):
    bad = [torch.randn(10, 4), torch.randn(10, 4)]
    bad[1][3, 2] = float("nan")
    first, second = refusals(workers, "NaN or infinity in row 3", x=bad)
    assert first.startswith("process 1: ")
    assert not second.startswith("process")
    refusals(workers, "metric: expected the same", options=({}, {"metric": "cosine"}))
    refusals(workers, "columns: expected the same", x=[torch.randn(10, 4), torch.randn(10, 5)])
    refusals(workers, "k: expected at most 20", k=21)
    check(workers, (10, 10), torch.randn(20, 4), 20)  # and the group still works


def test_group_has_to_exist():
    from als_ext import distributed

    x = torch.randn(4, 2)
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.knn(x, x, 1)


def test_keys_are_in_the_order_of_distance_and_index():
    from als_ext.distributed.knn import _keys, _unpacked

    values = [-float("inf"), -3.0, -1e-40, 0.0, 1e-40, 2.5, float("inf"), float("nan")]
    distance = torch.tensor(values).repeat_interleave(3)
    index = torch.tensor([0, 1, 2**32 - 1]).repeat(len(values))
    keys = _keys(distance, index)
    assert (keys.diff() > 0).all()
    back = _unpacked(keys)
    assert torch.equal(back[0].view(torch.int32), distance.view(torch.int32))
    assert torch.equal(back[1], index)
