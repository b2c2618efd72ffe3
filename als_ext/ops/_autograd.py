"""Calls of an operator at the price of a plain torch.autograd.Function.

``torch.library.register_autograd`` is what torch.compile, vmap and callers of ``torch.ops`` see.
The Python that it puts around a call takes longer than the losses of a small batch; the same
formulas in a Function of their own take a third of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx


def runs_eagerly() -> bool:
    """Whether only the autograd engine looks on: no torch.compile, vmap or torch.func."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


class DirectCall:
    """An operator with the formulas of its ``register_autograd``.

    The formulas find ``ctx.direct`` set: whoever called has seen only those outputs that the public
    function returns.
    """

    def __init__(
        self,
        operator: Callable[..., Any],
        setup_context: Callable[[Any, tuple[Any, ...], Any], None],
        backward: Callable[..., Any],
    ) -> None:
        self.operator = operator

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: FunctionCtx, *arguments: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    output = operator(*arguments)
                ctx.direct = True  # type: ignore[attr-defined]
                setup_context(ctx, arguments, output)
                return output

        Direct.backward = staticmethod(backward)  # type: ignore[method-assign]
        self.apply: Callable[..., Any] = Direct.apply

    def __call__(self, *arguments: Any, differentiable: bool) -> Any:
        """Call the operator; ``differentiable``: an argument requires a gradient."""
        if forward_ad._current_level >= 0:
            _check_no_tangent(arguments)
        if not runs_eagerly():
            return self.operator(*arguments)
        if differentiable and torch.is_grad_enabled():
            return self.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.operator(*arguments)


def _check_no_tangent(arguments: tuple[Any, ...]) -> None:
    """The operators have no forward-mode formula, and would drop a tangent without a word."""
    unpack: Any = forward_ad.unpack_dual
    for value in arguments:
        if isinstance(value, Tensor) and unpack(value).tangent is not None:
            raise RuntimeError(
                "als_ext: expected arguments without a tangent: the losses have no forward-mode "
                "derivative (torch.autograd.forward_ad)"
            )
