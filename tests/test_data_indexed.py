import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from als_ext.data import IndexedDataset, TensorBatches

N = 23


class Images(Dataset):
    """A map-style data set in torchvision's shape: items (x, y), labels in .targets."""

    def __init__(self):
        self.targets = [i % 3 for i in range(N)]

    def __len__(self):
        return N

    def __getitem__(self, index):
        if index >= N:
            raise IndexError(index)
        return torch.full((2,), float(index)), self.targets[index]


def inputs():
    return torch.arange(N * 2.0).view(N, 2)


def labels():
    return torch.arange(N) % 4


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: IndexedDataset(inputs(), labels()), labels()),
        (lambda: IndexedDataset(inputs(), labels().numpy().astype(np.uint8)), labels()),
        (lambda: IndexedDataset(TensorDataset(inputs(), labels())), labels()),
        (lambda: IndexedDataset(TensorDataset(inputs()), labels()), labels()),
        (lambda: IndexedDataset(Images()), torch.arange(N) % 3),
        (lambda: IndexedDataset(Images(), labels()), labels()),
    ],
)
def test_items_carry_their_index(make, expected):
    data = make()
    assert len(data) == N
    x, label, index = data[5]
    assert x.shape == (2,)
    assert label.dtype == torch.int64
    assert (label, index) == (expected[5], 5)
    assert data[-1][2] == N - 1
    for outside in (N, -N - 1):
        with pytest.raises(IndexError):
            data[outside]


def test_iterating_ends():
    assert [index for _, _, index in IndexedDataset(inputs(), labels())] == list(range(N))


def test_labels_are_its_own():
    given = labels()
    data = IndexedDataset(TensorDataset(inputs(), given))
    data.set_labels(torch.ones(N, dtype=torch.int64))
    assert torch.equal(given, labels())
    label = data[0][1]
    data.set_labels(labels())
    assert label == 1  # a fetched label does not change afterwards


def test_set_labels_at_indices():
    data = IndexedDataset(inputs(), labels())
    live = data.labels
    data.set_labels(torch.tensor([9, 8]), index=torch.tensor([3, 0]))
    assert (live[3], live[0]) == (9, 8)
    assert int((live != labels()).sum()) == 2
    data.set_labels(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    data.set_labels(np.array([5]), index=np.array([1], dtype=np.int32))
    assert live[1] == 5


@pytest.mark.parametrize(
    ("new", "index", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), None, ValueError, "expected 23 labels, got 3"),
        (torch.full((N,), -1), None, ValueError, "entry 0: expected a label at least 0, got -1"),
        (torch.zeros(N), None, TypeError, "expected integer class labels, got float32"),
        (torch.tensor([1]), torch.tensor([N]), ValueError, r"index: expected values in \[0, 23\)"),
        (torch.tensor([1]), torch.tensor([-1]), ValueError, r"index: expected values in \[0, 23\)"),
        (torch.tensor([1, 2]), torch.tensor([4, 4]), ValueError, "index: expected distinct"),
        (torch.tensor([1, 2]), torch.tensor([4]), ValueError, "expected 1 labels, got 2"),
        (torch.tensor([1]), torch.tensor([4.0]), TypeError, "index: expected integer .*float32"),
        (torch.tensor([1]), torch.tensor([True]), TypeError, "index: expected integer .*bool"),
        (torch.tensor([1]), torch.tensor(4), ValueError, r"index: expected shape \[m\]"),
        (torch.tensor([1]), [4], TypeError, "index: expected integer .*list"),
    ],
)
def test_bad_set_labels_changes_nothing(new, index, error, message):
    data = IndexedDataset(inputs(), labels())
    with pytest.raises(error, match=message):
        data.set_labels(new, index)
    assert torch.equal(data.labels, labels())


def test_bad_sources():
    with pytest.raises(ValueError, match="labels: expected integer labels"):
        IndexedDataset(inputs())
    with pytest.raises(ValueError, match=r"TensorDataset, which has no \.targets, got None"):
        IndexedDataset(TensorDataset(inputs()))
    with pytest.raises(ValueError, match="expected 23 labels, got 4"):
        IndexedDataset(inputs(), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="source: expected a tensor or a map-style data set"):
        IndexedDataset(iter([1]), labels())


def test_workers_see_replaced_labels():
    """Persistent workers hold their own copy of the data set object, but not of the labels."""
    data = IndexedDataset(inputs(), labels())
    loader = DataLoader(data, batch_size=5, num_workers=2, persistent_workers=True)
    for shift in (0, 7):
        data.set_labels(labels() + shift)
        x, y, index = (torch.cat(column) for column in zip(*loader, strict=True))
        assert torch.equal(index, torch.arange(N))
        assert torch.equal(x, inputs())
        assert torch.equal(y, labels() + shift)


# ---- TensorBatches


def batches(**change):
    options = {"batch_size": 5, "seed": 3} | change
    return TensorBatches(inputs(), labels(), **options)


def taken(source, count=None):
    result = []
    for batch in source:
        result.append(batch)
        if len(result) == count:
            break
    return result


