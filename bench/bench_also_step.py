"""The optimizer's step: main step and next half step in one pass.

Peers: torch's fused AdamW, which makes one step instead of two, and the same two steps from torch's
multi-tensor calls. Ceiling: one multiplication in place that moves the 36 bytes a parameter. A copy
would be slower than that: memory that is written without having been read is read all the same.
"""

from functools import partial

import torch

from als_ext.ops.also_step import also_step_
from als_ext.reference.also_step import AlsoState, also_step
from bench.race import NOT_COMPILED, Counts, Lineup, Race, compile_peer

LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-3
FLOPS = 2 * 15  # two Adam steps a parameter
# (tensors, elements a tensor): one large, a ResNet-18-like number, a small CNN
SIZES = {"1 × 16M": (1, 16_000_000), "60 × 200k": (60, 200_000), "8 × 12k": (8, 12_000)}
TARGETS = {"fused AdamW (one step)": 1 / 1.35, "foreach composite": 3.0}
SETTINGS = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}


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


def setup(tensors, elements, quick, device):
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(elements, generator=g).to(device) for _ in range(tensors)]
    start = [torch.randn(elements, generator=g).to(device) for _ in range(tensors)]

    def copies():
        return [p.clone() for p in start]

    def zeros():
        return [torch.zeros_like(p) for p in start]

    def lists(bases):
        steps = [torch.zeros((), dtype=torch.int64, device=device) for _ in start]
        return copies(), grads, zeros(), zeros(), [], bases, steps

    def error():
        trial = lists(copies())
        also_step_(*trial, **SETTINGS)
        want = also_step(start[-1], grads[-1], AlsoState.start(start[-1]), **SETTINGS)
        return (trial[0][-1].double() - want).abs().max().item() / LR

    # float32 parameters around 1 leave 1e-7 / LR of a step
    lineup = Lineup("parameters, relative to one step's length, against float64", 1e-3)
    lineup.ours(partial(also_step_, *lists(copies()), **SETTINGS), error)
    without = partial(also_step_, *lists([]), **SETTINGS)
    lineup.variant("without half step", without)
    params = [torch.nn.Parameter(p) for p in copies()]
    for p, gradient in zip(params, grads, strict=True):
        p.grad = gradient
    fused = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)
    lineup.peer("fused AdamW (one step)", fused.step)
    five = copies(), grads, zeros(), zeros(), copies()
    lineup.peer("foreach composite", partial(composite, *five))
    compiled = None if tensors > 10 else compile_peer(composite, quick)
    if compiled is None:
        reason = NOT_COMPILED if quick else f"half a minute of compiling for {tensors} tensors"
        lineup.skip("torch.compile composite", reason)
    else:
        five = copies(), grads, zeros(), zeros(), copies()
        lineup.peer("torch.compile composite", partial(compiled, *five), compiled=True)
    lineup.at_least = TARGETS
    moved = torch.ones(36 * tensors * elements // 8, device=device)  # reads and writes 4 bytes each
    lineup.ceiling("update of the same bytes in place", partial(moved.mul_, 1.0))
    return lineup


def races(quick):
    sizes = {"2 × 500": (2, 500)} if quick else SIZES
    for case, (tensors, elements) in sizes.items():
        yield Race(
            "also_step",
            case,
            partial(setup, tensors, elements, quick),
            counts=Counts(36 * tensors * elements, FLOPS * tensors * elements),
            gpu_at_least=TARGETS,
        )
