"""ALSO over processes that split each batch: parameters and pi of one process."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import als_ext
from als_ext.ops import weighted_loss

N, CLASSES, FEATURES = 60, 3, 6
# A weight is float32 in both, and for three processes it is rounded at another place.
CLOSE = {torch.float64: 1e-7, torch.float32: 1e-6}


def data(dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, FEATURES, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (N,), generator=g)


def network(dtype):
    torch.manual_seed(0)
    layers = nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES)
    return nn.Sequential(*layers).to(dtype)


def settings(options):
    return {"n": N, "lr": 1e-2, "pi_lr": 0.3, **options}


def step(model, optimizer, x, y, index, names=None):
    loss, losses = weighted_loss(model(x[index]), y[index], optimizer.loss_weight(names(index)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(index=names(index), losses=losses)


def same(index):
    return index


def into_groups(index):
    return index % 7


def state(model, optimizer):
    optimizer.eval()
    found = [p.detach().clone() for p in model.parameters()]
    optimizer.train()
    return found, optimizer.weights.pi(), optimizer.weights.state_dict()["u"]


def alone(batches, dtype=torch.float64, names=same, **options):
    x, y = data(dtype)
    model = network(dtype)
    optimizer = als_ext.ALSO(model.parameters(), **settings(options))
    for index in batches:
        step(model, optimizer, x, y, index, names)
    return state(model, optimizer)


def together(group, parts, dtype, names, options, checkpoint=None):
    """``parts``: for each step the index of every process."""
    x, y = data(dtype)
    model = network(dtype)
    wrapped = DistributedDataParallel(model, process_group=group)
    optimizer = als_ext.ALSO(model.parameters(), group=group, **settings(options))
    if checkpoint is not None:
        saved = torch.load(io.BytesIO(checkpoint), weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for part in parts:
        step(wrapped, optimizer, x, y, part[dist.get_rank(group)], names)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return *state(model, optimizer), file.getvalue()


def batches(steps, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randperm(N, generator=g)[:size] for _ in range(steps)]


def cut(index, members):
    return list(index.tensor_split(members))


def assert_same(found, want, close):
    for parameters, pi, u, *_ in found:
        for got, expected in zip(parameters, want[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=close)
        torch.testing.assert_close(pi, want[1], rtol=0, atol=close)
        assert torch.equal(u, found[0][2])  # every process has the same bits
        assert all(map(torch.equal, parameters, found[0][0]))


def check(workers, members, joint, parts=None, dtype=torch.float64, names=same, **options):
    parts = parts or [cut(index, members) for index in joint]
    size = max(len(index) for part in parts for index in part)
    both = {"batch_size": size + 2, **options}
    found = workers.run(members, together, parts, dtype, names, both)
    options.pop("repeats", None)
    want = alone(joint, dtype, names, **options)
    assert (want[1] - 1 / len(want[1])).abs().max() > 1e-3  # pi has moved
    assert_same(found, want, CLOSE[dtype])
    return found, want


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("mode", ["optimistic", "descent-ascent"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_split_batches_give_what_joint_ones_give(workers, members, mode, dtype):
    check(workers, members, batches(25, 16), dtype=dtype, mode=mode)


def test_two_processes_and_float64_agree_to_rounding(workers):
    found, want = check(workers, 2, batches(25, 16))
    for got, expected in zip(found[0][0], want[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)  # factor 2 is exact


@pytest.mark.parametrize(
    "options",
    [{"weights_mode": "lazy"}, {"loss_scale": 3.0}, {"direction": "min"}, {"temperature": 1.2}],
    ids=lambda options: next(iter(options)),
)
def test_options(workers, options):
    check(workers, 3, batches(10, 9), **options)


def test_batches_of_any_size_and_empty_ones(workers):
    joint = batches(12, 10)
    parts = [[index[:7], index[7:7], index[7:]] for index in joint]
    check(workers, 3, joint, parts)


def test_padding_counts_once(workers):
    samples = range(20)
    each = [
        torch.tensor(list(DistributedSampler(samples, 3, rank, shuffle=False))) for rank in range(3)
    ]
    everything = torch.cat(each)
    assert len(everything) == 21  # 0 is there twice
    first = torch.tensor([at for at, i in enumerate(everything) if i not in everything[:at]])
    joint, parts = [everything[first]] * 8, [each] * 8
    check(workers, 3, joint, parts)
    with pytest.raises(AssertionError):  # and it does matter
        check(workers, 3, joint, parts, repeats="add")


def test_repeats_in_one_process_of_two(workers):
    joint = batches(8, 10)
    parts = [[torch.cat([index[:5], index[:2]]), index[4:]] for index in joint]
    check(workers, 2, joint, parts)


def test_groups_of_samples_add_up(workers):
    check(workers, 2, batches(10, 12), names=into_groups, n=7, repeats="add")


def test_checkpoint_goes_on_with_another_number_of_processes(workers):
    joint = batches(18, 12)
    options = {"batch_size": 12}
    parts = {members: [cut(index, members) for index in joint] for members in (1, 2, 3)}
    saved = workers.run(2, together, parts[2][:6], torch.float64, same, options)[1][-1]
    saved = workers.run(3, together, parts[3][6:12], torch.float64, same, options, saved)[2][-1]
    found = workers.run(1, together, parts[1][12:], torch.float64, same, options, saved)
    want = alone(joint)
    assert_same(found, want, CLOSE[torch.float64])
    model = network(torch.float64)  # and without any group
    optimizer = als_ext.ALSO(model.parameters(), **settings({}))
    checkpoint = torch.load(io.BytesIO(saved), weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for index in joint[12:]:
        step(model, optimizer, *data(torch.float64), index, same)
    assert_same([state(model, optimizer)], want, CLOSE[torch.float64])


# --- the weights by themselves --------------------------------------------------------------------


def weights_of(group, **options):
    return als_ext.SampleWeights(10, lr=0.5, group=group, batch_size=4, **options)


def shares(group, parts):
    return weights_of(group).batch_share(parts[dist.get_rank(group)])


def test_batch_share_makes_the_mean_of_the_joint_batch(workers):
    parts = [torch.tensor([3, 1, 3]), torch.tensor([1, 5, 6, 7])]
    found = workers.run(2, shares, parts)
    assert [f.tolist() for f in found] == [
        pytest.approx([0.4, 0.4, 0]),
        pytest.approx([0, 0.4, 0.4, 0.4]),
    ]


def stepped(group, indices, losses, found_inf):
    rank = dist.get_rank(group)
    weights = weights_of(group)
    weights.update_(indices[rank], losses[rank], found_inf=found_inf[rank])
    return weights.pi(), int(weights.skipped)


def test_an_overflow_in_one_process_skips_the_step_of_all(workers):
    arguments = [torch.tensor([1]), torch.tensor([2])], [torch.ones(1), torch.ones(1)]
    for flags, moved in (([0.0, 1.0], False), ([0.0, 0.0], True)):
        for pi, _ in workers.run(2, stepped, *arguments, [torch.tensor([f]) for f in flags]):
            assert bool((pi != pi[0]).any()) == moved


def test_losses_that_are_not_finite_are_left_out_once(workers):
    index = [torch.tensor([1, 2]), torch.tensor([2, 3])]
    losses = [torch.tensor([float("nan"), 1.0]), torch.tensor([float("inf"), 1.0])]
    want = als_ext.SampleWeights(10, lr=0.5)
    want.update_(torch.tensor([1, 2, 3]), torch.tensor([float("nan"), 1.0, 1.0]))
    for pi, skipped in workers.run(2, stepped, index, losses, [None, None]):
        assert torch.equal(pi, want.pi())
        assert skipped == 1


def test_an_empty_joint_batch_only_decays(workers):
    nothing = [torch.empty(0, dtype=torch.int64)] * 2, [torch.empty(0)] * 2
    for pi, _ in workers.run(2, stepped, *nothing, [None, None]):
        torch.testing.assert_close(pi, torch.full((10,), 0.1))


def test_an_index_out_of_range_is_an_error_in_all(workers):
    for bad in (10, -1):
        index = [torch.tensor([bad]), torch.tensor([2])]
        answers = workers.answers(2, stepped, index, [torch.ones(1)] * 2, [None, None])
        for kind, name, text, _ in answers:
            assert (kind, name) == ("error", "ValueError")
            assert f"got {bad} " in text


def reset(group, indices):
    weights = weights_of(group)
    weights.update_(torch.arange(4), torch.arange(4.0))
    weights.reset_(indices[dist.get_rank(group)])
    return weights.pi()


def test_reset_is_of_what_any_process_names(workers):
    want = als_ext.SampleWeights(10, lr=0.5)
    want.update_(torch.arange(4), torch.arange(4.0))
    want.reset_(torch.tensor([3, 2, 9]))
    parts = [torch.tensor([3]), torch.tensor([], dtype=torch.int64), torch.tensor([2, 9])]
    for pi in workers.run(3, reset, parts):
        assert torch.equal(pi, want.pi())


def message(call):
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return "no error"


def refused(group):
    weights = weights_of(group)
    assert copy.deepcopy(weights).joint is weights.joint
    calls = (
        lambda: als_ext.SampleWeights(10, group=group),
        lambda: weights_of(group, repeats="twice"),
        lambda: weights.batch_share(torch.arange(5)),
        lambda: pickle.dumps(weights),
        lambda: als_ext.SampleWeights(10, group=group, batch_size=4 + dist.get_rank(group)),
        lambda: als_ext.SampleWeights(10 + dist.get_rank(group), group=group, batch_size=4),
    )
    return list(map(message, calls))


def test_errors(workers):
    for texts in workers.run(2, refused):
        for text, match in zip(
            texts,
            [
                "batch_size: expected, with a group, the most samples",
                "repeats: expected one of 'once', 'add', got 'twice'",
                "index: expected at most batch_size = 4 entries, got 5",
                "group: a group of processes cannot be pickled",
                "batch_size: expected the same on every process, got 4 on process 0 and 5",
                "n: expected the same on every process, got 10 on process 0 and 11",
            ],
            strict=True,
        ):
            assert match in text
    with pytest.raises(ValueError, match="batch_size: expected >= 1, got 0"):
        als_ext.SampleWeights(10, batch_size=0)
    with pytest.raises(ValueError, match="repeats: expected one of 'once', 'add'"):
        als_ext.ALSO([torch.ones(1, requires_grad=True)], 10, repeats="twice")
    als_ext.ALSO([torch.ones(1, requires_grad=True)], 10, batch_size=3, repeats="add")


def test_a_group_that_was_not_made_yet_is_missed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"group: expected that of the 2.*init_process_group first"
    ):
        als_ext.SampleWeights(10, group=None, batch_size=3)