def assert_same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        for s, t in zip(left, right, strict=True):
            assert torch.equal(s, t)


@pytest.mark.parametrize("batch_size", [1, 5, N, N + 1])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_sample_once(batch_size, shuffle):
    source = batches(batch_size=batch_size, shuffle=shuffle)
    epoch = taken(source)
    assert len(epoch) == len(source)
    x, y, index = (torch.cat(column) for column in zip(*epoch, strict=True))
    assert torch.equal(index.sort().values, torch.arange(N))
    assert torch.equal(index, torch.arange(N)) == (not shuffle)
    assert torch.equal(x, inputs()[index])
    assert torch.equal(y, labels()[index])
    assert index.dtype == torch.int64


def test_drop_last():
    source = batches(drop_last=True)
    assert [len(index) for _, _, index in source] == [5, 5, 5, 5]
    assert len(source) == 4
    assert len(batches(batch_size=N, drop_last=True)) == 1


def test_order_depends_on_seed_and_epoch_only():
    def orders(seed, epochs=2):
        source = batches(seed=seed)
        return [torch.cat([index for _, _, index in source]).tolist() for _ in range(epochs)]

    first = orders(0)
    torch.manual_seed(123)  # the global state plays no part
    assert orders(0) == first
    all_orders = [order for seed in range(4) for order in orders(seed)]
    assert len({tuple(order) for order in all_orders}) == 8
    state = torch.get_rng_state()
    orders(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_resumes_bitwise_after_every_batch():
    whole = batches()
    stream = [batch for _ in range(3) for batch in whole]
    for done in range(len(stream) + 1):
        source = batches()
        rest = done
        while rest:
            rest -= len(taken(source, rest))
        # Through pickle, as a checkpoint does.
        state = pickle.loads(pickle.dumps(source.state_dict()))
        resumed = batches()
        resumed.load_state_dict(state)
        again = []
        while resumed.epoch < 3:
            again += taken(resumed)
        assert_same(again, stream[done:])


def test_state_taken_inside_the_loop_counts_the_batch_in_hand():
    source = batches()
    for count, _ in enumerate(source, start=1):
        state = source.state_dict()
        assert (state["epoch"], state["position"]) == (0, count)
    assert (source.epoch, source.position) == (1, 0)


def test_a_state_at_the_end_of_an_epoch_goes_on_with_the_next():
    source = batches()
    for _ in source:
        state = source.state_dict()
    resumed = batches()
    resumed.load_state_dict(state)
    assert taken(resumed) == []  # the rest of an epoch that is done
    assert_same(taken(resumed), taken(source))


def test_set_epoch_starts_afresh():
    source = batches()
    first = taken(source)
    taken(source, 2)
    source.set_epoch(0)
    assert_same(taken(source), first)
    with pytest.raises(ValueError, match="epoch: expected at least 0, got -1"):
        source.set_epoch(-1)


def test_labels_are_live():
    data = IndexedDataset(inputs(), labels())
    source = TensorBatches(inputs(), data.labels, batch_size=N)
    data.set_labels(labels() + 10)
    (batch,) = source
    assert torch.equal(batch[1], labels()[batch[2]] + 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 4}, "expected batch_size = 5, got 4"),
        ({"seed": 4}, "expected seed = 3, got 4"),
        ({"n": 22}, "expected n = 23, got 22"),
        ({"shuffle": False}, "expected shuffle = True, got False"),
        ({"drop_last": True}, "expected drop_last = False, got True"),
        ({"position": 6}, r"position in \[0, 5\], got epoch 0 and position 6"),
        ({"epoch": -1}, "got epoch -1"),
    ],
)
def test_a_state_of_another_configuration_is_refused(change, message):
    source = batches()
    taken(source, 2)
    state = batches().state_dict() | change
    with pytest.raises(ValueError, match=message):
        source.load_state_dict(state)
    assert source.position == 2
    del state["position"]
    with pytest.raises(ValueError, match="expected an entry 'position'"):
        source.load_state_dict(state)


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        (inputs(), labels().int(), {}, TypeError, "labels: expected int64, got torch.int32"),
        (inputs(), labels()[:4], {}, ValueError, r"labels: expected shape \[23\], got \[4\]"),
        (inputs()[:0], labels()[:0], {}, ValueError, "x: expected at least one sample"),
        (inputs(), labels(), {"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        (inputs(), labels(), {"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        (
            inputs(),
            labels(),
            {"batch_size": 24, "drop_last": True},
            ValueError,
            "batch_size: expected at most 23 with drop_last, got 24",
        ),
    ],
)
def test_bad_batches(x, y, options, error, message):
    with pytest.raises(error, match=message):
        TensorBatches(x, y, **({"batch_size": 5} | options))


@pytest.mark.cuda
def test_batches_are_the_same_on_both_devices():
    on_cpu = taken(batches())
    source = TensorBatches(inputs().cuda(), labels(), batch_size=5, seed=3)
    on_gpu = taken(source)
    assert all(part.is_cuda for batch in on_gpu for part in batch)
    assert_same([[part.cpu() for part in batch] for batch in on_gpu], on_cpu)
