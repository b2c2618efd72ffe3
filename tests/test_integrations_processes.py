"""Lightning and Hugging Face in several processes: the weights and labels of one process."""

import pytest
import spread_trainers
import torch
from blobs import blobs
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset
from workers import torchrun

import als_ext
from als_ext.data import IndexedDataset
from als_ext.integrations._relabel import Relabelling, evaluating

pytestmark = pytest.mark.usefixtures("one_thread")


def spread(name, folder):
    """What both processes of one start of torchrun found."""
    torchrun("spread_trainers.py", name, folder, OMP_NUM_THREADS="1")
    return [torch.load(folder / f"found{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "package"), [("lightning", "lightning"), ("hugging_face", "transformers")]
)
def test_several_processes_train_what_one_does(tmp_path, name, package):
    pytest.importorskip(package, reason=f"needs the extra als_ext[{package}]")
    train = getattr(spread_trainers, name)
    want = train(tmp_path)
    assert len(want["history"]["sample"]) > 50
    # An incomplete last group of batches is divided by their full number: another training.
    accumulated = train(tmp_path, accumulate=2)
    train(tmp_path, epochs=spread_trainers.STOP)
    for found in spread(name, tmp_path):
        assert "group: expected one of all 2 processes, which share" in found["refused"]
        assert_same(found["accumulated"], accumulated)
        for kind in ("whole", "resumed", "resumed by those who saved"):
            assert_same(found[kind], want)


def assert_same(got, want):
    assert torch.equal(got["labels"], want["labels"])
    for key in ("step", "epoch", "sample", "old", "new"):
        assert torch.equal(got["history"][key], want["history"][key]), key
    torch.testing.assert_close(got["log_pi"], want["log_pi"], rtol=1e-6, atol=1e-6)
    for a, b in zip(got["parameters"], want["parameters"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def of_the_first(group):
    import torch.distributed as dist

    rank = dist.get_rank(group)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    whole = torch.arange(16.0).view(4, 4) + 100 * rank
    model.register_buffer("strided", whole[:, :2])
    model[1].running_mean.fill_(rank + 1.0)
    model[1].num_batches_tracked.fill_(rank)
    with evaluating(model, group):
        inside = (model[1].running_mean.clone(), int(model[1].num_batches_tracked))
        assert torch.equal(model.strided, torch.arange(16.0).view(4, 4)[:, :2])
        assert not model.training
    assert model.training
    assert torch.equal(whole, torch.arange(16.0).view(4, 4) + 100 * rank)
    return inside, (model[1].running_mean, int(model[1].num_batches_tracked))


def test_all_embed_with_the_buffers_of_the_first(workers):
    for rank, (inside, after) in enumerate(workers.run(3, of_the_first)):
        assert inside[0].tolist() == [1.0, 1.0]
        assert inside[1] == 0
        assert after[0].tolist() == [rank + 1.0] * 2
        assert after[1] == rank


def rows_of(group, n):
    return Relabelling(
        IndexedDataset(torch.zeros(n, 1), torch.zeros(n).long()), 2, 1, 1, None
    ).rows(group)


@pytest.mark.parametrize("n", [3, 10])
def test_each_process_has_its_part_of_the_rows(workers, n):
    parts = workers.run(3, rows_of, n)
    assert [row for part in parts for row in part] == list(range(n))
    assert {len(part) for part in parts} <= {n // 3, n // 3 + 1}
    assert rows_of(None, n) == range(n)


def refused_rows(group):
    with pytest.raises(ValueError, match="dataset: expected at least a sample for each of 3"):
        rows_of(group, 2)
    return True


def test_fewer_samples_than_processes_are_refused_in_all(workers):
    assert workers.run(3, refused_rows) == [True] * 3


def correct_alone(group, x, given):
    """Each process has weights of its own."""
    relabelling = Relabelling(IndexedDataset(x, given), 3, 1, 1, None)
    own = relabelling.rows(group)
    optimizer = als_ext.ALSO([nn.Parameter(torch.zeros(1))], n=len(x))
    with pytest.raises(ValueError, match="group: expected one of all 2 processes, which share"):
        relabelling.correct(x[own.start : own.stop], optimizer, 1, group)
    with pytest.raises(ValueError, match="group: expected that of the 3 processes, as batch_size"):
        als_ext.SampleWeights(4, batch_size=2)  # all three are started, whatever the group
    plain = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    relabelling.correct(x[own.start : own.stop], plain, 1, group)
    return relabelling.dataset.labels


def test_weights_that_are_not_shared_are_refused_and_others_do_without(workers):
    x, given, _ = blobs(60)
    alone = als_ext.LabelCorrector(given, 3)
    alone.step(x, epoch=1)
    for labels in workers.run(2, correct_alone, x, given):
        assert torch.equal(labels, alone.labels)


def test_plain_samples_are_those_of_the_data_set():
    train_set = IndexedDataset(torch.zeros(5, 1), torch.zeros(5).long())
    with pytest.raises(ValueError, match=r"plain: expected the 5 samples of dataset.*got 4"):
        Relabelling(train_set, 2, 1, 1, None, TensorDataset(torch.zeros(4, 1)))

    class Stream(IterableDataset):
        """No length."""

        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match=r"plain: expected the 5 samples.*got one without a len"):
        Relabelling(train_set, 2, 1, 1, None, Stream())
