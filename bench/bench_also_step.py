import pytest
import torch

from als_ext.ops.also_step import also_step_
from als_ext.reference.also_step import AlsoState, also_step

LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-3
# (tensors, elements a tensor): one large, a ResNet-18-like number, a small CNN
SIZES = {"one_16M": (1, 16_000_000), "60_of_200k": (60, 200_000), "8_of_12k": (8, 12_000)}


def composite(params, grads, exp_avgs, exp_avg_sqs, bases):
    """The same mathematics from torch's multi-tensor calls, as torch.optim writes Adam."""
    gradient = torch._foreach_add(grads, params, alpha=DECAY)

    def adam_step(points):  # the bias corrections of a late step; their values cost no time
        torch._foreach_lerp_(exp_avgs, gradient, 1 - BETA1)
        torch._foreach_mul_(exp_avg_sqs, BETA2)
        torch._foreach_addcmul_(exp_avg_sqs, gradient, gradient, 1 - BETA2)
        denominator = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominator, 0.9)
        torch._foreach_add_(denominator, EPS)
        torch._foreach_addcdiv_(points, exp_avgs, denominator, -LR)

    adam_step(bases)
    torch._foreach_copy_(params, bases)
    adam_step(params)


@pytest.mark.parametrize("name", SIZES)
def test_also_step(race, device, name):
    tensors, elements = SIZES[name]
    elements = race.size(elements, 500)
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(elements, generator=g).to(device) for _ in range(tensors)]
    start = [torch.randn(elements, generator=g).to(device) for _ in range(tensors)]
    settings = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}

    def copies():
        return [p.clone() for p in start]

    def zeros():
        return [torch.zeros_like(p) for p in start]

    def lists(bases):
        steps = [torch.zeros((), dtype=torch.int64, device=device) for _ in start]
        return copies(), grads, zeros(), zeros(), [], bases, steps

    ours = lists(copies())
    also_step_(*ours, **settings)
    state = AlsoState.start(start[-1])
    want = also_step(start[-1], grads[-1], state, **settings)
    error = (ours[0][-1].double() - want).abs().max().item() / LR
    descent_ascent = lists([])
    composite_lists = copies(), grads, zeros(), zeros(), copies()
    compiled_lists = copies(), grads, zeros(), zeros(), copies()
    compiled = composite if race.smoke else torch.compile(composite)
    params = [torch.nn.Parameter(p) for p in copies()]
    for p, gradient in zip(params, grads, strict=True):
        p.grad = gradient
    adamw = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)
    traffic = torch.randn(tensors * elements * 36 // 8, device=device)  # 36 bytes, read or written
    target = torch.empty_like(traffic)
    race(
        {
            "ours": lambda: also_step_(*ours, **settings),
            "ours without half step": lambda: also_step_(*descent_ascent, **settings),
            "torch fused AdamW (one step)": adamw.step,
            "foreach composite": lambda: composite(*composite_lists),
            "torch.compile composite": lambda: compiled(*compiled_lists),
            "copy of 36 bytes a parameter (ceiling)": lambda: target.copy_(traffic),
        },
        error=error,
        limit=1e-3,  # of one step's length; base ~ 1 in float32 leaves 1e-7 / LR
    )
