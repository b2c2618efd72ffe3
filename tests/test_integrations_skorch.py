"""skorch does what a plain loop does, corrects labels, holds the right point and resumes."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from blobs import CLASSES, FEATURES, blobs
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

pytest.importorskip("skorch", reason="needs the extra als_ext[skorch]")

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, Checkpoint, EpochScoring, GradientNormClipping, LRScheduler
from skorch.dataset import ValidSplit
from skorch.helper import predefined_split

import als_ext
from als_ext.integrations.skorch import AlsNetClassifier, CorrectionCallback
from als_ext.models import MLP

pytestmark = pytest.mark.usefixtures("one_thread")
N, B = 300, 30


class Net(MLP):
    """Always the same start."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__((FEATURES,), CLASSES, hidden=(32, 16))


def data(n=N, rate=0.4):
    return tuple(part.numpy() for part in blobs(n, rate))


def classifier(*callbacks, **settings):
    base = {"max_epochs": 2, "batch_size": B, "lr": 3e-3, "optimizer__pi_lr": 0.02, "verbose": 0}
    train = {"train_split": None, "callbacks": list(callbacks)}
    return AlsNetClassifier(Net, **{**base, **train, **settings})


def correcting(warmup=2, period=1, **settings):
    return classifier(CorrectionCallback(warmup=warmup, period=period), **settings)


def parameters(net):
    return torch.cat([p.detach().flatten() for p in net.module_.parameters()])


def base(net):
    return torch.cat([net.optimizer_.state[p]["base"].flatten() for p in net.module_.parameters()])


def assert_same(a, b):
    assert torch.equal(parameters(a), parameters(b))
    assert torch.equal(a.optimizer_.weights.log_pi(), b.optimizer_.weights.log_pi())
    assert np.array_equal(a.labels_, b.labels_)


class Keep(Callback):
    """The batches that were trained on, and the point where things are looked at."""

    def initialize(self):
        self.batches_, self.points_ = [], {}
        return self

    def _note(self, name, net):
        self.points_.setdefault(name, set()).add(net.optimizer_.training)

    def on_grad_computed(self, net, named_parameters, batch=None, **_):
        self.batches_.append(copy.deepcopy((*batch, batch.index_)))
        self._note("step", net)

    def on_batch_end(self, net, batch=None, training=None, **_):
        if not training:
            self._note("validation", net)

    def on_epoch_end(self, net, **_):
        self._note("epoch", net)
        assert torch.equal(parameters(net), base(net))

    def on_train_end(self, net, **_):
        self._note("end", net)


def kept(net):
    return dict(net.callbacks_)["Keep"]


