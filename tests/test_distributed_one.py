"""A group of one process, by Gloo here and by NCCL where there is a GPU: the same as no group."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from als_ext import ALSO, LabelCorrector, correct_labels, distributed, ops


def data(device):
    g = torch.Generator().manual_seed(0)
    true = torch.arange(600) % 5
    x = torch.randn(600, 8, generator=g)
    x[torch.arange(600), true] += 4
    given = torch.where(torch.rand(600, generator=g) < 0.3, (true + 1) % 5, true)
    return x.to(device), given.to(device), true.to(device)


def trained(x, label, group):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 5).to(x.device)
    spread = {} if group is None else {"group": group, "batch_size": 32}
    optimizer = ALSO(model.parameters(), n=len(x), **spread)
    for index in torch.arange(600, device=x.device).split(32):
        loss, losses = ops.weighted_loss(
            model(x[index]), label[index], optimizer.loss_weight(index)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(index=index, losses=losses)
    return [*(p.detach() for p in model.parameters()), optimizer.weights.pi()]


def alone(_, backend, device, store):
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    group = dist.group.WORLD
    x, given, true = data(device)
    for found, wanted in zip(
        distributed.knn(x, x, 7, group=group, exclude_self=True),
        ops.knn(x, x, 7, exclude_self=True),
        strict=True,
    ):
        assert torch.equal(found, wanted)
    found, wanted = correct_labels(x, given, group=group), correct_labels(x, given)
    for name in ("new_label", "share", "winner", "guess", "neighbours"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    one, two = LabelCorrector(given, 5), LabelCorrector(given, 5)
    one.step(x, guess=true, group=group, votes_only=True)
    two.step(x, guess=true, votes_only=True)
    assert torch.equal(one.labels, two.labels)
    assert not torch.equal(one.labels, given)
    for got, want in zip(trained(x, given, group), trained(x, given, None), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("backend", "device"),
    [("gloo", "cpu"), pytest.param("nccl", "cuda", marks=pytest.mark.cuda)],
)
def test_a_group_of_one_is_no_group(tmp_path, backend, device):
    mp.spawn(alone, (backend, device, tmp_path / "store"))
