"""Third-party peers of the GPU benchmarks: optional, imported where asked for, skipped by name.

Written from their documentation; none of them has been run yet.

* Liger-Kernel (``liger-kernel``): ``LigerCrossEntropyLoss(reduction="none")``. Its forward pass
  overwrites the logits with their gradient: it gets logits of its own.
* QuACK (``quack-kernels``): ``quack.cross_entropy.cross_entropy(x, target, reduction="none")``.
* FlashLib (``flashlib``): ``flash_knn(x, c, k)`` gives squared distances and indices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.race import Lineup, first_line

LIGER, QUACK, FLASHLIB = "Liger-Kernel", "QuACK", "FlashLib"


def liger() -> Callable[..., Any]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss(reduction="none")


def quack() -> Callable[..., Any]:
    from quack.cross_entropy import cross_entropy

    return partial(cross_entropy, reduction="none")


def flashlib() -> Callable[..., Any]:
    from flashlib import flash_knn

    return flash_knn


LOSSES = {LIGER: liger, QUACK: quack}


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
) -> None:
    """Liger-Kernel and QuACK as peers; ``call`` and ``error`` take a loss and the logits."""

    def copy() -> torch.Tensor:
        return logits.detach().clone().requires_grad_()

    for name, make in LOSSES.items():
        loss = load(lineup, name, make, logits.device, quick)
        if loss is not None:
            # After a call of Liger's its logits are gradients; later calls take as long on those.
            lineup.peer(name, partial(call, loss, copy()), error=partial(_error, error, loss, copy))


def _error(error: Callable[..., float], loss: Any, copy: Callable[[], torch.Tensor]) -> float:
    return error(loss, copy())


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
