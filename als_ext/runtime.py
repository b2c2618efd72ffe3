"""Device, seeds, determinism and mixed precision of one training run."""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

AMP_MODES = ("off", "bf16", "f16")


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where torch sees one, else the CPU.

    Raises:
        ValueError: a name that is no device, or CUDA that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in {"cpu", "cuda"}:
        raise ValueError(f"device: expected auto, cpu or cuda[:N], got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected a device that is present, got {name!r} without CUDA")
    return device


def half_cosine(lr: float, step: int, steps: int) -> float:
    """``lr`` at step 0, falling to 0 at step ``steps``."""
    return lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose alone.

    Two draws of n samples from one seed can be the same draw: with the run's own seed a validation
    set would hold exactly the samples whose labels were made wrong.

    Example:
        >>> derived_seed(0, "folds") != derived_seed(0, "validation")
        True
    """
    mixed = np.random.SeedSequence((seed, *purpose.encode())).generate_state(1, np.uint64)
    return int(mixed[0])


def rng_state(device: torch.device) -> dict[str, Any]:
    """All global generators (torch, CUDA, numpy, python) in types that ``weights_only`` loads."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - data sets may still use it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what :func:`rng_state` returned (CUDA's only where both runs have it)."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from torch's CPU generator with a seed of its own; put the generator back after.

    ``torch.manual_seed`` would seed CUDA's generators too, and ``fork_rng`` leaves them so unless
    it is told each device.

    Example:
        >>> with seeded(0):
        ...     first = torch.rand(1)
        >>> bool(first == torch.rand(1, generator=torch.Generator().manual_seed(0)))
        True
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@contextlib.contextmanager
def reproducible(seed: int, device: torch.device, deterministic: bool = True) -> Iterator[None]:
    """Seed every generator, ask torch for deterministic algorithms; put all of it back after.

    On CUDA this sets CUBLAS_WORKSPACE_CONFIG where it is unset, which cuBLAS needs for results
    that repeat; it has to happen before the first matrix product of the process.
    """
    before = rng_state(device)
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    try:
        if deterministic:
            if device.type == "cuda":
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
            memory.fill_uninitialized_memory = False  # costs a pass over each buffer
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield
    finally:
        set_rng_state(before, device)
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        memory.fill_uninitialized_memory = fill


class Amp:
    """Automatic mixed precision: bfloat16 autocast, or float16 with a gradient scaler.

    Args:
        mode: "off", "bf16" or "f16".
        device: where the model is.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        self._device = device.type
        self._dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(mode)
        self._scaler = torch.amp.GradScaler(device.type) if mode == "f16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)

    def backward_and_step(self, loss: Tensor, optimizer: Optimizer, **arguments: Any) -> None:
        """Backward, then ``optimizer.step(**arguments)``; no host synchronisation with "off"."""
        if self._scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step(**arguments)
            return
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(optimizer, **arguments)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; empty without one."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scaler."""
        if self._scaler is not None:
            self._scaler.load_state_dict(state)
