import pytest
import torch
import torch.nn.functional as F

from als_ext.ops import sample_loss
from als_ext.reference.sample_loss import sample_loss as float64_loss

SHAPES = [(8192, 10), (8192, 1000), (1024, 32_000)]
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # bfloat16: gradients are rounded once


def focal(logits, target):
    """The usual way, as of the focal loss of torchvision, for class indices."""
    log_p = F.log_softmax(logits, dim=1).gather(1, target[:, None]).squeeze(1)
    return -((1 - log_p.exp()) ** 2) * log_p


def cross_entropy(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


LOSSES = {
    "cross_entropy": (cross_entropy, {}),
    "focal": (focal, {"gamma": 2.0}),
}


def data(rows, classes, dtype, device):
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, classes, generator=g) * 3).to(dtype).to(device)
    target = torch.randint(0, classes, (rows,), generator=g).to(device)
    return logits, target, torch.rand(rows, generator=g).to(device)


def both(function, logits, target, weight):
    """Losses, and the gradient of their weighted sum."""
    values = function(logits, target)
    return values.detach(), torch.autograd.grad(values, logits, weight.to(values.dtype))[0]


def deviation(got, want):
    """Largest error of losses (relative) and gradients (relative to the largest of the row)."""
    loss = ((got[0] - want[0]).abs() / (1 + want[0].abs())).max()
    scale = want[1].abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    return max(loss.item(), ((got[1] - want[1]).abs() / scale).max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
@pytest.mark.parametrize("part", ["forward", "backward", "full"])
@pytest.mark.parametrize("loss", LOSSES)
def test_sample_loss(race, device, loss, part, rows, classes, dtype):
    eager, parameters = LOSSES[loss]
    logits, target, weight = data(race.size(rows, 64), race.size(classes, 10), dtype, device)
    logits.requires_grad_()

    def ours(logits, target):
        return sample_loss(logits, target, loss=loss, **parameters)

    compiled = eager if race.smoke else torch.compile(eager, dynamic=False)
    want = both(
        lambda z, y: float64_loss(z, y, loss=loss, **parameters), logits.double(), target, weight
    )
    error = deviation(both(ours, logits, target, weight), want)
    functions = {"ours": ours, "torch eager": eager, "torch.compile": compiled}

    def contender(function):
        if part == "forward":
            return lambda: function(logits, target)
        if part == "full":
            return lambda: both(function, logits, target, weight)
        values = function(logits, target)
        factor = weight.to(values.dtype)
        return lambda: torch.autograd.grad(values, logits, factor, retain_graph=True)

    contenders = {name: contender(function) for name, function in functions.items()}
    source = logits.detach()
    target_of_copy = torch.empty_like(source)
    contenders["copy of the logits (ceiling)"] = lambda: target_of_copy.copy_(source)
    race(contenders, error=error, limit=LIMIT[dtype])
