import pytest
import torch

from als_ext.ops import knn_vote
from als_ext.reference.knn_vote import knn_vote as float64_vote


def eager(distance, index, label, num_classes):
    """The usual way: one-hot counts by scatter_add, then max."""
    votes = torch.zeros(index.shape[0], num_classes, device=index.device)
    votes.scatter_add_(1, label[index], torch.ones_like(distance))
    best, winner = votes.max(dim=1)
    return winner, best / index.shape[1]


@pytest.mark.parametrize(("k", "num_classes"), [(10, 10), (50, 10), (500, 10), (50, 1000)])
def test_knn_vote(race, device, k, num_classes):
    rows = race.size(60_000, 256)
    g = torch.Generator().manual_seed(0)
    distance = torch.rand(rows, k, generator=g).to(device)
    index = torch.randint(0, rows, (rows, k), generator=g).to(device)
    label = torch.randint(0, num_classes, (rows,), generator=g).to(device)
    arguments = (distance, index, label, num_classes)
    source, target = index.clone(), torch.empty_like(index)
    compiled = torch.compile(eager) if not race.smoke else eager
    got, want = knn_vote(*arguments), float64_vote(*arguments)
    error = (got[0] != want[0]).float().mean().item() + (got[1] - want[1]).abs().max().item()
    race(
        {
            "ours": lambda: knn_vote(*arguments),
            "torch eager": lambda: eager(*arguments),
            "torch.compile": lambda: compiled(*arguments),
            "copy of the indices (ceiling)": lambda: target.copy_(source),
        },
        error=error,
        limit=1e-6,
    )
