"""scikit-learn: a classifier, a correction of y, and any classifier on corrected labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from als_ext import CorrectionConfig, TrainConfig, Trainer, correct_labels
from als_ext.methods import METHODS
from als_ext.models import MLP
from als_ext.runtime import seeded

Labels = NDArray[Any]
_ROWS = 4096  # predicted at a time


def _encode(y: Labels) -> tuple[Labels, NDArray[np.int64]]:
    """The classes in order, and the position of each label among them."""
    check_classification_targets(y)
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y: expected at least 2 classes, got 1 class: {classes[0]}")
    return classes, codes.astype(np.int64)


def _tensor(array: NDArray[np.float32]) -> Tensor:
    """Shares the memory, but for a read-only array's."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


class AlsClassifier(ClassifierMixin, BaseEstimator):
    """A network trained on labels that may be wrong: :class:`als_ext.Trainer` on arrays.

    Args:
        method: a name in :data:`als_ext.methods.METHODS`, of one that trains a network (all but
            "knn-floor"); "als-lc" corrects labels while training.
        make_model: maps (number of features, number of classes) to a module that maps float32
            [B, D] to logits [B, C], with a function ``embed`` if the method corrects labels; None
            makes an :class:`als_ext.models.MLP`.
        hidden: widths of the MLP's layers, at least one; the last is the embedding.
        epochs: passes over the samples; None as ``TrainConfig.recommended`` says.
        batch_size: samples a step; None likewise.
        lr: learning rate, > 0; None likewise.
        correction: settings of the corrector; None takes the defaults.
        config: any other settings of :class:`als_ext.TrainConfig`, by name; None for no others.
        random_state: of the first weights and the order: an int, a numpy RandomState or None.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Attributes:
        classes_: [C] the classes, sorted.
        labels_: [n] the labels after the last correction, in the form of y.
        suspects_: [n] bool, under suspicion in the last correction; None where the method judges no
            label or no correction was made.
        model_: the trained module, on the CPU in eval mode.
        result_: the :class:`als_ext.TrainResult`, its labels being positions in ``classes_``.
        n_features_in_: D.
        feature_names_in_: [D] names of the columns, where X had some.

    Raises:
        TypeError: a setting of another type.
        ValueError: a setting out of its range; X or y that scikit-learn refuses; one class only.

    Note:
        ``score`` and searches measure against the labels that they are given: on wrong labels they
        favour what reproduces them. Scale X first, as for any network. The same ``random_state``
        gives the same bits.

    Example:
        >>> import numpy as np
        >>> from als_ext.integrations.sklearn import AlsClassifier
        >>> rng = np.random.default_rng(0)
        >>> truth = np.repeat(["no", "yes"], 100)
        >>> x = rng.standard_normal((200, 4)) + 4 * (truth == "yes")[:, None] - 2
        >>> y = truth.copy()
        >>> y[:30], y[100:130] = "yes", "no"
        >>> classifier = AlsClassifier(random_state=0, device="cpu").fit(x, y)
        >>> bool((classifier.labels_ == truth).mean() > 0.95), classifier.score(x, truth) > 0.95
        (True, True)
    """

    def __init__(
        self,
        method: str = "als-lc",
        *,
        make_model: Callable[[int, int], nn.Module] | None = None,
        hidden: Sequence[int] = (256, 128),
        epochs: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        correction: CorrectionConfig | None = None,
        config: Mapping[str, Any] | None = None,
        random_state: Any = None,
        device: str = "auto",
    ) -> None:
        self.method = method
        self.make_model = make_model
        self.hidden = hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.correction = correction
        self.config = config
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any) -> AlsClassifier:
        """Train on X [n, D], real numbers, and y [n], classes of any kind."""
        X, y = validate_data(self, X, y, dtype=np.float32)
        self.classes_, codes = _encode(y)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        config = TrainConfig.recommended(len(X), **self._settings(seed))
        if config.method in METHODS and not METHODS[config.method].trains:
            raise ValueError(f"method: expected one that trains a network, got {config.method!r}")
        shape = X.shape[1], len(self.classes_)
        with seeded(seed):
            make = self.make_model
            model = MLP(shape[:1], shape[1], self.hidden) if make is None else make(*shape)
        trainer = Trainer(model, config, num_classes=len(self.classes_), progress=False)
        self.result_ = trainer.fit(X, codes)
        self.model_ = model.cpu().eval()
        self.labels_ = self.classes_[self.result_.labels.numpy()]
        report = self.result_.report
        self.suspects_ = None if report is None else report["suspect"].numpy()
        return self

    def _settings(self, seed: int) -> dict[str, Any]:
        own = {"method": self.method, "seed": seed, "device": self.device}
        for name in ("epochs", "batch_size", "lr", "correction"):
            if getattr(self, name) is not None:
                own[name] = getattr(self, name)
        others = {} if self.config is None else dict(self.config)
        twice = sorted(own.keys() & others.keys())
        if twice:
            raise ValueError(
                f"config: expected settings that are no parameter of AlsClassifier, got {twice}"
            )
        return own | others

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probabilities [m, C] of rows X [m, D], columns as in ``classes_``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, reset=False)
        with torch.no_grad():
            logits = [self.model_(rows) for rows in torch.split(_tensor(X), _ROWS)]
        return torch.cat(logits).double().softmax(1).numpy()

    def predict(self, X: Any) -> Labels:
        """The likeliest class of each row of X [m, D]."""
        best = self.predict_proba(X).argmax(1)
        labels: Labels = self.classes_[best]
        return labels


