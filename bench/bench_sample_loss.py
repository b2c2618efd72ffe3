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
from bench.bench_weighted_loss import GPU_SHAPES, SHAPES, fits, gpu_targets
from bench.inputs import COPY, LIMIT, batch, copy_of, deviation, some_rows
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
    exact = partial(float64_loss, loss=loss, **parameters)
    parts = [full(exact, z.double().requires_grad_(), y, w) for z, y, w in some_rows(*data)]
    want = tuple(map(torch.cat, zip(*parts, strict=True)))
    run = forward if part == "forward" else full

    def error(function):
        return lambda: deviation(full(function, *data), want)

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
            return deviation(full(function, logits, *data[1:]), want)

        peers.add_losses(lineup, data[0], third_party, third_party_error, quick)
    size = data[0].numel() * data[0].element_size()
    lineup.ceiling(COPY, copy_of(size if run is forward else 3 * size, device))
    if device.type == "cuda" and run is full:
        lineup.at_least = gpu_targets(classes, dtype)
    return lineup


def races(quick):
    cases = [
        ("cross_entropy", part, *shape, dtype)
        for part in ("forward", "full")
        for dtype in LIMIT
        for shape in ([(64, 10)] if quick else SHAPES + GPU_SHAPES)
        if fits(*shape, dtype)
    ]
    shape = (64, 10) if quick else (8192, 100)
    cases += [(loss, "full", *shape, "float32") for loss in ("focal", "gce")]
    for loss, part, rows, classes, dtype in cases:
        case = f"{loss} {part}, {rows} × {classes}, {dtype}"
        make = partial(setup, loss, part, rows, classes, dtype, quick)
        yield Race("sample_loss", case, make, gpu_only=(rows, classes) in GPU_SHAPES)
