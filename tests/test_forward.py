"""Training through a noise channel that depends on where a sample lies."""

import pytest
import torch

from als_ext import CorrectionConfig, LabelCorrector, correct_labels
from als_ext.forward import LocalChannel
from als_ext.ops import weighted_loss

CLASSES = 4


def blobs(n=800, seed=0):
    """Samples, true labels, and labels of which a third is wrong."""
    g = torch.Generator().manual_seed(seed)
    true = torch.arange(n) % CLASSES
    x = torch.randn(n, 8, generator=g)
    x[torch.arange(n), true] += 4
    given = true.clone()
    wrong = torch.rand(n, generator=g) < 0.33
    given[wrong] = (given[wrong] + torch.randint(1, CLASSES, (n,), generator=g)[wrong]) % CLASSES
    return x, true, given


def corrected(n=800):
    x, true, given = blobs(n)
    return correct_labels(x, given, metric="l2"), true, given


def channel_of(result, given, trust=None):
    trust = torch.zeros(len(given)) if trust is None else trust
    return LocalChannel(result, given, result.winner, trust)


def test_likelihoods_are_the_channel_but_for_the_class_of_the_place():
    result, _, given = corrected()
    log = channel_of(result, given).log_likelihood(torch.arange(len(given)))
    assert log.shape == (len(given), CLASSES)
    for i in (0, 5, 399, 799):
        w, y = int(result.winner[i]), int(given[i])
        near = [j for j in result.neighbours[i].tolist() if int(result.winner[j]) == w]
        seen = sum(int(given[j]) == y for j in near)
        wanted = result.channel[:, y].clone()
        wanted[w] = (seen + 20 * result.channel[w, y]) / (len(near) + 20)
        torch.testing.assert_close(log[i].exp(), wanted)


def test_a_block_of_rows_at_a_time_gives_the_same(monkeypatch):
    result, _, given = corrected()
    every = torch.arange(len(given))
    whole = channel_of(result, given).log_likelihood(every)
    monkeypatch.setattr("als_ext.forward._BLOCK", 7 * result.k)
    assert torch.equal(channel_of(result, given).log_likelihood(every), whole)


def test_where_one_wrong_label_rules_it_is_the_place_that_explains_it():
    """Class 0 is labelled 1 in nine of ten cases in one half of its region, never in the other."""
    g = torch.Generator().manual_seed(0)
    x, true, _ = blobs(4000)
    given = true.clone()
    there = (true == 0) & (x[:, 7] > 0)
    given[there & (torch.rand(len(true), generator=g) < 0.9)] = 1
    result = correct_labels(x, true, metric="l2")  # right labels ...
    channel = torch.eye(CLASSES).lerp(torch.full((CLASSES, CLASSES), 0.25), 0.2)
    object.__setattr__(result, "channel", channel)  # ... and a channel that knows no place
    log = channel_of(result, given).log_likelihood(torch.arange(len(true)))
    ruled = there & (given == 1) & (x[:, 7] > 0.7)
    # the class's channel says label 1 at a rate of .05: neighbours that have it raise that
    assert float(log[ruled, 0].exp().median()) > 0.3
    other = (true == 0) & (x[:, 7] < -0.7)
    assert float(log[other, 0].exp().median()) > 0.88  # .85 by the channel alone


def wanted_losses(logits, likelihood, winner, trust):
    """By the definition, float64."""
    log = logits.log_softmax(1)
    through = (log + likelihood.double()).logsumexp(1)
    return -((1 - trust) * through + trust * log.gather(1, winner[:, None])[:, 0])


def test_losses_are_those_of_the_definition_and_their_gradient_that_of_the_targets():
    result, _, given = corrected()
    g = torch.Generator().manual_seed(0)
    trust = torch.rand(len(given), generator=g)
    trust[::4] = 0.0
    trust[1::4] = 1.0
    channel = channel_of(result, given, trust)
    index = torch.arange(0, 800, 9)
    logits = (3 * torch.randn(len(index), CLASSES, generator=g)).double().requires_grad_()
    weight = torch.rand(len(index), generator=g).double()
    likelihood, winner = channel.log_likelihood(index), result.winner[index]
    wanted = wanted_losses(logits, likelihood, winner, trust[index].double())
    (slope,) = torch.autograd.grad((weight * wanted).sum(), logits)
    losses, target = channel.losses(logits.detach(), index)
    assert (losses.dtype, target.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=2e-6, atol=1e-6)
    total, _ = weighted_loss(logits, target.double(), weight)
    (found,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-6)


def test_what_is_trusted_wholly_is_learned_as_it_is_and_what_is_not_plays_no_part():
    result, _, given = corrected()
    relabelled = (result.winner != given).nonzero()[:5, 0]
    logits = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(0))
    trust = torch.zeros(len(given))
    _, target = channel_of(result, given, trust).losses(logits, relabelled)
    posterior = (logits + channel_of(result, given).log_likelihood(relabelled)).softmax(1)
    torch.testing.assert_close(target, posterior)
    trust[relabelled] = 1.0
    _, target = channel_of(result, given, trust).losses(logits, relabelled)
    assert torch.equal(
        target, torch.nn.functional.one_hot(result.winner[relabelled], CLASSES).float()
    )


def test_state_goes_and_comes_back():
    result, _, given = corrected()
    channel = channel_of(result, given)
    state = channel.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    again = LocalChannel.from_state_dict(state, torch.device("cpu"))
    index = torch.tensor([3, 700, 3])
    assert torch.equal(again.log_likelihood(index), channel.log_likelihood(index))


def test_a_guess_takes_the_place_of_the_first_guess():
    x, true, given = blobs()
    corrector = LabelCorrector(given, CLASSES, CorrectionConfig(metric="l2"))
    shifted = corrector.step(x, guess=(true + 1) % CLASSES)
    # votes and channel agree with whatever names the classes have
    assert float((shifted.winner == (true + 1) % CLASSES).float().mean()) > 0.9
    right = corrector.step(x, guess=true)
    assert float((right.winner == true).float().mean()) > 0.97
    assert right.survival == pytest.approx(float((given == true).double().mean()))


@pytest.mark.parametrize(
    ("guess", "error", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), ValueError, "guess: expected 800 entries"),
        (torch.full((800,), CLASSES), ValueError, r"guess: expected values in \[0, 4\), got 4"),
        (torch.zeros(800), TypeError, "guess: expected an integer dtype"),
    ],
)
def test_a_bad_guess_is_refused_and_nothing_changes(guess, error, message):
    x, _, given = blobs()
    corrector = LabelCorrector(given, CLASSES)
    with pytest.raises(error, match=message):
        corrector.step(x, guess=guess)
    assert len(corrector.history) == 0


def test_a_guess_and_given_suspects_exclude_each_other():
    x, true, given = blobs()
    corrector = LabelCorrector(given, CLASSES, CorrectionConfig(suspects=0.3))
    with pytest.raises(ValueError, match=r"guess: expected None with suspects=0\.3"):
        corrector.step(x, scores=torch.zeros(800), guess=true)
