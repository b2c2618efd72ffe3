"""What the processes of a group gather, fetch and agree on."""

import pytest
import torch
import torch.distributed as dist
from workers import shards

from als_ext import distributed
from als_ext.distributed.exchange import Exchange
from als_ext.distributed.processes import Processes


def gathered(group, parts):
    return distributed.all_rows(parts[dist.get_rank(group)], group)


@pytest.mark.parametrize("rows", [(4, 4, 4), (1, 0, 11), (0, 12), (0, 0)])
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.float32, torch.float64, torch.bfloat16]
)
def test_all_rows(workers, rows, dtype):
    values = torch.arange(2 * sum(rows)).view(-1, 2).to(dtype)
    for found in workers.run(len(rows), gathered, shards(values, rows)):
        assert found.dtype == dtype
        assert torch.equal(found, values)


def test_all_rows_of_what_does_not_fit(workers):
    def texts(parts):
        answers = workers.answers(2, gathered, parts)
        assert all(answer[0] == "error" for answer in answers)
        return [text for _, _, text, _ in answers]

    assert "dtype: expected the same" in texts([torch.ones(1), torch.ones(1).double()])[0]
    assert "shape of a row: expected" in texts([torch.ones(1), torch.ones(1, 2)])[1]
    assert texts([torch.ones(1), [1.0]]) == [
        "process 1: values: expected a torch.Tensor, got list",
        "values: expected a torch.Tensor, got list",
    ]


def fetched(group, parts, indices):
    processes = Processes(group)
    rank = processes.rank
    exchange = Exchange(processes, [len(part) for part in parts], indices[rank])
    values = exchange(parts[rank])
    return values[exchange.at], values


@pytest.mark.parametrize("rows", [(5, 3, 4), (0, 12, 0), (12, 0)])
def test_an_exchange_fetches_each_named_row_once(workers, rows):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(12, 2, generator=g)
    indices = [torch.randint(0, 12, (count, 3), generator=g) for count in (7, 0, 1)]
    found = workers.run(len(rows), fetched, shards(values, rows), indices)
    for (got, whole), index in zip(found, indices, strict=False):
        assert torch.equal(got, values[index])
        assert len(whole) == len(index.unique())


def outsider(group):
    """A group of two of the three: the third is not in it."""
    inner = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        return "inside"
    try:
        Processes(inner)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_group_of_others(workers):
    *inside, text = workers.run(3, outsider)
    assert inside == ["inside"] * 2
    assert text == "group: expected a group that this process belongs to, got another"
