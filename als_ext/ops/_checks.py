"""Argument checks of the operations: errors name the argument, the expected and the given."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from als_ext._library import require_device


def check_tensor(
    name: str,
    value: object,
    *,
    shape: tuple[int | str, ...],
    dtypes: Collection[torch.dtype],
    like: Tensor | None = None,
) -> None:
    """Check type, shape (a str names a free size), dtype and device (that of ``like``)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape)
    if fits:
        for want, got in zip(shape, value.shape, strict=True):
            if not isinstance(want, str) and want != got:
                fits = False
    if not fits:  # the text is made here alone: torch.compile cannot turn a dynamic size into one
        expected = "[" + ", ".join(map(str, shape)) + "]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        wrong = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {names}, got {wrong}")
    if like is None:
        if not value.is_cpu:
            require_device(value, name)
    elif value.device != like.device:
        raise ValueError(f"{name}: expected device '{like.device}', got '{value.device}'")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Check that a string is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_type(name: str, value: object, *kinds: type) -> None:
    """Check that a value is of one of the types."""
    if not isinstance(value, kinds):
        names = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{name}: expected {names}, got {type(value).__name__}")


def check_int(name: str, value: object, *, low: int, high: int | None = None) -> None:
    """Check an integer and its range (bounds included)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected {bounds}, got {value}")


def check_float(
    name: str, value: object, *, low: float, high: float = float("inf"), open_low: bool = False
) -> None:
    """Check a finite number and its range; ``open_low`` excludes the lower bound."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    inside = (value > low if open_low else value >= low) and value <= high and value != float("inf")
    if not inside:  # NaN compares false and ends here as well
        left = "(" if open_low else "["
        raise ValueError(
            f"{name}: expected a finite number in {left}{low:g}, {high:g}], got {value}"
        )


def values_readable(value: Tensor) -> bool:
    """Whether looking at values costs no wait for a device, and there are values to look at."""
    return value.is_cpu and has_values(value)


def has_values(value: Tensor) -> bool:
    """Whether the tensor is neither a tracer's nor that of a level of vmap or grad."""
    return (
        not torch.compiler.is_compiling()
        and type(value) is Tensor  # no FakeTensor or other subclass
        and torch._C._has_storage(value)  # no level of vmap or grad
    )


def batched_first(value: Tensor, dim: int | None, batch: int) -> Tensor:
    """Return the value with vmap's dimension in front, expanded where it has none."""
    return value.expand(batch, *value.shape) if dim is None else value.movedim(dim, 0)
