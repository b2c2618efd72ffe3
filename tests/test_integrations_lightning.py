"""Lightning does what a plain loop does, corrects labels, holds the right point and resumes."""

import copy
import logging

import pytest
import torch
from blobs import CLASSES, FEATURES, blobs
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning", reason="needs the extra als_ext[lightning]")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import als_ext
from als_ext.data import IndexedDataset
from als_ext.integrations.lightning import (
    AlsoMixin,
    BatchALSO,
    CorrectionCallback,
)
from als_ext.models import MLP

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
N, B = 300, 30
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(AlsoMixin, LightningModule):
    def __init__(self, n=N, dropout=0.0, **also):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = MLP((FEATURES,), CLASSES, hidden=(32, 16))
        self.n, self.also = n, {"pi_lr": 0.1, "lr": 3e-3, "weight_decay": 0.0, **also}
        self.batches = []

    def forward(self, x):
        return self.net(x)

    def embed(self, x):
        return self.net.embed(x)

    def training_step(self, batch, batch_idx):
        x, label, index = batch
        self.batches.append(copy.deepcopy((x, label, index)))
        return self.weighted_loss(self(x), label, index)[0]

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return BatchALSO(self.parameters(), n=self.n, **self.also)

    @property
    def optimizer(self):
        return self.optimizers(use_pl_optimizer=False)


class EpochOrder(torch.utils.data.Sampler):
    """An order that depends on the epoch alone: what a resumed run has to see again."""

    def __init__(self, n):
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.n

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(self.n, generator=generator).tolist())


def loader(train_set, **settings):
    return DataLoader(train_set, B, sampler=EpochOrder(len(train_set)), **settings)


def trainer(*callbacks, epochs=2, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    base = {"accelerator": "cpu", "enable_checkpointing": False}
    return Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**quiet, **base, **settings})


