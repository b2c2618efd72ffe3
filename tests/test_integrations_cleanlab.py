"""Issue tables in and out, against cleanlab itself."""

import numpy as np
import pytest
import torch

pd = pytest.importorskip("pandas", reason="needs the extra als_ext[pandas]")
pytest.importorskip("cleanlab", reason="needs the extra als_ext[cleanlab]")

from cleanlab.classification import CleanLearning  # noqa: E402
from cleanlab.filter import find_label_issues  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import cross_val_predict  # noqa: E402

from als_ext import LabelCorrector, correct_labels  # noqa: E402
from als_ext.integrations.cleanlab import label_issues, scores, suspects  # noqa: E402

N, CLASSES = 300, 3


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    truth = np.arange(N) % CLASSES
    x = 5 * np.eye(CLASSES)[truth] + rng.standard_normal((N, CLASSES))
    wrong = rng.random(N) < 0.2
    given = np.where(wrong, (truth + rng.integers(1, CLASSES, N)) % CLASSES, truth)
    return x, given, truth


def test_the_table(data):
    x, given, truth = data
    result = correct_labels(x, given)
    table = label_issues(result)
    assert list(table.columns) == [
        "is_label_issue",
        "label_score",
        "given_label",
        "predicted_label",
    ]
    assert table.is_label_issue.dtype == bool
    np.testing.assert_array_equal(table.is_label_issue, result.suspect)
    np.testing.assert_array_equal(table.given_label, given)
    np.testing.assert_array_equal(table.predicted_label, result.new_label)
    assert table.label_score.between(0, 1).all()
    assert table.label_score[given != truth].max() < table.label_score[given == truth].median()
    assert (table.label_score[table.is_label_issue] < 0.5).all()
    assert (table.label_score[~table.is_label_issue] >= 0.5).all()
    named = label_issues(result, class_names=["a", "b", "c"])
    assert (named.given_label == np.array(["a", "b", "c"])[given]).all()


def test_the_score_is_the_formula(data):
    x, given, _ = data
    result = correct_labels(x, given)
    table = label_issues(result)
    at = int(np.argmax(result.log_odds))
    assert table.label_score[at] == pytest.approx(1 / (1 + np.exp(float(result.log_odds[at]))))
    at = int(np.argmax((result.winner == given) * result.margin))
    assert table.label_score[at] == pytest.approx(0.5 + 0.5 * float(result.margin[at]))


def test_a_torch_result_and_the_steps_of_a_corrector(data):
    x, given, _ = data
    corrector = LabelCorrector(torch.from_numpy(given), CLASSES)
    first = label_issues(corrector.step(torch.from_numpy(x)))
    second = corrector.step(torch.from_numpy(x))
    again = label_issues(second, given_label=corrector.original)
    pd.testing.assert_frame_equal(again, first)
    assert not label_issues(second).is_label_issue.any()  # against its own labels there are none


def test_nobody_voted():
    x = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [9.0, 9.0]])
    voters = np.array([False, False, False, True])
    result = correct_labels(x, np.array([0, 1, 0, 1]), voters=voters, k=1, metric="l2")
    assert (result.winner == -1).any()
    table = label_issues(result)
    silent = result.winner == -1
    assert (table.label_score[silent] == 0.5).all()
    assert not table.is_label_issue[silent].any()
    np.testing.assert_array_equal(table.predicted_label[silent], table.given_label[silent])


def test_cleanlab_reads_our_table(data):
    x, given, truth = data
    table = label_issues(correct_labels(x, given))
    learner = CleanLearning(LogisticRegression(), verbose=False)
    learner.fit(x, given, label_issues=table.rename(columns={"label_score": "label_quality"}))
    assert learner.score(x, truth) > 0.97
    kept = LogisticRegression().fit(x[~table.is_label_issue], given[~table.is_label_issue])
    np.testing.assert_array_equal(learner.predict(x), kept.predict(x))