OF_CRITERION = {"class_weight": "weight"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"class_weight": torch.tensor([0.5, 1.0, 2.0])},
        {"ignore_index": 1},
    ],
    ids=lambda options: "".join(options),
)
def test_same_weights_as_the_plain_loop(options):
    x, given, _ = data()
    torch.manual_seed(0)
    settings = {f"criterion__{OF_CRITERION.get(k, k)}": value for k, value in options.items()}
    net = classifier(Keep(), iterator_train__shuffle=True, **settings).fit(x, given)
    batches = kept(net).batches_
    assert len(batches) == 2 * N // B
    assert not torch.equal(batches[0][2], batches[N // B][2])
    module = Net()
    optimizer = als_ext.ALSO(module.parameters(), n=N, pi_lr=0.02, lr=3e-3)
    for _, _, index in batches:
        inputs, label = torch.from_numpy(x)[index], torch.from_numpy(given)[index]
        weight = optimizer.loss_weight(index)
        loss, losses = als_ext.ops.weighted_loss(module(inputs), label, weight, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(index=index, losses=losses)
    optimizer.eval()
    assert torch.equal(net.optimizer_.weights.log_pi(), optimizer.weights.log_pi())
    for a, b in zip(net.module_.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_positions_are_those_of_the_training_samples():
    x, given, _ = data()
    split = ValidSplit(0.2, stratified=True, random_state=3)
    net = classifier(Keep(), train_split=split, iterator_train__shuffle=True).fit(x, given)
    rows = net.train_rows_
    assert net.optimizer_.weights.n == len(rows) == 240
    assert not np.array_equal(rows, np.arange(240))
    for inputs, label, index in kept(net).batches_:
        assert np.array_equal(inputs, x[rows[index]])
        assert np.array_equal(label, given[rows[index]])
    log_pi = net.optimizer_.weights.log_pi()
    net.partial_fit(x, given)  # the same split: the weights go on
    assert not torch.equal(log_pi, net.optimizer_.weights.log_pi())
    assert np.array_equal(rows, net.train_rows_)
    net.train_split = ValidSplit(0.2, stratified=True, random_state=4)
    with pytest.raises(ValueError, match="random split a fixed random_state"):
        net.partial_fit(x, given)


def test_wrong_labels_become_right():
    x, given, true = data(600)
    before = given.copy()
    net = correcting(warmup=3, period=2, max_epochs=12, optimizer__pi_lr=1e-3, batch_size=32)
    net = clone(net.set_params(train_split=ValidSplit(6, stratified=True)))
    net.callbacks.append(Keep())
    net.fit(x, given)
    assert np.array_equal(given, before)
    assert (given == true).mean() < 0.65
    assert (net.labels_ == true)[net.train_rows_].mean() > 0.9
    held = np.setdiff1d(np.arange(600), net.train_rows_)
    assert len(held) == 100
    assert np.array_equal(net.labels_[held], given[held])
    epochs = net.correction_.corrector_.history.epoch
    assert epochs.min() == 3
    assert set(((epochs - 3) % 2).tolist()) == {0}
    assert epochs.max() < 12
    assert net.score(x, true) > 0.85
    last = kept(net).batches_[-16:]  # 500 samples in batches of 32
    label, index = (torch.cat([batch[at] for batch in last]) for at in (1, 2))
    assert np.array_equal(label[index.argsort()], net.labels_[net.train_rows_])


def test_theta_where_it_is_looked_at():
    x, given, _ = data()
    net = classifier(Keep(), train_split=ValidSplit(5, stratified=True)).fit(x, given)
    points = {"step": {True}, "validation": {False}, "epoch": {False}, "end": {False}}
    assert kept(net).points_ == points
    assert torch.equal(parameters(net), base(net))
    batch = next(iter(net.get_iterator(net.get_split_datasets(x, given)[0], training=True)))

    def step():
        net.train_step(batch)
        assert not torch.equal(parameters(net), base(net))  # the half point
        return base(net)

    theta, file = step(), io.BytesIO()
    net.save_params(f_params=file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert torch.equal(torch.cat([p.flatten() for p in saved.values()]), theta)
    theta = step()
    assert torch.equal(parameters(pickle.loads(pickle.dumps(net))), theta)
    theta = step()
    proba = net.predict_proba(x)
    assert torch.equal(parameters(net), theta)
    assert np.array_equal(copy.deepcopy(net).predict_proba(x), proba)
    net.trim_for_prediction()
    assert np.array_equal(net.predict(x), proba.argmax(1))


class Stop(Callback):
    """Ctrl-C, once the gradient is there or after the step."""

    def __init__(self, before_step):
        self.before_step = before_step

    def on_grad_computed(self, net, *arguments, **_):
        if self.before_step:
            raise KeyboardInterrupt

    def on_batch_end(self, net, **_):
        raise KeyboardInterrupt


def test_an_interruption_leaves_theta():
    x, given, _ = data()
    net = classifier(Stop(before_step=False)).fit(x, given)
    assert torch.equal(parameters(net), base(net))


def test_a_batch_whose_step_was_interrupted_is_not_part_of_the_next_step():
    x, given, _ = data()
    net = classifier(Stop(before_step=True)).fit(x, given)
    net.callbacks_.clear()
    before = net.optimizer_.weights.log_pi()
    _, another, *_ = net.get_iterator(net.get_split_datasets(x, given)[0])
    net.train_step(another)
    moved = net.optimizer_.weights.log_pi() - before
    own = (moved - moved.median()).abs() > 1e-6  # the others have the shift of the normaliser
    assert torch.equal(own.nonzero()[:, 0], another.index_)


@pytest.mark.parametrize("how", ["partial_fit", "warm_start", "pickle"])
def test_more_epochs_are_the_unbroken_run(how):
    x, given, _ = data(rate=0.3)
    whole = correcting(max_epochs=6).fit(x, given)
    assert not np.array_equal(whole.labels_, given)
    net = correcting(max_epochs=3, warm_start=how == "warm_start").fit(x, given)
    if how == "pickle":
        net = pickle.loads(pickle.dumps(net))
    (net.fit if how == "warm_start" else net.partial_fit)(x, given)
    assert_same(net, whole)


def test_a_new_fit_or_initialize_starts_afresh():
    x, given, _ = data(rate=0.3)
    net = correcting(max_epochs=4).fit(x, given)
    first = copy.deepcopy(net)
    assert_same(net.fit(x, given), first)
    net.set_params(optimizer__prior=torch.arange(1.0, 201.0)).fit(x[:200], given[:200])
    assert net.optimizer_.weights.n == len(net.labels_) == 200
    assert net.optimizer_.weights.weight(torch.tensor([0, 199])).diff() > 0.5
    assert "prior" not in net.optimizer_.param_groups[0]
    net.set_params(optimizer__weight_decay=0.5)  # at once, as skorch does
    assert net.optimizer_.param_groups[0]["weight_decay"] == 0.5
    state = net.optimizer_.state_dict()
    net.initialize().optimizer_.load_state_dict(state)
    assert net.correction_.state_dict() == {}
    net.partial_fit(x[100:], given[100:])
    assert np.array_equal(net.given_, given[100:])


def test_resume_from_files_is_the_unbroken_run(tmp_path):
    x, given, _ = data(rate=0.3)
    whole = correcting(max_epochs=6).fit(x, given)
    files = {"f_correction": "correction.pt", "dirname": str(tmp_path)}
    half = correcting(max_epochs=3)
    half.callbacks.append(Checkpoint(monitor=None, **files))
    half.fit(x, given)
    again = correcting(max_epochs=3).initialize()
    again.load_params(checkpoint=Checkpoint(monitor=None, **files))
    assert again.optimizer_.weights.n == N
    assert np.array_equal(again.predict_proba(x), half.predict_proba(x))
    again.partial_fit(x, given)
    assert_same(again, whole)
    again = correcting(max_epochs=3).initialize()
    again.load_params(checkpoint=Checkpoint(monitor=None, **files))
    with pytest.raises(ValueError, match="expected the 300 training samples that the weights"):
        again.partial_fit(x[:200], given[:200])
    with pytest.raises(ValueError, match="expected the same original labels"):
        again.partial_fit(x, (given + 1) % CLASSES)


def test_training_goes_on_from_parameters_loaded_alone(tmp_path):
    x, given, _ = data()
    path = tmp_path / "params.pt"
    net = classifier(max_epochs=1).fit(x, given)
    net.save_params(f_params=path)
    saved = parameters(net)
    net.partial_fit(x, given).load_params(f_params=path)
    assert torch.equal(parameters(net), saved)
    net.set_params(lr=0.0).partial_fit(x, given)
    assert torch.equal(parameters(net), saved)


def test_with_other_callbacks_and_a_search():
    x, given, true = data()
    others = [
        ("schedule", LRScheduler("StepLR", step_size=1, gamma=0.9)),
        ("clip", GradientNormClipping(1.0)),
        ("train_acc", EpochScoring("accuracy", name="train_acc", on_train=True)),
    ]
    net = classifier(*others, ("correct", CorrectionCallback(warmup=1)), max_epochs=8)
    grid = {"optimizer__pi_lr": [1e-3, 0.1], "callbacks__correct__warmup": [1, 2], "lr": [3e-3]}
    pipeline = make_pipeline(StandardScaler(), net)
    search = GridSearchCV(pipeline, {f"alsnetclassifier__{k}": v for k, v in grid.items()}, cv=3)
    best = search.fit(x, given).best_estimator_[-1]
    assert not hasattr(net, "module_")
    assert best.optimizer_.weights.n == N
    assert best.optimizer_.param_groups[0]["lr"] == pytest.approx(3e-3 * 0.9**8)
    assert len(best.history[:, "train_acc"]) == 8
    assert search.score(x, true) > 0.5
    first = best.correction_.corrector_.history.epoch.min()
    assert first == search.best_params_["alsnetclassifier__callbacks__correct__warmup"]


def test_workers_see_new_labels():
    x, given, _ = data(rate=0.3)
    workers = {"iterator_train__num_workers": 1, "iterator_train__persistent_workers": True}
    net = classifier(CorrectionCallback(warmup=1, period=1), Keep(), max_epochs=3, **workers)
    net.fit(x, given)
    last = kept(net).batches_[-N // B :]
    assert not np.array_equal(net.labels_, given)
    assert np.array_equal(torch.cat([label for _, label, _ in last]), net.labels_)


class WithTargets(Dataset):
    def __init__(self, x, targets):
        self.x, self.targets = x, targets

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(self.targets[index])


def test_data_sets():
    x, given, _ = data()
    split = ValidSplit(5, stratified=True)
    expected = correcting(train_split=split, max_epochs=4).fit(x, given)
    tensors = TensorDataset(torch.from_numpy(x), torch.from_numpy(given))
    for dataset, y in [
        (tensors, None),
        (tensors, given),
        (WithTargets(x, given), None),
        (WithTargets(x, given.tolist()), None),
        (x, torch.from_numpy(given)),
    ]:
        net = correcting(train_split=split, max_epochs=4).fit(dataset, y)
        assert_same(net, expected)
    assert classifier().fit(x, given.astype(np.uint8)).labels_.dtype == np.int64
    valid = TensorDataset(torch.from_numpy(x[200:]), torch.from_numpy(given[200:]))
    part = Subset(tensors, list(range(200)))
    net = classifier(train_split=predefined_split(valid)).fit(part, None)
    assert np.array_equal(net.train_rows_, np.arange(200))
    assert net.history[-1, "valid_acc"] > 0.3


def test_embeddings_leave_the_generator_and_come_in_order():
    x, given, _ = data()
    net = classifier(CorrectionCallback(embedding="features.4")).fit(x, given)
    net.iterator_valid__shuffle = True
    train_set = net.get_split_datasets(x, given)[0]
    net.module_.train()
    state = torch.get_rng_state()
    embeddings = net.correction_._embeddings(net, train_set)
    assert torch.equal(state, torch.get_rng_state())
    assert net.module_.training
    torch.testing.assert_close(embeddings, net.module_.embed(torch.from_numpy(x)).detach())


def test_errors_name_what_is_missing():
    x, given, _ = data()
    with pytest.raises(TypeError, match="optimizer: expected BatchALSO or a subclass, got Adam"):
        classifier(optimizer=torch.optim.Adam).fit(x, given)
    with pytest.raises(TypeError, match="criterion: expected CrossEntropyLoss"):
        classifier(criterion=torch.nn.NLLLoss).fit(x, given)
    with pytest.raises(ValueError, match=r"optimizer__n: expected none, .*, got 300"):
        classifier(optimizer__n=300).fit(x, given)
    net = classifier().fit(x, given)
    with pytest.raises(TypeError, match="index of its samples, got a tuple"):
        net.train_step((torch.from_numpy(x), torch.from_numpy(given)))
    with pytest.raises(TypeError, match="a collate_fn has to keep the index"):
        classifier(iterator_train__collate_fn=lambda items: default_collate(items)[:2]).fit(
            x, given
        )
    with pytest.raises(TypeError, match="y: expected"):
        classifier().fit(x, given.astype(np.float32))
    with pytest.raises(ValueError, match="got None with a WithTargets"):
        classifier().fit(WithTargets(x, None), None)
    with pytest.raises(TypeError, match="train_split: expected all data or a Subset"):
        classifier(train_split=lambda d, y: (TensorDataset(torch.zeros(9, 2)), None)).fit(x, given)
    with pytest.raises(
        ValueError, match=r"expected the 300 training samples .* with the same labels"
    ):
        net.partial_fit(x, (given + 1) % CLASSES)
    with pytest.raises(ValueError, match="embedding: expected one of the layers"):
        classifier(CorrectionCallback(embedding="none")).fit(x, given)
    with pytest.raises(ValueError, match="warmup: expected"):
        correcting(warmup=0).fit(x, given)
    plain = NeuralNetClassifier(Net, callbacks=[CorrectionCallback()], verbose=0)
    with pytest.raises(TypeError, match="net: expected an AlsNetClassifier, got NeuralNetClassif"):
        plain.fit(x, given)
    with pytest.raises(AttributeError, match="correction_: expected one CorrectionCallback, got 0"):
        _ = net.correction_
