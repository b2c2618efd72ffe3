"""ALSO for trainers that call ``optimizer.step()`` by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from als_ext import ALSO
from als_ext.ops import weighted_loss


class BatchALSO(ALSO):
    r"""ALSO that learns of a batch when its loss is made, so that ``step()`` needs no argument.

    :meth:`weighted_loss` computes the loss and remembers index and losses; the next ``step()``
    takes what was remembered since the last one. Several batches before a step (gradient
    accumulation) are one step of π over all of them.

    Args:
        *arguments: as of :class:`als_ext.ALSO`.
        **settings: as of :class:`als_ext.ALSO`.

    Raises:
        TypeError: as ALSO; a step without a batch.
        ValueError: as ALSO.

    Note:
        ``step(closure)`` calls the closure, which may return anything, and returns None. A loss
        under ``torch.no_grad`` is not remembered. Remembered batches are not in the state_dict:
        save after a step.

    Example:
        >>> import torch
        >>> from als_ext.integrations.also import BatchALSO
        >>> x, y = torch.randn(100, 5), torch.randint(0, 3, (100,))
        >>> model = torch.nn.Linear(5, 3)
        >>> optimizer = BatchALSO(model.parameters(), n=100)
        >>> for index in torch.randperm(100).split(25):
        ...     loss, losses = optimizer.weighted_loss(model(x[index]), y[index], index)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._listen()

    def _listen(self) -> None:
        self._batches: list[tuple[Tensor, Tensor]] = []
        # A hook, not a step() of its own: torch runs the hooks of an optimizer around the step() of
        # each class, so those of a user would run twice.
        self.register_step_pre_hook(_give_batches)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_batches" not in vars(self):  # load_state_dict comes here too; a copy has no hooks yet
            self._listen()

    def weighted_loss(
        self, logits: Tensor, label: Tensor, index: Tensor, **loss: Any
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch under the weights of its samples; remembers the batch.

        Args:
            logits: [B, C] floating.
            label: [B] int64 in [0, C).
            index: [B] int64 in [0, n), the positions of the samples in the training set.
            **loss: further arguments of :func:`als_ext.ops.weighted_loss`.

        Returns:
            The weighted sum of the losses, to call ``backward`` on, and the losses [B], detached.

        Raises:
            TypeError: an argument of another type or dtype.
            ValueError: shapes that do not fit; on the CPU an index outside [0, n).
        """
        if not isinstance(index, Tensor) or not isinstance(label, Tensor):
            missing = "label" if isinstance(index, Tensor) else "index"
            got = type(label if missing == "label" else index).__name__
            raise TypeError(f"{missing}: expected a tensor int64 [B], got {got}")
        if index.shape != logits.shape[:1]:
            raise ValueError(
                f"index: expected one number a row of logits, [{logits.shape[0]}], "
                f"got {list(index.shape)}"
            )
        total, losses = weighted_loss(logits, label, self.loss_weight(index), **loss)
        if torch.is_grad_enabled():
            self._batches.append((index, losses))
        return total, losses

    def forget(self) -> None:
        """Drop what was remembered since the last step, which was broken off."""
        self._batches.clear()


def _give_batches(
    optimizer: Any, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``step``: index and losses of the batches since the last one."""
    closure = named.get("closure", next(iter(arguments[1:]), None))  # arguments[0] is the optimizer
    if closure is not None:
        with torch.enable_grad():
            closure()
    batches, optimizer._batches = optimizer._batches, []
    if not batches:
        raise TypeError(
            "BatchALSO.step: expected a batch since the last step, got none: compute the loss "
            "with optimizer.weighted_loss(logits, label, index)"
        )
    index, losses = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return arguments[:1], {"index": index, "losses": losses}
