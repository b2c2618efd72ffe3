"""Many threads, worker processes, many steps: the same bits, and memory that stays flat."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from als_ext import ALSO
from als_ext.data import IndexedDataset
from als_ext.ops import knn, knn_vote, sample_loss, weighted_loss
from als_ext.ops.also_step import also_step_
from als_ext.ops.pi_step import pi_rule, pi_state, pi_step_, pi_weight

pytestmark = pytest.mark.usefixtures("one_thread")
THREADS, ROUNDS = 8, 6
STEPS = 10_000
GROWTH = 4 << 20  # bytes; one leaked tensor of a step would be 10,000 x 64 bytes and more


def every_op(seed):
    """What all operations give for inputs of a seed, in a flat list of tensors."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(257, 31, generator=g).requires_grad_()
    target = torch.randint(0, 31, (257,), generator=g)
    weight = torch.rand(257, generator=g)
    losses = sample_loss(z, target, loss="gce", q=0.7)
    total, per_sample = weighted_loss(z, target, weight)
    (grad,) = torch.autograd.grad(total + losses.sum(), z)
    distance, index = knn(z.detach(), z.detach(), 7, metric="cosine", exclude_self=True)
    votes = knn_vote(distance, index, target, 31, weighting="distance")
    rule = pi_rule(lr=1e-2, decay=1e-2, temperature=1.0, direction="max")
    state = pi_state(1000, rule, capacity=257)
    for _ in range(3):
        pi_step_(state, rule, torch.randint(0, 1000, (257,), generator=g), per_sample.detach())
    param, grads = torch.randn(999, generator=g), torch.randn(999, generator=g)
    moments = [torch.zeros(999), torch.zeros(999), param.clone()]
    step = torch.zeros((), dtype=torch.int64)
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
    also_step_([param], [grads], [moments[0]], [moments[1]], [], [moments[2]], [step], **settings)
    found = [losses, total, per_sample, grad, distance, index, *votes, pi_weight(state, rule)]
    return [t.detach().clone() for t in (*found, param, *moments)]


def test_eight_threads_at_once_give_the_serial_bits():
    serial = [every_op(seed) for seed in range(THREADS)]
    gate = threading.Barrier(THREADS)

    def work(seed):
        gate.wait()  # all at once
        return [every_op(seed) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        for seed, rounds in enumerate(pool.map(work, range(THREADS))):
            for found in rounds:
                assert all(torch.equal(a, b) for a, b in zip(found, serial[seed], strict=True))


def test_eight_threads_may_read_one_state_and_one_database():
    rule = pi_rule(lr=1e-2, decay=1e-2, temperature=1.0, direction="max")
    state = pi_state(1000, rule, capacity=8)
    pi_step_(state, rule, torch.arange(8), torch.rand(8))
    database = torch.randn(500, 16)
    wanted = pi_weight(state, rule), *knn(database[:50], database, 5)
    with ThreadPoolExecutor(THREADS) as pool:
        tasks = [
            pool.submit(lambda: (pi_weight(state, rule), *knn(database[:50], database, 5)))
            for _ in range(THREADS * ROUNDS)
        ]
        for task in tasks:
            assert all(torch.equal(a, b) for a, b in zip(task.result(), wanted, strict=True))


class Computing(torch.utils.data.Dataset):
    """A data set whose items are computed by an operation, in the worker."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        z = torch.randn(9, 5, generator=torch.Generator().manual_seed(index))
        return sample_loss(z, torch.arange(9) % 5), knn(z, z, 3)[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_call_operations_and_see_replaced_labels(method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    sample_loss(torch.randn(9, 5), torch.arange(9) % 5)  # the parent has used them before the fork
    data = IndexedDataset(Computing(), labels=torch.zeros(24, dtype=torch.int64))
    loader = DataLoader(
        data, 6, num_workers=2, multiprocessing_context=method, persistent_workers=True
    )
    for label in (0, 1):  # the same workers, after the labels have changed
        data.set_labels(torch.full((24,), label))
        batches = list(loader)
        assert torch.cat([index for _, _, index in batches]).tolist() == list(range(24))
        assert torch.cat([labels for _, labels, _ in batches]).tolist() == [label] * 24
        for x, _, index in batches:
            assert torch.equal(x, torch.stack([Computing()[int(i)][0] for i in index]))


def resident():
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures by Linux's /proc")
def test_memory_stays_flat_over_ten_thousand_steps():
    """A whole training step: weights, weighted loss, backward, ALSO with its pi step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = ALSO(model.parameters(), n=200, lr=1e-3)
    x, target = torch.randn(200, 8), torch.arange(200) % 4
    order = torch.randint(0, 200, (64, 16))

    def train(steps):
        for step in range(steps):
            index = order[step % len(order)]
            weight = optimizer.loss_weight(index)
            total, losses = weighted_loss(model(x[index]), target[index], weight)
            optimizer.zero_grad()
            total.backward()
            optimizer.step(index=index, losses=losses)

    train(1000)  # pools and caches fill
    gc.collect()
    before = resident()
    train(STEPS)
    gc.collect()
    grown = resident() - before
    print(f"{STEPS} steps: {grown / 1024:+.0f} KiB")
    assert grown < GROWTH
    assert bool(torch.isfinite(optimizer.weights.log_pi()).all())