def test_suspects_of_find_label_issues(data):
    x, given, truth = data
    probability = cross_val_predict(LogisticRegression(), x, given, method="predict_proba", cv=3)
    mask = find_label_issues(given, probability)
    ranked = find_label_issues(given, probability, return_indices_ranked_by="self_confidence")
    np.testing.assert_array_equal(suspects(mask), mask)
    np.testing.assert_array_equal(suspects(ranked, n=N), mask)
    result = correct_labels(x, given, suspects=suspects(ranked, n=N))
    np.testing.assert_array_equal(result.suspect, mask)
    assert not result.changed[~mask].any()
    assert (result.new_label == truth).mean() > 0.97


def test_suspects_and_scores_of_clean_learning(data):
    x, given, truth = data
    table = CleanLearning(LogisticRegression(), verbose=False).find_label_issues(x, given)
    mask = suspects(table)
    np.testing.assert_array_equal(mask, table.is_label_issue)
    shuffled = table.sample(frac=1, random_state=0)
    np.testing.assert_array_equal(suspects(shuffled), mask)
    np.testing.assert_array_equal(suspects(table[table.is_label_issue], n=N), mask)
    np.testing.assert_allclose(scores(shuffled), 1 - table.label_quality)
    result = correct_labels(x, given, scores=scores(table), suspects="score")
    assert (result.new_label == truth).mean() > (given == truth).mean() + 0.1


def test_suspects_of_datalab(data):
    pytest.importorskip("datasets", reason="Datalab needs the extra als_ext[datasets]")
    from cleanlab import Datalab

    x, given, _ = data
    probability = cross_val_predict(LogisticRegression(), x, given, method="predict_proba", cv=3)
    lab = Datalab({"y": given}, label_name="y", verbosity=0)
    lab.find_issues(pred_probs=probability, issue_types={"label": {}})
    issues = lab.get_issues("label")
    assert list(issues.columns) == list(label_issues(correct_labels(x, given)).columns)
    np.testing.assert_array_equal(suspects(issues), issues.is_label_issue)
    np.testing.assert_allclose(scores(issues), 1 - issues.label_score)


def test_our_own_table_comes_back(data):
    x, given, _ = data
    result = correct_labels(x, given)
    table = label_issues(result)
    np.testing.assert_array_equal(suspects(table), result.suspect)
    np.testing.assert_array_equal(scores(table), 1 - table.label_score)


def test_errors_name_the_argument(data):
    x, given, _ = data
    result = correct_labels(x, given)
    table = label_issues(result)
    with pytest.raises(ValueError, match="class_names: expected at least 3 names, got 2"):
        label_issues(result, class_names=["a", "b"])
    with pytest.raises(ValueError, match="expected 300 labels, got 299"):
        label_issues(result, given_label=given[:-1])
    with pytest.raises(ValueError, match="n: expected the number of samples"):
        suspects([1, 2])
    with pytest.raises(ValueError, match=r"expected positions in \[0, 3\), got 3"):
        suspects([1, 3], n=3)
    with pytest.raises(ValueError, match="each position once"):
        suspects([1, 1], n=3)
    with pytest.raises(ValueError, match="expected a mask of 3 entries, got 2"):
        suspects(np.array([True, False]), n=3)
    with pytest.raises(TypeError, match="positions of samples, integers, got float64"):
        suspects([0.5], n=3)
    assert suspects([], n=2).tolist() == [False, False]
    with pytest.raises(ValueError, match=r"expected positions in \[0, 60\)"):
        suspects(table.iloc[::5])  # rows left out, and no n
    with pytest.raises(ValueError, match="expected positions"):
        scores(table.iloc[::5])
    with pytest.raises(ValueError, match="expected a column 'is_label_issue', got"):
        suspects(table.drop(columns="is_label_issue"))
    with pytest.raises(ValueError, match="expected a column of"):
        scores(table.drop(columns="label_score"))
