"""Whether given labels are evidence where neighbours dispute them, and what holds without them."""

import pytest
import torch

from als_ext import CorrectionConfig, LabelCorrector, correct_labels
from als_ext.correction.disputes import (
    _LinearClassifier,
    labels_are_evidence,
    propagated_labels,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def plane(n=2000, seed=0, border=0.0):
    """Points around the circle's right half, on which a line through a border parts two classes."""
    g = torch.Generator().manual_seed(seed)
    angle = 2 * torch.rand(n, generator=g) - 1
    x = torch.stack([angle.sin(), angle.cos(), torch.rand(n, generator=g)], dim=1)
    return x, angle - border, (angle > border).long()


@pytest.mark.parametrize("border", [-0.2, 0.0, 0.1])
def test_labels_that_no_straight_border_follows_are_no_evidence(border):
    """Mistakes along the border: from what lies farther off, the first guess is right."""
    x, angle, true = plane(border=border)
    given = torch.where(angle.abs() < 0.1, 1 - true, true)
    assert not labels_are_evidence(x, given, guess=true, winner=given, num_classes=2)
    # nothing is in question where Bayes' rule gave these labels up
    assert labels_are_evidence(x, given, guess=true, winner=true, num_classes=2)


@pytest.mark.parametrize("border", [-0.7, -0.3, 0.0, 0.3, 0.7])
def test_labels_on_the_right_side_of_a_straight_border_are_evidence(border):
    """Here it is the first guess that bends; one of the classes may be small."""
    x, angle, true = plane(border=border)
    guess = (angle > 0.3 * (8 * x[:, 2]).sin()).long()
    assert 0.05 < float((guess != true).double().mean()) < 0.25
    assert labels_are_evidence(x, true, guess, winner=true, num_classes=2)


@pytest.mark.parametrize(("share", "expected"), [(0.04, True), (0.06, False)])
def test_few_samples_in_question_are_not_worth_it(share, expected):
    x, angle, true = plane()
    nearest = angle.abs().argsort()[: round(share * len(x))]
    given = true.clone()
    given[nearest] = 1 - true[nearest]
    assert labels_are_evidence(x, given, true, given, 2) is expected


def test_labels_that_all_dispute_are_evidence_since_nothing_else_is():
    x, _, true = plane(100)
    assert labels_are_evidence(x, 1 - true, true, 1 - true, 2)


def test_scores_are_those_of_a_ridge_regression_of_classes_of_the_same_weight(monkeypatch):
    x, _, true = plane(300, border=0.4)
    known = torch.arange(300) % 3 > 0
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    features = torch.cat([unit, torch.ones(300, 1, dtype=torch.float64)], dim=1)
    own = features[known]
    own = own * true[known].bincount()[true[known], None].double().rsqrt()
    penalty = 1e-3 * float((own.T @ own).diagonal()[:-1].mean())
    ridge = penalty**0.5 * torch.eye(4, dtype=torch.float64)
    ridge[3, 3] = 0.0  # not on the constant
    target = torch.eye(2, dtype=torch.float64)[true[known]] * own[:, 3:]
    wide, target = torch.cat([own, ridge]), torch.cat([target, torch.zeros(4, 2)])
    wanted = features[~known] @ torch.linalg.lstsq(wide, target).solution

    def found(x):
        classifier = _LinearClassifier(x, true, known, 2)
        return torch.cat([classifier(rows) for rows in classifier.blocks(~known)])

    torch.testing.assert_close(found(x), wanted, rtol=1e-6, atol=1e-6)  # rows are float32
    monkeypatch.setattr("als_ext.correction.disputes._BLOCK", 50)
    torch.testing.assert_close(found(x), wanted, rtol=1e-6, atol=1e-6)
    scaled = x * torch.rand(300, 1).add(0.1)
    torch.testing.assert_close(found(scaled), wanted, rtol=1e-5, atol=1e-5)


def test_of_very_many_features_random_combinations_are_enough():
    x, angle, true = plane()
    given = torch.where(angle.abs() < 0.1, 1 - true, true)
    wide = x @ torch.randn(3, 3000, generator=torch.Generator().manual_seed(0))
    assert not labels_are_evidence(wide, given, true, given, 2)
    guess = (angle > 0.3 * (8 * x[:, 2]).sin()).long()
    assert labels_are_evidence(wide, true, guess, true, 2)
    assert _LinearClassifier(wide, true, true >= 0, 2)._weight.shape == (513, 2)


def blobs(n=1600, seed=0):
    """Four classes in the plane that touch; the quarter that lies nearest to another is wrong."""
    g = torch.Generator().manual_seed(seed)
    true = torch.arange(n) % 4
    middle = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, -2.0], [-2.0, 2.0]])
    x = middle[true] + 0.85 * torch.randn(n, 2, generator=g)
    distance = torch.cdist(x, middle)
    own = distance.gather(1, true[:, None])[:, 0]
    other, which = distance.scatter(1, true[:, None], float("inf")).min(dim=1)
    hardest = (other - own).argsort()[: n // 4]
    given = true.clone()
    given[hardest] = which[hardest]
    return x, true, given


def test_labels_spread_as_by_hand():
    x, _, given = blobs(320)
    guess = correct_labels(x, given, metric="l2").guess
    far, near = 320 // (16 * 4), 2
    distance = torch.cdist(x.double(), x.double()).fill_diagonal_(float("inf"))
    order = distance.argsort(dim=1)

    def plurality(voter, k):
        out = []
        for row in range(320):
            votes = [int(voter[j]) for j in order[row, :k] if int(voter[j]) >= 0]
            counts = [votes.count(c) for c in range(4)]
            out.append(counts.index(max(counts)) if votes else int(guess[row]))
        return torch.tensor(out)

    wanted = plurality(torch.where(given == guess, given, -1), far)
    for _ in range(10):
        wanted = plurality(wanted, near)
    found = propagated_labels(x, given, guess, 4, CorrectionConfig(metric="l2", k=2))
    assert torch.equal(found.label, wanted)
    assert torch.equal(found.origin, guess)


def test_votes_alone_find_what_evidence_would_not():
    """Mistakes gather where classes meet: Bayes' rule believes them, votes do not."""
    x, true, given = blobs()
    config = CorrectionConfig(metric="l2")
    heard = correct_labels(x, given, metric="l2")
    assert not labels_are_evidence(x, given, heard.guess, heard.winner, 4)
    guess = propagated_labels(x, given, heard.guess, 4, config).label
    corrector = LabelCorrector(given, 4, config)
    alone = corrector.step(x, guess=guess, votes_only=True)

    def right(label):
        return float((label == true).double().mean())

    assert right(given) == 0.75
    assert right(alone.new_label) > 0.93 > right(heard.new_label) + 0.03
    assert torch.equal(alone.guess, guess)
    # the channel is still that of the given labels
    assert torch.equal(alone.channel.argmax(1), torch.arange(4))
    assert float(alone.channel.diagonal().min()) > 0.5


def test_votes_alone_do_not_look_at_given_labels():
    x, true, given = blobs()
    config = CorrectionConfig(metric="l2")
    steps = [
        LabelCorrector(labels, 4, config).step(x, guess=true, votes_only=True)
        for labels in (given, true, (true + 1) % 4)
    ]
    for other in steps[1:]:
        assert torch.equal(other.winner, steps[0].winner)
        assert torch.equal(other.share, steps[0].share)


def test_votes_alone_and_given_suspects_exclude_each_other():
    x, _, given = blobs(100)
    corrector = LabelCorrector(given, 4, CorrectionConfig(suspects=0.3))
    with pytest.raises(ValueError, match=r"votes_only: expected False with suspects=0\.3, got Tr"):
        corrector.step(x, scores=torch.arange(100.0), votes_only=True)
    assert corrector.step(x, scores=torch.arange(100.0)).guess is None


def test_votes_alone_hear_no_scores():
    x, _, given = blobs(100)
    with pytest.raises(ValueError, match="scores: expected None with votes_only=True, got some"):
        LabelCorrector(given, 4).step(x, scores=torch.arange(100.0), votes_only=True)
