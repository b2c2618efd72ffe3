"""BatchALSO: what ALSO does, for trainers that call step() without arguments."""

import copy
import pickle

import pytest
import torch
from torch import nn

from als_ext import ALSO
from als_ext.integrations.also import BatchALSO
from als_ext.ops import weighted_loss

N, B = 60, 12


def problem(seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(N, 5, generator=g), torch.randint(3, (N,), generator=g)
    order = [torch.randperm(N, generator=g) for _ in range(3)]
    return x, y, [index for epoch in order for index in epoch.split(B)]


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def reference(batches, x, y, **settings):
    net = model()
    optimizer = ALSO(net.parameters(), n=N, pi_lr=0.1, **settings)
    for index in batches:
        loss, losses = weighted_loss(net(x[index]), y[index], optimizer.loss_weight(index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(index=index, losses=losses)
    return net, optimizer


def assert_same(net, optimizer, other_net, other):
    assert torch.equal(optimizer.weights.log_pi(), other.weights.log_pi())
    for a, b in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(a, b)


def backward(optimizer, net, x, y, index):
    optimizer.zero_grad()
    optimizer.weighted_loss(net(x[index]), y[index], index)[0].backward()


@pytest.mark.parametrize("mode", ["optimistic", "descent-ascent"])
def test_step_without_arguments_is_the_step_of_also(mode):
    x, y, batches = problem()
    net = model()
    optimizer = BatchALSO(net.parameters(), n=N, pi_lr=0.1, mode=mode)
    for index in batches:
        backward(optimizer, net, x, y, index)
        optimizer.step()
    assert_same(net, optimizer, *reference(batches, x, y, mode=mode))


def test_step_with_a_closure():
    x, y, batches = problem()
    net = model()
    optimizer = BatchALSO(net.parameters(), n=N, pi_lr=0.1)
    for at, index in enumerate(batches):

        def closure(index=index):
            backward(optimizer, net, x, y, index)
            return "anything"

        with torch.no_grad():  # as some trainers call it
            optimizer.step(closure) if at % 2 else optimizer.step(closure=closure)
    assert_same(net, optimizer, *reference(batches, x, y))


def test_accumulated_batches_are_one_step():
    x, y, batches = problem()
    net = model()
    optimizer = BatchALSO(net.parameters(), n=N, pi_lr=0.1)
    for index in batches:
        optimizer.zero_grad()
        for part in index.split(B // 3):
            (optimizer.weighted_loss(net(x[part]), y[part], part)[0] / 3).backward()
        optimizer.step()
    whole, expected = reference(batches, x, y)
    torch.testing.assert_close(optimizer.weights.log_pi(), expected.weights.log_pi())
    for a, b in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hooks_of_the_user_run_once():
    ALSO(model().parameters(), n=N)  # torch hooks ALSO.step from the first instance on
    x, y, batches = problem()
    net = model()
    optimizer = BatchALSO(net.parameters(), n=N)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    backward(optimizer, net, x, y, batches[0])
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_go_on(how):
    x, y, batches = problem()
    net = model()
    optimizer = BatchALSO(net.parameters(), n=N, pi_lr=0.1)
    for at, index in enumerate(batches):
        if at == 4 and how == "deepcopy":
            net, optimizer = copy.deepcopy((net, optimizer))
        elif at == 4 and how == "pickle":
            net, optimizer = pickle.loads(pickle.dumps((net, optimizer)))
        elif at == 4:
            other = copy.deepcopy(net)
            fresh = BatchALSO(other.parameters(), n=N, pi_lr=0.1)
            fresh.load_state_dict(optimizer.state_dict())
            net, optimizer = other, fresh
        backward(optimizer, net, x, y, index)
        optimizer.step()
    assert_same(net, optimizer, *reference(batches, x, y))


def test_a_scheduler_and_a_gradient_scaler_drive_it():
    x, y, batches = problem()
    net = model()
    optimizer = BatchALSO(net.parameters(), n=N, pi_lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for index in batches:
        optimizer.zero_grad()
        scaler.scale(optimizer.weighted_loss(net(x[index]), y[index], index)[0]).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    assert_same(net, optimizer, *reference(batches, x, y))


def test_what_is_not_a_training_step_is_not_remembered():
    x, y, batches = problem()
    net = model()
    optimizer = BatchALSO(net.parameters(), n=N)
    with torch.no_grad():
        total, losses = optimizer.weighted_loss(net(x[:4]), y[:4], torch.arange(4))
    torch.testing.assert_close(total, losses.mean())  # uniform weights
    with pytest.raises(TypeError, match=r"BatchALSO\.step: expected a batch since the last step"):
        optimizer.step()
    backward(optimizer, net, x, y, batches[0])
    optimizer.step()
    with pytest.raises(TypeError, match="expected a batch"):
        optimizer.step()


def test_errors_name_the_argument():
    x, y, _ = problem()
    net = model()
    optimizer = BatchALSO(net.parameters(), n=N)
    logits = net(x[:4])
    with pytest.raises(TypeError, match="index: expected a tensor int64"):
        optimizer.weighted_loss(logits, y[:4], None)
    with pytest.raises(TypeError, match="label: expected a tensor int64"):
        optimizer.weighted_loss(logits, None, torch.arange(4))
    with pytest.raises(ValueError, match=r"index: expected one number a row of logits, \[4\]"):
        optimizer.weighted_loss(logits, y[:4], torch.arange(3))
    with pytest.raises(ValueError, match="index"):
        optimizer.weighted_loss(logits, y[:4], torch.tensor([0, 1, 2, N]))
    with pytest.raises(TypeError, match="index"):
        optimizer.weighted_loss(logits, y[:4], torch.arange(4).int())