class LabelCorrection(BaseEstimator):
    """Correct y from the neighbours of the rows of X: :func:`als_ext.correct_labels`.

    ``fit_resample`` is the interface of imbalanced-learn's samplers, so that this can stand before
    a classifier in *its* pipeline. There is no ``transform``: a step of scikit-learn's own pipeline
    cannot change y, so one that let X pass would leave the wrong labels to the next step without a
    word. There, put :class:`CorrectedClassifier` last.

    Args:
        k: neighbours that vote, or "auto"; as in :class:`als_ext.CorrectionConfig`.
        metric: "l2" or "cosine", the distance between rows of X. The default of
            :func:`als_ext.correct_labels` is "cosine", as its rows are embeddings of a network.
        options: further arguments of :func:`als_ext.correct_labels`, by name.

    Attributes:
        classes_: [C] the classes, sorted.
        labels_: [n] the corrected labels, in the form of y.
        suspects_: [n] bool, whether a label was under suspicion.
        result_: the :class:`als_ext.CorrectionResult`, its labels being positions in ``classes_``.
        n_features_in_: D.
        feature_names_in_: [D] names of the columns, where X had some.

    Raises:
        TypeError: a setting of another type.
        ValueError: a setting out of its range; X or y that scikit-learn refuses; one class only.

    Example:
        >>> import numpy as np
        >>> from als_ext.integrations.sklearn import LabelCorrection
        >>> rng = np.random.default_rng(0)
        >>> truth = np.repeat(["no", "yes"], 100)
        >>> x = rng.standard_normal((200, 4)) + 4 * (truth == "yes")[:, None]
        >>> y = truth.copy()
        >>> y[:30] = "yes"
        >>> x, corrected = LabelCorrection().fit_resample(x, y)
        >>> bool((corrected == truth).mean() > 0.98)
        True
    """

    def __init__(
        self,
        *,
        k: int | str = "auto",
        metric: str = "l2",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.k = k
        self.metric = metric
        self.options = options

    def fit(self, X: Any, y: Any) -> LabelCorrection:
        """Correct y [n], classes of any kind, by the rows of X [n, D]."""
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64], ensure_min_samples=2)
        self.classes_, codes = _encode(y)
        self.result_ = correct_labels(
            X,
            codes,
            num_classes=len(self.classes_),
            k=self.k,
            metric=self.metric,
            **({} if self.options is None else self.options),
        )
        self.labels_ = self.classes_[self.result_.new_label]
        self.suspects_ = self.result_.suspect
        return self

    def fit_resample(self, X: Any, y: Any) -> tuple[Any, Labels]:
        """X as it came, and the corrected labels."""
        return X, self.fit(X, y).labels_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def _has(name: str) -> Callable[[CorrectedClassifier], bool]:
    def check(self: CorrectedClassifier) -> bool:
        getattr(getattr(self, "classifier_", self.classifier), name)  # its own AttributeError
        return True

    return check


class CorrectedClassifier(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):
    """Any classifier, trained on labels that :class:`LabelCorrection` corrected first.

    Args:
        classifier: a scikit-learn classifier; cloned by ``fit``.
        correction: a :class:`LabelCorrection`; cloned by ``fit``; None takes the defaults.

    Attributes:
        classifier_: the trained one.
        correction_: the fitted correction: ``labels_``, ``suspects_``, ``result_``.
        classes_: [C] the classes of the corrected labels, sorted: one that lost all its samples
            is not among them.
        n_features_in_: D.
        feature_names_in_: [D] names of the columns, where X had some.

    Raises:
        TypeError: as the two.
        ValueError: as the two.

    Note:
        Neighbours are searched among the rows of X, so this goes behind what scales or embeds them.

    Example:
        >>> import numpy as np
        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> from als_ext.integrations.sklearn import CorrectedClassifier
        >>> rng = np.random.default_rng(0)
        >>> truth = np.repeat([0, 1], 100)
        >>> x = rng.standard_normal((200, 4)) + 4 * truth[:, None]
        >>> y = truth.copy()
        >>> y[:30] = 1
        >>> model = make_pipeline(StandardScaler(), CorrectedClassifier(LogisticRegression()))
        >>> model.fit(x, y).score(x, truth) > 0.98
        True
    """

    def __init__(self, classifier: Any, correction: LabelCorrection | None = None) -> None:
        self.classifier = classifier
        self.correction = correction

    def fit(self, X: Any, y: Any) -> CorrectedClassifier:
        """Correct y [n] by the rows of X [n, D], then train on both."""
        correction = LabelCorrection() if self.correction is None else clone(self.correction)
        self.correction_ = correction.fit(X, y)
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(correction, name):
                setattr(self, name, getattr(correction, name))
        self.classifier_ = clone(self.classifier).fit(X, correction.labels_)
        self.classes_ = self.classifier_.classes_
        return self

    def predict(self, X: Any) -> Labels:
        """The class of each row of X [m, D]."""
        check_is_fitted(self)
        predicted: Labels = self.classifier_.predict(X)
        return predicted

    @available_if(_has("predict_proba"))
    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probabilities [m, C] of rows X [m, D], columns as in ``classes_``."""
        check_is_fitted(self)
        probability: NDArray[np.float64] = self.classifier_.predict_proba(X)
        return probability

    @available_if(_has("decision_function"))
    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """The classifier's scores of rows X [m, D]."""
        check_is_fitted(self)
        scores: NDArray[np.float64] = self.classifier_.decision_function(X)
        return scores
