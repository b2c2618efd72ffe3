"""skorch: a classifier with the weighted loss of ALSO, and a callback that corrects labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Subset

from als_ext import CorrectionConfig, LabelCorrector
from als_ext.data import IndexedDataset
from als_ext.data.labels import as_labels
from als_ext.embedding import make_embedder
from als_ext.integrations._relabel import Relabelling, evaluating
from als_ext.integrations.also import BatchALSO

try:
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback
    from skorch.utils import data_from_dataset, to_numpy, to_tensor
except ImportError as error:
    raise ImportError(
        "als_ext.integrations.skorch needs skorch: pip install 'als_ext[skorch]'"
    ) from error

__all__ = ["AlsNetClassifier", "CorrectionCallback"]


class _Batch(tuple[Any, Any]):
    """(X, y), which is what skorch's callbacks unpack, with the index of the samples beside it."""

    index_: Tensor


class _Batches:
    """The batches (X, y, index) of an iterator as :class:`_Batch`."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator

    def __iter__(self) -> Iterator[_Batch]:
        for parts in self._iterator:
            if len(parts) != 3:
                raise TypeError(
                    "iterator: expected batches (X, y, index) from items (X, y, index), got "
                    f"{len(parts)} parts: a collate_fn has to keep the index"
                )
            batch = _Batch(parts[:2])
            batch.index_ = parts[2]
            yield batch


class AlsNetClassifier(NeuralNetClassifier):
    """A NeuralNetClassifier whose training loss is weighted by ALSO, sample by sample.

    The module returns logits. Labels are integers in [0, C), as everywhere in skorch. What
    ``train_split`` holds back has no weight and keeps its labels.

    Args:
        module: as of skorch's NeuralNetClassifier, and so are all that are not named here.
        *args: as there.
        criterion: ``torch.nn.CrossEntropyLoss``. ``criterion__label_smoothing``, ``__weight`` and
            ``__ignore_index`` hold for the training loss too.
        optimizer: :class:`als_ext.integrations.also.BatchALSO` or a subclass; its arguments are
            ``optimizer__pi_lr`` and so on, but for n, which is the number of training samples.
        lr: step size of the model, >= 0.
        **kwargs: as there.

    Attributes:
        optimizer_: the optimizer, with ``optimizer_.weights`` of the training samples.
        train_rows_: [n] int64, the row of X that training sample i is: where weight i belongs.
        labels_: [len(X)] int64, the labels as they are now, in the order of X.
        correction_: the net's :class:`CorrectionCallback`.

    Raises:
        TypeError: another optimizer or criterion; labels that are not integers.
        ValueError: no labels; training goes on with other samples than before.

    Note:
        While it trains the module holds the half point of the optimistic step. Validation,
        prediction, scores, callbacks after an epoch, ``save_params``, pickles and the trained net
        have θ. ``train_loss`` is the weighted one. ``load_params`` without the optimizer drops
        its moments, so that training goes on from the loaded parameters.

    Example:
        >>> import numpy as np, torch
        >>> from als_ext.integrations.skorch import AlsNetClassifier
        >>> x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
        >>> net = AlsNetClassifier(torch.nn.Linear, module__in_features=4, module__out_features=2,
        ...                        verbose=0).fit(x, np.arange(50) % 2)
        >>> net.predict(x).shape, net.optimizer_.weights.n, net.train_rows_.shape
        ((50,), 40, (40,))
    """

    def __init__(
        self,
        module: Any,
        *args: Any,
        criterion: Any = nn.CrossEntropyLoss,
        optimizer: Any = BatchALSO,
        lr: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, *args, criterion=criterion, optimizer=optimizer, lr=lr, **kwargs)

    @property
    def correction_(self) -> CorrectionCallback:
        """The callback that corrects, by which ``save_params(f_correction=...)`` finds it."""
        found = [c for _, c in self.callbacks_ if isinstance(c, CorrectionCallback)]
        if len(found) != 1:
            raise AttributeError(f"correction_: expected one CorrectionCallback, got {len(found)}")
        return found[0]

    @property
    def labels_(self) -> NDArray[np.int64]:
        """The labels as they are now, in the order of X."""
        self.check_is_fitted(["given_"])
        labels: NDArray[np.int64] = self.given_.copy()
        for _, callback in self.callbacks_:
            if isinstance(callback, CorrectionCallback) and callback.corrector_ is not None:
                labels[self.train_rows_] = callback.corrector_.labels.numpy()
        return labels

    def initialize_criterion(self) -> AlsNetClassifier:
        """Make the criterion, which has to be the cross entropy."""
        super().initialize_criterion()
        if not isinstance(self.criterion_, nn.CrossEntropyLoss):
            raise TypeError(
                "criterion: expected CrossEntropyLoss, with logits from the module, got "
                f"{type(self.criterion_).__name__}"
            )
        return self

    def initialize_optimizer(self) -> AlsNetClassifier:
        """Make the optimizer; its weights get their size with the data, or by ``load_params``."""
        if not (isinstance(self.optimizer, type) and issubclass(self.optimizer, BatchALSO)):
            name = getattr(self.optimizer, "__name__", type(self.optimizer).__name__)
            raise TypeError(f"optimizer: expected BatchALSO or a subclass, got {name}")
        self.optimizer_ = self._make_optimizer(n=1, prior=None)
        self.optimizer_.register_load_state_dict_pre_hook(self._size_as_saved)
        self.n_: int | None = None  # training samples, once they are known
        if hasattr(self, "given_"):
            del self.given_
        return self

    def set_params(self, **kwargs: Any) -> AlsNetClassifier:
        """skorch's; settings of the weights, ``optimizer__pi_lr`` say, hold from the next fit on.

        Of the optimizer of an initialized net skorch sets what parameter groups have, at once.
        """
        own = ("param_groups", *self.optimizer_.defaults) if self.initialized_ else None
        for key in list(kwargs):
            prefix, _, name = key.partition("__")
            if own and prefix == "optimizer" and name and name.partition("__")[0] not in own:
                setattr(self, key, kwargs.pop(key))
        super().set_params(**kwargs)
        return self

    def _make_optimizer(self, **more: Any) -> BatchALSO:
        parameters = self.get_all_learnable_params()
        groups, settings = self.get_params_for_optimizer("optimizer", parameters)
        if "n" in settings:
            raise ValueError(
                "optimizer__n: expected none, as it is the number of training samples, got "
                f"{settings['n']}"
            )
        made: BatchALSO = self.optimizer(*groups, **(settings | more))
        return made

    def _size(self, n: int) -> None:
        """Weights for n samples, in the optimizer that schedulers know already."""
        self.optimizer_.weights = self._make_optimizer(n=n).weights
        self.n_ = n

    def _size_as_saved(self, optimizer: Any, state: dict[str, Any]) -> None:
        if self.n_ is None and "also" in state:
            self._size(state["also"]["weights"]["n"])

    def get_split_datasets(self, X: Any, y: Any = None, **fit_params: Any) -> tuple[Any, Any]:
        """The training part as an :class:`als_ext.data.IndexedDataset`, and the validation part."""
        dataset = self.get_dataset(X, y)
        given = _labels(dataset, y)
        if y is None:
            self.classes_inferred_ = np.unique(given)  # skorch sees fewer kinds of data sets
        train, valid = super().get_split_datasets(dataset, given, **fit_params)
        if train is dataset:
            rows = np.arange(len(dataset))
        elif isinstance(train, Subset) and train.dataset is dataset:
            rows = np.asarray(train.indices)
        else:
            raise TypeError(
                "train_split: expected all data or a Subset of it as the training part, got "
                f"{type(train).__name__}"
            )
        indexed = IndexedDataset(train, given[rows])
        if self.n_ is None:
            self._size(len(rows))
        elif self.n_ != len(rows) or not self._same(rows, given):
            raise ValueError(
                f"X: expected the {self.n_} training samples that the weights belong to, with the "
                f"same labels and the same train_split, got {len(rows)} that differ; give a random "
                "split a fixed random_state"
            )
        self.train_rows_: NDArray[np.int64] = rows
        self.given_: NDArray[np.int64] = given
        return indexed, valid

    def _same(self, rows: NDArray[np.int64], given: NDArray[np.int64]) -> bool:
        if not hasattr(self, "given_"):  # the weights were loaded
            return True
        same = np.array_equal(rows, self.train_rows_)
        return same and np.array_equal(given[rows], self.given_[rows])

    def get_iterator(self, dataset: Any, training: bool = False) -> Any:
        """skorch's iterator; over the training set its batches know their index."""
        iterator = super().get_iterator(dataset, training=training)
        return _Batches(iterator) if isinstance(dataset, IndexedDataset) else iterator

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Forward and backward of the weighted loss.

        Raises:
            TypeError: a batch that does not know the index of its samples.
        """
        if not isinstance(batch, _Batch):
            raise TypeError(
                "batch: expected one of get_iterator(), which knows the index of its samples, got "
                f"a {type(batch).__name__}"
            )
        self.optimizer_.train()
        self._set_training(True)
        x, y = batch
        logits = self.infer(x, **fit_params)
        label, index = (to_tensor(t, device=self.device) for t in (y, batch.index_))
        loss, _ = self.optimizer_.weighted_loss(
            logits,
            label,
            index,
            label_smoothing=self.criterion_.label_smoothing,
            ignore_index=self.criterion_.ignore_index,
            class_weight=self.criterion_.weight,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss, "y_pred": logits}

    def _to_theta(self) -> None:
        if getattr(self, "optimizer_", None) is not None:  # it is None once trimmed for prediction
            self.optimizer_.eval()

    def validation_step(self, batch: Any, **fit_params: Any) -> Any:
        """skorch's, with θ in the module."""
        self._to_theta()
        return super().validation_step(batch, **fit_params)

    def evaluation_step(self, batch: Any, training: bool = False) -> Any:
        """skorch's, with θ in the module."""
        self._to_theta()
        return super().evaluation_step(batch, training=training)

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """θ into the module before the callbacks see it."""
        self._to_theta()
        super().on_epoch_end(net, **kwargs)

    def on_train_end(self, net: Any, **kwargs: Any) -> None:
        """θ into the module, also after an interruption, which may have come before the step."""
        self._to_theta()
        self.optimizer_.forget()
        super().on_train_end(net, **kwargs)

    def save_params(self, *args: Any, **kwargs: Any) -> None:
        """skorch's; ``f_optimizer`` has the weights, ``f_correction`` the corrected labels."""
        self._to_theta()
        super().save_params(*args, **kwargs)

    def load_params(
        self, f_params: Any = None, f_optimizer: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """skorch's; the optimizer's history ends where its own parameters are not loaded."""
        super().load_params(f_params, f_optimizer, *args, **kwargs)
        saved = kwargs.get("checkpoint")
        params = f_params or kwargs.get("f_module") or getattr(saved, "f_params", None)
        if params and not (f_optimizer or getattr(saved, "f_optimizer", None)):
            self.optimizer_.state.clear()

    def __getstate__(self) -> Any:
        self._to_theta()
        return super().__getstate__()


def _labels(dataset: Any, y: Any) -> NDArray[np.int64]:
    """The labels, in memory of their own: y where it is given, else those of the data set."""
    if y is None:
        try:
            y = data_from_dataset(dataset)[1]
        except AttributeError:
            y = getattr(dataset, "targets", None)
    if y is None:
        raise ValueError(
            "y: expected labels [n], or a data set that shows them as y, targets or a "
            f"TensorDataset, got None with a {type(dataset).__name__}"
        )
    y = np.asarray(y) if isinstance(y, list) else to_numpy(y)
    labels: NDArray[np.int64] = as_labels(y, n=len(dataset), name="y").numpy()
    return labels


class CorrectionCallback(Callback):
    """Corrects the labels of an :class:`AlsNetClassifier` between epochs.

    After ``warmup`` epochs and then every ``period``, if another epoch follows, and not once a step
    changes fewer than ``config.stop_share`` of the labels. log π is the score, and π of relabelled
    samples starts again. Epochs count from the start of the history, over several ``partial_fit``.

    Args:
        warmup: epochs before the first correction, >= 1.
        period: epochs from one to the next, >= 1.
        config: settings of the corrector; None takes the defaults.
        embedding: name of the layer whose output is the embedding; None takes ``module.embed``.

    Attributes:
        corrector_: the :class:`als_ext.LabelCorrector` of the training samples: labels, history,
            undo; None before the first epoch.

    Raises:
        TypeError: another net.
        ValueError: as the LabelCorrector; no such layer.

    Note:
        The module takes one input, not a dict. y itself stays as it is.
    """

    def __init__(
        self,
        *,
        warmup: int = 2,
        period: int = 2,
        config: CorrectionConfig | None = None,
        embedding: str | None = None,
    ) -> None:
        self.warmup = warmup
        self.period = period
        self.config = config
        self.embedding = embedding

    def initialize(self) -> CorrectionCallback:
        """Forget what an earlier training corrected."""
        self.corrector_: LabelCorrector | None = None
        self.relabelling_: Relabelling | None = None  # while it trains: it holds the data
        return self

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **_: Any) -> None:
        """Say now what would fail after the first epochs."""
        if not isinstance(net, AlsNetClassifier):
            raise TypeError(f"net: expected an AlsNetClassifier, got {type(net).__name__}")
        make_embedder(net.module_, self.embedding)
        self.relabelling_ = None

    def on_epoch_begin(self, net: Any, dataset_train: Any = None, **_: Any) -> None:
        """Correct the labels if it is time: at the start of an epoch, so that one follows."""
        if self.relabelling_ is None:
            classes = None if net.classes is None else len(net.classes)
            earlier = self.corrector_
            self.relabelling_ = Relabelling(
                dataset_train, classes, self.warmup, self.period, self.config
            )
            if earlier is not None:
                self.relabelling_.load_state_dict(earlier.state_dict())
            self.corrector_ = self.relabelling_.corrector
        epoch = len(net.history) - 1
        if self.relabelling_.due(epoch, None):
            embeddings = self._embeddings(net, dataset_train)
            self.relabelling_.correct(embeddings, net.optimizer_, epoch)

    def on_train_end(self, net: Any, X: Any = None, y: Any = None, **_: Any) -> None:
        """Let go of the data."""
        self.relabelling_ = None

    def _embeddings(self, net: Any, dataset: IndexedDataset) -> Tensor:
        net.optimizer_.eval()
        embed = make_embedder(net.module_, self.embedding)
        parts, index = [], []
        # A DataLoader draws from the global generator.
        with torch.random.fork_rng(devices=[]), evaluating(net.module_):
            for batch in net.get_iterator(dataset, training=False):
                parts.append(embed(to_tensor(batch[0], device=net.device)))
                index.append(batch.index_)
        return torch.cat(parts)[torch.cat(index).argsort()]

    def state_dict(self) -> dict[str, Any]:
        """The corrector's, for ``save_params(f_correction=...)`` and ``Checkpoint``."""
        return {} if self.corrector_ is None else self.corrector_.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over corrector and labels; training goes on with the same original labels."""
        if not state:
            self.initialize()
            return
        original = state["original"]
        self.corrector_ = LabelCorrector(original, state["num_classes"], self.config)
        self.corrector_.load_state_dict(state)
        self.relabelling_ = None
