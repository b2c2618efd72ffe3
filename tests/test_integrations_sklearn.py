"""scikit-learn's own checks, and that the estimators do what als_ext does."""

import pickle

import numpy as np
import pytest
import torch
from blobs import blobs
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils import check_random_state
from sklearn.utils.estimator_checks import parametrize_with_checks

import als_ext
from als_ext import CorrectionConfig, TrainConfig, Trainer
from als_ext.integrations.sklearn import AlsClassifier, CorrectedClassifier, LabelCorrection
from als_ext.models import MLP
from als_ext.runtime import seeded

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = np.array(["cat", "dog", "eel"])


def small(**settings):
    return AlsClassifier(**{"hidden": (64, 32), "random_state": 0, "device": "cpu", **settings})


def named(n=600, rate=0.4, features=20):
    """X, given names, true names; few features are what neighbours in X itself can be told by."""
    x, given, true = blobs(n, rate)
    return x.numpy()[:, :features], NAMES[given], NAMES[true]


@parametrize_with_checks(
    # GaussianNB works with the single class that a correction leaves of ten random rows.
    [AlsClassifier(device="cpu"), LabelCorrection(), CorrectedClassifier(GaussianNB())]
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)  # none is expected to fail


def test_classifier_corrects_names_and_beats_the_noise():
    x, given, true = named()
    classifier = small().fit(x, given)
    assert (given == true).mean() < 0.65
    assert (classifier.labels_ == true).mean() > 0.93  # 0.97 is what overlap leaves to anyone
    assert classifier.score(x, true) > 0.93
    assert classifier.suspects_[given != true].mean() > 0.9
    assert classifier.suspects_[given == true].mean() < 0.05


def test_classifier_is_the_trainer():
    x, given, _ = blobs()
    classifier = small(config={"warmup": 3}).fit(x.numpy(), given.numpy())
    seed = int(check_random_state(0).randint(2**31 - 1))
    with seeded(seed):
        model = MLP((x.shape[1],), 3, (64, 32))
    config = TrainConfig.recommended(len(x), seed=seed, device="cpu", warmup=3)
    result = Trainer(model, config, num_classes=3).fit(x, given)
    assert torch.equal(classifier.result_.labels, result.labels)
    assert torch.equal(classifier.result_.losses, result.losses)
    with torch.no_grad():
        probability = model.eval()(x).double().softmax(1).numpy()
    np.testing.assert_array_equal(classifier.predict_proba(x.numpy()), probability)


def test_parameters_reach_the_training():
    x, given, _ = named(300)
    correction = CorrectionConfig(min_share=1.0)
    classifier = small(epochs=3, batch_size=100, correction=correction, config={"warmup": 1})
    classifier.fit(x, given)
    assert len(classifier.result_.history) == 3
    assert (classifier.labels_ != given).sum() < (small().fit(x, given).labels_ != given).sum()
    plain = small(method="erm", epochs=2).fit(x, given)
    assert plain.suspects_ is None
    np.testing.assert_array_equal(plain.labels_, given)


def test_own_model():
    made = []

    def linear(features, classes):
        made.append((features, classes))
        return torch.nn.Linear(features, classes)

    x, given, true = named(rate=0.1)
    classifier = small(method="erm", make_model=linear).fit(x, given)
    assert made == [(20, 3)]
    assert isinstance(classifier.model_, torch.nn.Linear)
    assert classifier.score(x, true) > 0.85


def test_random_state_fixes_the_result_and_leaves_the_generators():
    x, given, _ = named(200)
    before = torch.get_rng_state()
    first, second = (small(epochs=4).fit(x, given).predict_proba(x) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert (small(epochs=4, random_state=1).fit(x, given).predict_proba(x) != first).any()


def test_search_pipeline_clone_and_pickle():
    x, given, true = named(300, rate=0.2)
    pipeline = make_pipeline(StandardScaler(), small(epochs=6))
    search = GridSearchCV(pipeline, {"alsclassifier__lr": [1e-7, 3e-3]}, cv=2).fit(x, given)
    assert search.best_params_ == {"alsclassifier__lr": 3e-3}
    assert search.score(x, true) > 0.95
    copy = clone(search.best_estimator_)
    with pytest.raises(NotFittedError):
        copy.predict(x)
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict_proba(x), search.predict_proba(x))


def test_columns_with_names():
    pd = pytest.importorskip("pandas", reason="columns have names in a DataFrame")
    x, given, _ = named(100)
    frame = pd.DataFrame(x, columns=[f"f{i}" for i in range(20)])
    for estimator in (small(epochs=2), CorrectedClassifier(LogisticRegression())):
        fitted = estimator.fit(frame, given)
        assert list(fitted.feature_names_in_) == list(frame.columns)
        with pytest.raises(ValueError, match="feature names"):
            fitted.predict(frame[frame.columns[::-1]])


def test_label_correction_is_correct_labels():
    x, given, true = named(features=3)
    correction = LabelCorrection(k=15, options={"min_share": 0.5}).fit(x, given)
    codes = np.searchsorted(NAMES, given)
    direct = als_ext.correct_labels(x, codes, metric="l2", k=15, min_share=0.5)
    np.testing.assert_array_equal(correction.labels_, NAMES[direct.new_label])
    np.testing.assert_array_equal(correction.suspects_, direct.suspect)
    assert (correction.labels_ == true).mean() > 0.95
    same, corrected = LabelCorrection().fit_resample(x, given)
    assert same is x
    assert (corrected == true).mean() > 0.95


def test_label_correction_cannot_pass_silently_through_a_pipeline():
    x, given, _ = named(100)
    with pytest.raises(TypeError, match="transform"):
        make_pipeline(LabelCorrection(), LogisticRegression()).fit(x, given)


def test_corrected_classifier_trains_on_corrected_labels():
    x, given, true = named(features=3)
    tree = DecisionTreeClassifier(random_state=0)  # remembers every label
    assert clone(tree).fit(x, given).score(x, true) < 0.65
    corrected = make_pipeline(StandardScaler(), CorrectedClassifier(tree, LabelCorrection(k=15)))
    corrected.fit(x, given)
    assert corrected.score(x, true) > 0.93
    own = corrected[-1]
    np.testing.assert_array_equal(corrected.predict(x), own.correction_.labels_)
    assert not hasattr(own, "decision_function")  # a tree has none
    assert hasattr(CorrectedClassifier(LogisticRegression()), "decision_function")
    search = GridSearchCV(own, {"correction__k": [5, 15], "classifier__max_depth": [3]}, cv=2)
    assert search.fit(x, given).best_params_["correction__k"] in (5, 15)


def test_errors_name_the_argument():
    x, given, _ = named(50)
    with pytest.raises(ValueError, match=r"config: expected settings .* got \['lr'\]"):
        small(lr=1e-3, config={"lr": 1e-3}).fit(x, given)
    with pytest.raises(ValueError, match="y: expected at least 2 classes, got 1 class: cat"):
        LabelCorrection().fit(x, np.full(50, "cat"))
    with pytest.raises(ValueError, match="method"):
        small(method="none-such").fit(x, given)
    with pytest.raises(ValueError, match=r"method: expected one that trains .* 'knn-floor'"):
        small(method="knn-floor").fit(x, given)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        LabelCorrection().fit(x, given[:-1])
    with pytest.raises(ValueError, match="k: expected"):
        LabelCorrection(k=50).fit(x, given)
    with pytest.raises(ValueError, match=r"Unknown label type|continuous"):
        small().fit(x, np.linspace(0, 1, 50))
