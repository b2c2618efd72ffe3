"""Which labels a LabelCorrector changed, and when."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from als_ext.correction._pandas import pandas_for

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RelabelHistory:
    """Every change of a label, in order; all tensors [m], on the host.

    Attributes:
        step: int64, the step that made the change, or that was undone by it; from 0. Of a decision
            and of samples given their original labels, the last step before; -1 if there was none.
        epoch: int64, the epoch given with that step; -1 for an undo or a decision.
        sample: int64, position of the sample.
        old: int64, label before.
        new: int64, label after.
        share: float32, the winner's share of the votes; NaN where epoch is -1.
        margin: float32, its lead; NaN where epoch is -1.
    """

    step: Tensor
    epoch: Tensor
    sample: Tensor
    old: Tensor
    new: Tensor
    share: Tensor
    margin: Tensor

    def __len__(self) -> int:
        return int(self.sample.shape[0])

    def __repr__(self) -> str:
        return f"RelabelHistory({len(self)} changes of {len(set(self.sample.tolist()))} samples)"

    def to_pandas(self) -> pd.DataFrame:
        """One row a change.

        Raises:
            ImportError: pandas is not installed.
        """
        pd = pandas_for("RelabelHistory.to_pandas")
        return pd.DataFrame({f.name: getattr(self, f.name).numpy() for f in fields(self)})


def empty_history() -> RelabelHistory:
    """No change yet."""
    number, real = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float32)
    return RelabelHistory(
        step=number, epoch=number, sample=number, old=number, new=number, share=real, margin=real
    )
