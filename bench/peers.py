"""Third-party peers of the GPU benchmarks: optional, imported where asked for, skipped by name.

Written from the source of the versions named here. FlashLib alone has run on a GPU so far.

* Liger-Kernel (``liger-kernel`` 0.8.5): ``LigerCrossEntropyLoss``. Its forward pass overwrites
  logits that need a gradient with that gradient, so it gets logits of its own, and waits for the
  device (``.item()``). Losses have the dtype of the logits. With reduction "none" its backward pass
  multiplies the gradient once more; "mean" does not, and is what it is written for.
* QuACK (``quack-kernels`` 0.6.5): ``quack.cross_entropy.cross_entropy(x, target, reduction)``,
  losses float32; ``cross_entropy_fwd(x, target, return_dx=True)`` is one pass: read logits, write
  their gradient, without weights. Needs ``nvidia-cutlass-dsl`` 4.7 or newer.
* FlashLib (``flashlib`` 0.4.0): ``flash_knn(x, c, k)`` takes [Q, D] and [M, D] of one dtype, gives
  squared distances, float32, ascending, and int32 indices, the row itself among them. It selects
  by products of that dtype; for float32 these are Triton's, in TF32. A bfloat16 graph of 50,000
  rows or more with D <= 128 and k <= 20 is found by its CuTe DSL kernel on Hopper where
  ``nvidia-cutlass-dsl`` older than 4.7 is installed (so not together with QuACK), by Triton's else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.race import Lineup, first_line

LIGER, QUACK, FLASHLIB = "Liger-Kernel", "QuACK", "FlashLib"
LIGER_MEAN = "Liger-Kernel, mean (no weights)"
QUACK_ONE_PASS = "QuACK, one pass (no weights)"


def liger() -> Callable[..., Any]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss(reduction="none")


def liger_mean() -> Callable[..., Any]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(reduction="mean")
    return lambda logits, target: torch.autograd.grad(loss(logits, target), logits)


def quack() -> Callable[..., Any]:
    from quack.cross_entropy import cross_entropy

    return partial(cross_entropy, reduction="none")


def quack_one_pass() -> Callable[..., Any]:
    from quack.cross_entropy import cross_entropy_fwd

    return lambda logits, target: cross_entropy_fwd(logits.detach(), target, return_dx=True)


def flashlib() -> Callable[..., Any]:
    from flashlib import flash_knn

    return flash_knn


LOSSES = {LIGER: liger, QUACK: quack}
UNWEIGHTED = {LIGER_MEAN: liger_mean, QUACK_ONE_PASS: quack_one_pass}


def load(
    lineup: Lineup, name: str, make: Callable[[], Any], device: torch.device, quick: bool
) -> Any:
    """What ``make`` gives, or None, and then the peer is named as skipped.

    On a CPU only a quick run names them: in a table of the CPU nobody looks for a GPU's peers.
    """
    if device.type != "cuda":
        if quick:
            lineup.skip(name, "needs a CUDA device")
        return None
    try:
        return make()
    except Exception as error:  # also what an import runs into: a missing compiler, another torch
        lineup.skip(name, first_line(error))
        return None


def add_losses(
    lineup: Lineup,
    logits: torch.Tensor,
    call: Callable[..., Any],
    error: Callable[..., float],
    quick: bool,
    with_gradient: bool = True,
) -> None:
    """Liger-Kernel and QuACK as peers; ``call`` and ``error`` take a loss and the logits.

    Args:
        with_gradient: whether ``call`` takes one; without, logits need none, or Liger makes it.
    """
    for name, make in LOSSES.items():
        loss = load(lineup, name, make, logits.device, quick)
        if loss is not None:
            # After a call of Liger's its logits are gradients; later calls take as long on those.
            own = partial(call, loss, _copy(logits, with_gradient))
            lineup.peer(name, own, error=partial(_error, error, loss, logits))


def add_unweighted(lineup: Lineup, logits: torch.Tensor, target: torch.Tensor, quick: bool) -> None:
    """What the same libraries do fastest: less than is raced, a gradient without weights."""
    for name, make in UNWEIGHTED.items():
        gradient = load(lineup, name, make, logits.device, quick)
        if gradient is not None:
            lineup.peer(name, partial(gradient, _copy(logits, True), target))


def _copy(logits: torch.Tensor, with_gradient: bool) -> torch.Tensor:
    return logits.detach().clone().requires_grad_(with_gradient)


def _error(error: Callable[..., float], loss: Any, logits: torch.Tensor) -> float:
    return error(loss, _copy(logits, True))


def add_knn(
    lineup: Lineup,
    query: torch.Tensor,
    database: torch.Tensor,
    k: int,
    error: Callable[..., float] | None,
    quick: bool,
) -> None:
    """FlashLib as a peer; ``error`` takes a search of the same arguments."""
    search = load(lineup, FLASHLIB, flashlib, query.device, quick)
    if search is not None:
        own = None if error is None else partial(error, search)
        lineup.peer(FLASHLIB, partial(search, query, database, k), error=own)
