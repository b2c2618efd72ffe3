"""Forward and backward of the weighted sum of losses, as in a training step.

Ceiling: the logits are read once and the gradient is written once; so does a copy of them.
"""

from functools import partial

import torch
import torch.nn.functional as F

from als_ext.ops import sample_loss, weighted_loss
from als_ext.reference.weighted_loss import weighted_loss as float64_loss
from bench import peers
from bench.curve import Curve
from bench.inputs import COPY, LIMIT, batch, copy_of, deviation, some_rows
from bench.race import NOT_COMPILED, Lineup, Race, compile_peer

SHAPES = [
    *((32, 10), (256, 10), (8192, 10)),
    *((256, 100), (8192, 100), (8192, 1000), (1024, 32_000)),
]

# On a GPU beside the others; the last one in bfloat16 alone, for its float64 twin to fit as well.
GPU_SHAPES = [(32_768, 256), (8192, 4096), (4096, 32_000), (4096, 128_256), (8192, 128_256)]


def fits(rows, classes, dtype):
    return dtype == "bfloat16" or rows * classes <= 4096 * 128_256


TARGETS = {
    (8192, 10, "float32"): {"torch eager": 3.0},
    (8192, 1000, "float32"): {"torch eager": 5.0, "torch.compile": 3.0},
}


EMPTY_LAUNCH = "empty launch"


def gpu_targets(classes, dtype):
    """Of a copy's bandwidth, and against peers that are written for few or many classes."""
    if dtype == "bfloat16" and 100 < classes <= 1024:
        return {COPY: 0.8, "torch.compile": 2.5, peers.QUACK: 1.5}
    return {peers.LIGER: 1.4} if dtype == "bfloat16" and classes >= 4096 else {}


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


def in_float64(*data):
    """Total and gradient."""
    parts = [step(float64_loss, z.double().requires_grad_(), y, w) for z, y, w in some_rows(*data)]
    return sum(total for total, _ in parts), torch.cat([grad for _, grad in parts])


def setup(rows, classes, dtype, quick, device):
    data = batch(rows, classes, dtype, device)
    data[0].requires_grad_()
    want = in_float64(*data)

    def error(function):
        return lambda: deviation(step(function, *data), want)

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
        return deviation(third_party(loss, logits), want)

    peers.add_losses(lineup, logits, third_party, third_party_error, quick)
    lineup.ceiling(COPY, copy_of(2 * logits.numel() * logits.element_size(), device))
    lineup.at_least = TARGETS.get((rows, classes, dtype), {})
    if device.type == "cuda":
        lineup.at_least = gpu_targets(classes, dtype)
        if rows <= 4096 and classes <= 100:  # a batch so small that only launches take time
            lineup.ceiling(EMPTY_LAUNCH, partial(torch.cuda._sleep, 0))
            lineup.at_least = {EMPTY_LAUNCH: 1 / 1.2}
    return lineup


def races(quick):
    for dtype in LIMIT:
        for rows, classes in [(64, 10), (64, 100)] if quick else SHAPES:
            case = f"{rows} × {classes}, {dtype}"
            yield Race("weighted_loss", case, partial(setup, rows, classes, dtype, quick))
        for rows, classes in [] if quick else GPU_SHAPES:
            if not fits(rows, classes, dtype):
                continue
            case = f"{rows} × {classes}, {dtype}"
            make = partial(setup, rows, classes, dtype, quick)
            yield Race("weighted_loss", case, make, gpu_only=True)


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
