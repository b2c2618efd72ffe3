"""Forward and backward of the weighted sum of losses, as in a training step.

Ceiling: the logits are read once and the gradient is written once; so does a copy of them.
"""

from functools import partial

import torch
import torch.nn.functional as F

from als_ext.ops import sample_loss, weighted_loss
from als_ext.reference.sample_loss import sample_loss as float64_loss
from bench import peers
from bench.curve import Curve
from bench.inputs import COPY, LIMIT, batch, copy_of, counts, exact, total_off
from bench.race import NOT_COMPILED, Lineup, Race, compile_peer

SHAPES = [
    *((32, 10), (256, 10), (8192, 10)),
    *((256, 100), (8192, 100), (8192, 1000), (1024, 32_000)),
]

TARGETS = {
    (8192, 10, "float32"): {"torch eager": 3.0},
    (8192, 1000, "float32"): {"torch eager": 5.0, "torch.compile": 3.0},
}

# On a GPU: of a copy's bandwidth and against peers that are written for few or many classes.
NARROW = {COPY: 0.8, "torch.compile": 2.5, peers.QUACK: 1.5}
GPU_TARGETS = {
    **{(32_768, classes, "bfloat16"): NARROW for classes in (256, 1024, 2048)},
    **{(8192, classes, "bfloat16"): {peers.LIGER_MEAN: 1.4} for classes in (4096, 128_256)},
}
GPU_SHAPES = [*GPU_TARGETS, (32_768, 1024, "float32"), (8192, 32_000, "bfloat16")]
# Batches so small that only launches take time: that of the forward pass, gradient included.
LAUNCH, FORWARD, LAUNCHES = "empty launch", "forward alone", "forward_over_an_empty_launch"
SMALL = [(256, 10, "float32"), (256, 10, "bfloat16"), (4096, 100, "bfloat16")]
GPU_SHAPES += SMALL[2:]


def eager(logits, target, weight):
    losses = F.cross_entropy(logits, target, reduction="none")
    return (weight * losses).sum(), losses


def reduced(loss, logits, target, weight):
    """The weighted sum of another library's losses."""
    losses = loss(logits, target)
    return (weight * losses).sum(), losses


def composed(logits, target, weight):
    losses = sample_loss(logits, target)
    return (weight * losses).sum(), losses


def step(function, logits, target, weight):
    total, _ = function(logits, target, weight)
    return total.detach(), torch.autograd.grad(total, logits)[0]


def setup(rows, classes, dtype, quick, device):
    data = batch(rows, classes, dtype, device)
    data[0].requires_grad_()
    want = exact(float64_loss, *data)

    def error(function):
        return lambda: total_off(step(function, *data), data[2], want())

    lineup = Lineup("total and gradients, relative, against float64", LIMIT[dtype])
    lineup.ours(partial(step, weighted_loss, *data), error(weighted_loss))
    lineup.variant("by sample_loss", partial(step, composed, *data), error=error(composed))
    lineup.peer("torch eager", partial(step, eager, *data), error=error(eager))
    compiled = compile_peer(eager, quick)
    if compiled is None:
        lineup.skip("torch.compile", NOT_COMPILED)
    else:
        lineup.peer("torch.compile", partial(step, compiled, *data), compiled=True)
    logits = data[0]

    def third_party(loss, logits):
        return step(partial(reduced, loss), logits, *data[1:])

    def third_party_error(loss, logits):
        return total_off(third_party(loss, logits), data[2], want())

    peers.add_losses(lineup, logits, third_party, third_party_error, quick)
    peers.add_unweighted(lineup, logits, data[1], quick)
    lineup.ceiling(COPY, copy_of(2 * logits.numel() * logits.element_size(), device))
    lineup.at_least = TARGETS.get((rows, classes, dtype), {})
    if device.type == "cuda" and (rows, classes, dtype) in SMALL:
        lineup.ceiling(LAUNCH, partial(torch.cuda._sleep, 0))
        lineup.part(FORWARD, partial(weighted_loss, *data))
        lineup.derive = lambda median: {LAUNCHES: median[FORWARD] / median[LAUNCH]}
    return lineup


def races(quick):
    shapes = [(64, 10), (64, 100)] if quick else SHAPES
    sizes = [(*shape, dtype) for dtype in LIMIT for shape in shapes]
    for size in sizes + ([] if quick else GPU_SHAPES):
        yield Race(
            "weighted_loss",
            "{} × {}, {}".format(*size),
            partial(setup, *size, quick),
            gpu_only=size not in sizes,
            counts=counts(*size, passes=2),
            gpu_at_least=GPU_TARGETS.get(size, {}),
            gpu_at_most={LAUNCHES: 1.2} if size in SMALL else {},
        )


def curves(quick):
    rows = 64 if quick else 1024
    classes = [10, 40] if quick else [10, 32, 100, 316, 1000, 3162, 10_000, 32_000]

    def point(function, count):
        data = batch(rows, count, "float32", torch.device("cpu"))
        data[0].requires_grad_()
        return partial(step, function, *data)

    yield Curve(
        "weighted_loss",
        f"classes C (forward and backward, {rows} rows, float32)",
        {
            "ours": {count: partial(point, weighted_loss, count) for count in classes},
            "torch eager": {count: partial(point, eager, count) for count in classes},
        },
        fit_from=10 if quick else 1000,
    )