def seen(net, n, size):
    """The labels that the batches of the last epoch had."""
    last = net.batches[-n // size :]
    label, index = (torch.cat([batch[at] for batch in last]) for at in (1, 2))
    return label[index.argsort()]


def plain_loop(batches, accumulate=1):
    module = Net()
    optimizer = als_ext.ALSO(module.parameters(), n=N, pi_lr=0.1, lr=3e-3, weight_decay=0.0)
    for start in range(0, len(batches), accumulate):
        group = zip(*batches[start : start + accumulate], strict=True)
        x, label, index = (torch.cat(part) for part in group)
        loss, losses = als_ext.ops.weighted_loss(module(x), label, optimizer.loss_weight(index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(index=index, losses=losses)
    optimizer.eval()
    return module, optimizer


def assert_same(net, other_weights, other, **tolerance):
    compare = torch.testing.assert_close
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    compare(net.optimizer.weights.log_pi(), other_weights.log_pi(), **tolerance)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        compare(a, b, **tolerance)


@pytest.mark.parametrize("accumulate", [1, 5])
def test_same_weights_as_the_plain_loop(accumulate):
    x, given, _ = blobs(N)
    net = Net()
    fit = trainer(accumulate_grad_batches=accumulate)
    fit.fit(net, loader(IndexedDataset(x, given)))
    assert len(net.batches) == 2 * N // B
    assert not torch.equal(net.batches[0][2], net.batches[N // B][2])
    module, optimizer = plain_loop(net.batches, accumulate)
    tolerance = {} if accumulate == 1 else {"rtol": 1e-4, "atol": 1e-4}
    assert_same(net, optimizer.weights, module, **tolerance)


def test_wrong_labels_become_right():
    x, given, true = blobs(600)
    train_set = IndexedDataset(x, given)
    correction = CorrectionCallback(train_set, CLASSES, warmup=3, period=2)
    net = Net(n=600, pi_lr=1e-3)
    trainer(correction, epochs=12).fit(net, DataLoader(train_set, 32, shuffle=True))
    assert (given == true).float().mean() < 0.65
    assert (train_set.labels == true).float().mean() > 0.9
    history = correction.corrector.history
    assert history.epoch.min() == 3
    assert history.epoch.max() < 12
    assert set(((history.epoch - 3) % 2).tolist()) == {0}
    assert torch.equal(seen(net, 600, 32), train_set.labels)  # it trained on what was corrected


def test_workers_see_new_labels():
    x, given, _ = blobs(N, rate=0.3)
    train_set = IndexedDataset(x, given)
    net = Net()
    trainer(CorrectionCallback(train_set, CLASSES, warmup=1, period=1), epochs=3).fit(
        net, loader(train_set, num_workers=1, persistent_workers=True)
    )
    assert torch.equal(seen(net, N, B), train_set.labels)
    assert not torch.equal(train_set.labels, given)


class Points(Callback):
    """Whether the optimizer is in its training state, where it matters."""

    def __init__(self):
        self.seen = {}

    def _note(self, name, net):
        self.seen.setdefault(name, set()).add(net.optimizer.training)

    def on_before_backward(self, trainer, pl_module, loss):
        self._note("step", pl_module)

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self._note("validation", pl_module)

    def on_train_end(self, trainer, pl_module):
        self._note("end", pl_module)


def test_theta_where_it_is_looked_at(tmp_path):
    x, given, _ = blobs(N)
    net, points = Net(), Points()
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit = trainer(points, checkpoint, val_check_interval=4, enable_checkpointing=True)
    validation = DataLoader(TensorDataset(x, given), 100)
    fit.fit(net, loader(IndexedDataset(x, given)), validation)
    assert points.seen == {"step": {True}, "validation": {False}, "end": {False}}
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 2
    for path in paths:
        saved = torch.load(path, weights_only=True)
        base = [entry["base"] for entry in saved["optimizer_states"][0]["state"].values()]
        for theta, parameter in zip(base, saved["state_dict"].values(), strict=True):
            assert torch.equal(theta, parameter)


@pytest.mark.parametrize("when", ["epoch", "validation", "steps"])
def test_resume_is_the_unbroken_run(tmp_path, when):
    x, given, _ = blobs(N, rate=0.3)

    def run(epochs, *callbacks, checkpoint=None):
        train_set = IndexedDataset(x, given)
        correction = CorrectionCallback(train_set, CLASSES, warmup=2, period=1)
        net = Net(pi_lr=0.02)
        validation = DataLoader(TensorDataset(x, given), 100) if when == "validation" else None
        fit = trainer(correction, *callbacks, epochs=epochs, enable_checkpointing=bool(callbacks))
        fit.fit(net, loader(train_set), validation, ckpt_path=checkpoint, weights_only=True)
        return net, train_set, correction, fit

    whole, labels, _, _ = run(6)
    # After 30 steps: at the end of epoch 3, before its hooks, with the half point in the module.
    every = {"every_n_train_steps": 30} if when == "steps" else {"every_n_epochs": 3}
    run(6, Stop(4), ModelCheckpoint(tmp_path, filename="kept", **every))
    again, relabelled, correction, fit = run(6, checkpoint=tmp_path / "kept.ckpt")
    assert len(again.batches) == 30
    assert fit.current_epoch == 6
    assert correction.corrector.history.epoch.unique().tolist()[0] == 2
    assert torch.equal(relabelled.labels, labels.labels)
    assert_same(again, whole.optimizer.weights, whole)


class Stop(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def test_embeddings_leave_the_generators_and_the_modes():
    x, given, _ = blobs(N)
    train_set = IndexedDataset(x, given)
    correction = CorrectionCallback(train_set, CLASSES, embedding="net.features.4")
    net = Net()
    net.train()
    net.net.head.eval()
    fit = trainer()
    state = torch.get_rng_state()
    embeddings = correction._embeddings(fit, net, None)
    assert torch.equal(state, torch.get_rng_state())
    assert net.net.features.training
    assert not net.net.head.training
    with torch.no_grad():
        torch.testing.assert_close(embeddings, net.embed(x))


def test_callbacks_of_the_module_stay():
    mine = Callback()

    class Mine(Net):
        def configure_callbacks(self):
            return [mine, *super().configure_callbacks()]

    x, given, _ = blobs(N)
    fit = trainer(epochs=1)
    fit.fit(Mine(), loader(IndexedDataset(x, given)))
    assert mine in fit.callbacks


def test_errors_name_what_is_missing():
    x, given, _ = blobs(N)
    train_set = IndexedDataset(x, given)

    class WithoutIndex(Net):
        def training_step(self, batch, batch_idx):
            return self.weighted_loss(self(batch[0]), batch[1], None)[0]

    with pytest.raises(TypeError, match=r"index: expected a tensor int64 \[B\], got NoneType"):
        trainer().fit(WithoutIndex(), loader(train_set))

    class Adam(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    with pytest.raises(TypeError, match="configure_optimizers: expected one optimizer of type"):
        trainer().fit(Adam(), loader(train_set))

    class NoCallbacks(Net):
        def configure_callbacks(self):
            return []

    with pytest.raises(RuntimeError, match="configure_callbacks: expected"):
        trainer().fit(NoCallbacks(), loader(train_set))
    with pytest.raises(ValueError, match="index"):
        trainer().fit(Net(n=N - 1), loader(train_set))
    other = CorrectionCallback(IndexedDataset(x, given), CLASSES)
    with pytest.raises(ValueError, match="dataset: expected the data set of the Trainer's own"):
        trainer(other).fit(Net(), loader(train_set))
    with pytest.raises(ValueError, match="embedding: expected one of the layers"):
        trainer(CorrectionCallback(train_set, embedding="none")).fit(Net(), loader(train_set))
    with pytest.raises(TypeError, match="dataset: expected an IndexedDataset"):
        CorrectionCallback(TensorDataset(x, given))
    state = CorrectionCallback(train_set, CLASSES).state_dict()
    state["corrector"]["original"] = state["corrector"]["original"][:-1]
    with pytest.raises(ValueError, match="expected 300 labels of 3 classes, got 299"):
        CorrectionCallback(train_set, CLASSES).load_state_dict(state)
