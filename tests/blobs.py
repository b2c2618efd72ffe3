"""A problem small enough to see the known effect of a method: blobs with wrong labels."""

import torch

from als_ext import TrainConfig, Trainer
from als_ext.models import MLP

CLASSES, FEATURES = 3, 20  # features enough to memorise wrong labels by


def blobs(n=600, rate=0.4, seed=0):
    """Inputs, given labels of which a share is wrong, true labels."""
    g = torch.Generator().manual_seed(seed)
    true = torch.arange(n) % CLASSES
    x = torch.randn(n, FEATURES, generator=g)
    x[:, :CLASSES] += 3 * torch.nn.functional.one_hot(true, CLASSES)
    shift = torch.randint(1, CLASSES, (n,), generator=g)
    wrong = torch.rand(n, generator=g) < rate
    return x, torch.where(wrong, (true + shift) % CLASSES, true), true


def trainer(method, epochs=20, config=None, **settings):
    """A small network on blobs; ``config`` goes to TrainConfig, the rest to the method."""
    torch.manual_seed(0)
    model = MLP((FEATURES,), CLASSES, hidden=(64, 32))
    base = {"batch_size": 32, "lr": 3e-3, "device": "cpu", **(config or {})}
    return Trainer(
        model,
        TrainConfig(method=method, epochs=epochs, settings=settings, **base),
        num_classes=CLASSES,
    )


def train(method, given, x, test, **arguments):
    """The result of a whole run."""
    return trainer(method, **arguments).fit(x, given, test=test)
