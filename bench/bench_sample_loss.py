"""Losses of the samples: forward alone, and with the backward pass of given weights.

Ceiling: a copy that moves as many bytes: forward reads the logits; backward reads them again and
writes the gradient.
"""

from functools import partial

import torch
import torch.nn.functional as F

from als_ext.ops import sample_loss
from als_ext.reference.sample_loss import sample_loss as float64_loss
from bench import peers
from bench.bench_weighted_loss import NARROW, SHAPES
from bench.inputs import COPY, LIMIT, batch, copy_of, counts, exact, losses_off
from bench.race import NOT_COMPILED, Lineup, Race, compile_peer


def cross_entropy(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


def focal(logits, target):
    """The usual way, as of the focal loss of torchvision, for class indices."""
    log_p = F.log_softmax(logits, dim=1).gather(1, target[:, None]).squeeze(1)
    return -((1 - log_p.exp()) ** 2) * log_p


def gce(logits, target):
    p = logits.softmax(dim=1).gather(1, target[:, None]).squeeze(1)
    return (1 - p**0.7) / 0.7


# On a GPU beside the others, with the targets of forward and backward together.
GPU_SHAPES = {
    (32_768, 256, "bfloat16"): NARROW,
    (32_768, 1024, "bfloat16"): NARROW,
    (8192, 32_000, "bfloat16"): {peers.LIGER: 1.4},
}
PASSES = {"forward": 1, "full": 3}  # over the logits; backward reads them and writes the gradient

EAGER = {
    "cross_entropy": (cross_entropy, {}),
    "focal": (focal, {"gamma": 2.0}),
    "gce": (gce, {"q": 0.7}),
}


def forward(function, logits, target, weight):
    with torch.no_grad():
        return function(logits, target)


def full(function, logits, target, weight):
    """Losses, and the gradient of their weighted sum."""
    values = function(logits, target)
    return values.detach(), torch.autograd.grad(values, logits, weight.to(values.dtype))[0]


def setup(loss, part, rows, classes, dtype, quick, device):
    data = batch(rows, classes, dtype, device)
    data[0].requires_grad_()
    eager, parameters = EAGER[loss]
    ours = partial(sample_loss, loss=loss, **parameters)
    want = exact(partial(float64_loss, loss=loss, **parameters), *data)
    run = forward if part == "forward" else full

    def error(function):
        return lambda: losses_off(full(function, *data), want())

    lineup = Lineup("losses and gradients, relative, against float64", LIMIT[dtype])
    lineup.ours(partial(run, ours, *data), error(ours))
    lineup.peer("torch eager", partial(run, eager, *data), error=error(eager))
    compiled = compile_peer(eager, quick)
    if compiled is None:
        lineup.skip("torch.compile", NOT_COMPILED)
    else:
        lineup.peer("torch.compile", partial(run, compiled, *data), compiled=True)
    if loss == "cross_entropy":

        def third_party(function, logits):
            return run(function, logits, *data[1:])

        def third_party_error(function, logits):
            return losses_off(full(function, logits, *data[1:]), want())

        with_gradient = run is full
        peers.add_losses(
            lineup, data[0], third_party, third_party_error, quick, with_gradient=with_gradient
        )
    size = data[0].numel() * data[0].element_size()
    lineup.ceiling(COPY, copy_of(PASSES[part] * size, device))
    return lineup


def races(quick):
    shapes = [(64, 10)] if quick else SHAPES
    sizes = [(*shape, dtype) for dtype in LIMIT for shape in shapes]
    cases = [
        ("cross_entropy", part, *size)
        for part in PASSES
        for size in sizes + ([] if quick else [*GPU_SHAPES])
    ]
    shape = (64, 10) if quick else (8192, 100)
    cases += [(loss, "full", *shape, "float32") for loss in ("focal", "gce")]
    for loss, part, *size in cases:
        key = tuple(size)
        yield Race(
            "sample_loss",
            "{} {}, {} × {}, {}".format(loss, part, *size),
            partial(setup, loss, part, *size, quick),
            gpu_only=key in GPU_SHAPES,
            counts=counts(*size, passes=PASSES[part]),
            gpu_at_least=GPU_SHAPES.get(key, {}) if part == "full" else {},
        )
