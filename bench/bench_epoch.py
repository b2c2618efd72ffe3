"""An epoch of ALSO with label correction against an epoch of AdamW.

60,000 synthetic images in MNIST's shape (class templates plus noise, a fifth of the labels wrong),
the package's small CNN, batches of 256. Raced: some steps of training, with the batches taken as
the Trainer takes them. A correction is what the Trainer does after an epoch: embeddings of all
samples, a step of the LabelCorrector at its defaults, the reset of the relabelled samples; it is
timed on all 60,000. A run of TrainConfig's default epochs makes as many as its warm-up, its period
and LabelCorrector.converged say, which is tried out before the race.
"""

import itertools
from functools import partial

import torch
import torch.nn.functional as F

from als_ext import ALSO, LabelCorrector, TrainConfig
from als_ext.data import TensorBatches
from als_ext.embedding import make_embedder
from als_ext.models import build_model
from als_ext.ops import weighted_loss
from als_ext.reference.weighted_loss import weighted_loss as float64_loss
from als_ext.trainer import _EVAL_BATCH
from bench.race import USUAL, Lineup, Race

CLASSES, BATCH, STEPS = 10, 256, 5
WARM_UP = 60  # steps before the embeddings are taken
ADAMW, EMBED, CORRECT = "AdamW + cross_entropy", "embeddings of all", "correction of all"


def images(rows):
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(0, CLASSES, (rows,), generator=g)
    x = torch.randn(rows, 1, 28, 28, generator=g)
    x += (
        2
        * torch.nn.functional.interpolate(
            torch.randn(CLASSES, 1, 7, 7, generator=g), scale_factor=4
        )[truth]
    )
    other = torch.randint(0, CLASSES, (rows,), generator=g)
    return x, torch.where(torch.rand(rows, generator=g) < 0.2, other, truth)


def model():
    torch.manual_seed(0)
    return build_model("cnn", (1, 28, 28), CLASSES)


def endless(x, y):
    batches = TensorBatches(x, y, BATCH, seed=0, drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(batches))


def adamw(x, y):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    batches = endless(x, y)

    def steps(count):
        for image, label, _ in itertools.islice(batches, count):
            loss = F.cross_entropy(net(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    return steps


def also(net, optimizer, x, y):
    batches = endless(x, y)

    def steps(count):
        for image, label, index in itertools.islice(batches, count):
            total, losses = weighted_loss(net(image), label, optimizer.loss_weight(index))
            optimizer.zero_grad()
            total.backward()
            optimizer.step(index=index, losses=losses)
        return total.item()

    return steps


def forward_backward(x, y):
    net = model()
    batches = endless(x, y)

    def steps(count):
        for image, label, _ in itertools.islice(batches, count):
            net.zero_grad()
            F.cross_entropy(net(image), label).backward()

    return steps


def setup(rows, steps, device):
    x, y = images(rows)
    net = model()
    optimizer = ALSO(net.parameters(), n=rows)
    ours, plain, bare = also(net, optimizer, x, y), adamw(x, y), forward_backward(x, y)
    warm_up = WARM_UP if rows > WARM_UP * BATCH else steps
    ours(warm_up)  # the embeddings of a run have clusters
    embed = make_embedder(net)

    def embeddings():
        with torch.no_grad():
            return torch.cat([embed(part) for part in x.split(_EVAL_BATCH)])

    embedded, weights = embeddings(), optimizer.weights

    def correct():
        result = LabelCorrector(given, CLASSES).step(embedded, weights.log_pi())
        weights.reset_(result.changed.nonzero()[:, 0])

    config, count = TrainConfig(), (rows + BATCH - 1) // BATCH
    due = len(range(config.warmup, config.epochs, config.period))

    def corrections():
        """How many a run makes, WARM_UP steps of training apart."""
        corrector = LabelCorrector(y, CLASSES)
        for made in range(due):
            if corrector.converged:
                return made
            result = corrector.step(embeddings(), weights.log_pi())
            y.copy_(result.new_label)
            weights.reset_(result.changed.nonzero()[:, 0])
            ours(warm_up)
        return due

    given = y.clone()
    made = corrections()
    y.copy_(given)

    def error():
        with torch.no_grad():
            logits, label, weight = net(x[:BATCH]), y[:BATCH], torch.ones(BATCH)
        got, want = (f(logits, label, weight)[0] for f in (weighted_loss, float64_loss))
        return ((got - want).abs() / want).item()

    def derive(median):
        also_epoch, plain_epoch = median["ours"] * count, median[ADAMW] * count
        correction = (median[EMBED] + median[CORRECT]) / plain_epoch
        bare = also_epoch / plain_epoch
        return {
            "ratio_without_correction": bare,
            "ratio_with_correction": bare + made * correction / config.epochs,
            "ratio_with_every_correction": bare + due * correction / config.epochs,
            "correction_in_epochs_of_adamw": correction,
            "embeddings_in_epochs_of_adamw": median[EMBED] / plain_epoch,
            "epochs": config.epochs,
            "corrections": made,
            "corrections_when_none_converges": due,
            "corrections_for_1.10": max(0.0, 1.10 - bare) * config.epochs / correction,
            "steps_an_epoch": count,
        }

    lineup = Lineup(
        "weighted loss of a batch, relative, against float64", 2e-6, derive=derive, least=USUAL
    )
    lineup.at_most = {"ratio_with_correction": 1.10}
    lineup.note = f"{steps} steps a round"
    lineup.ours(partial(ours, steps), error, repeat=steps)
    lineup.peer(ADAMW, partial(plain, steps), repeat=steps)
    lineup.ceiling("forward and backward alone", partial(bare, steps), repeat=steps)
    lineup.part(EMBED, embeddings)
    lineup.part(CORRECT, correct)
    return lineup


def races(quick):
    rows, steps = (2048, 2) if quick else (60_000, STEPS)
    case = f"{rows} images, batches of {BATCH}"
    yield Race("epoch", case, partial(setup, rows, steps), True)
