import pytest
import torch
import torch.nn.functional as F

from als_ext.ops import sample_loss, weighted_loss
from als_ext.reference.weighted_loss import weighted_loss as float64_loss

SHAPES = [(256, 10), (8192, 10), (8192, 1000), (1024, 32_000)]
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # bfloat16: gradients are rounded once


def eager(logits, target, weight):
    losses = F.cross_entropy(logits, target, reduction="none")
    return (weight * losses).sum(), losses


def composed(logits, target, weight):
    losses = sample_loss(logits, target)
    return (weight * losses).sum(), losses


def deviation(got, want):
    """Largest error of the total (relative) and of gradients (relative to the row's largest)."""
    total = (got[0] - want[0]).abs() / (1 + want[0].abs())
    scale = want[1].abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    return max(total.item(), ((got[1] - want[1]).abs() / scale).max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_weighted_loss(race, device, rows, classes, dtype):
    """Forward and backward with a weight for every sample, as in a training step."""
    rows, classes = race.size(rows, 64), race.size(classes, 10)
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, classes, generator=g) * 3).to(dtype).to(device).requires_grad_()
    target = torch.randint(0, classes, (rows,), generator=g).to(device)
    weight = torch.rand(rows, generator=g).to(device)
    compiled = eager if race.smoke else torch.compile(eager, dynamic=False)

    def step(function, z=logits):
        total, _ = function(z, target, weight)
        return total.detach(), torch.autograd.grad(total, z)[0]

    error = deviation(step(weighted_loss), step(float64_loss, logits.double()))
    source = logits.detach()
    target_of_copy = torch.empty_like(source)
    race(
        {
            "ours": lambda: step(weighted_loss),
            "ours by sample_loss": lambda: step(composed),
            "torch eager": lambda: step(eager),
            "torch.compile": lambda: step(compiled),
            "copy of the logits (ceiling)": lambda: target_of_copy.copy_(source),
        },
        error=error,
        limit=LIMIT[dtype],
    )
