"""knn_vote: the weighted plurality of the labels of each query's neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from als_ext.ops._checks import (
    batched_first,
    check_choice,
    check_float,
    check_int,
    check_tensor,
    values_readable,
)

WEIGHTINGS = ("uniform", "distance", "softmax")  # position = the operator's enum
CUDA_MAX_K = 4096


def knn_vote(
    distance: Tensor,
    index: Tensor,
    label: Tensor,
    num_classes: int,
    *,
    weighting: str = "uniform",
    temperature: float = 0.1,
    ignore_label: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Let the neighbours of each query vote for its label.

    .. math:: v_{qc} = \sum_{j:\,y_{i(q,j)} = c} w_{qj}, \qquad
              \text{winner}_q = \arg\max_c v_{qc}, \quad
              \text{share}_q = \frac{v_{q,\text{winner}}}{\sum_c v_{qc}}, \quad
              \text{margin}_q = \frac{v_{q,\text{winner}} - \max_{c \ne \text{winner}}
              v_{qc}}{\sum_c v_{qc}}

    with :math:`w = 1` (uniform), :math:`d_{\min}/d` (distance; hits at distance 0 take all of it)
    or :math:`e^{-(d - d_{\min})/T}` (softmax), where :math:`d_{\min}` is the smallest distance
    among the voters of the row. The plurality vote of Deep k-NN (Bahri, Jiang, Gupta, ICML 2020,
    arXiv 2004.12289) is ``uniform``.

    Args:
        distance: [Q, k] float32, as returned by :func:`knn`. A NaN distance has no vote.
        index: [Q, k] int64, positions in ``label``. An index outside it (-1, say) has no vote.
        label: [N] int64 in [0, num_classes), or ``ignore_label`` for a sample that must not vote.
        num_classes: number of classes, >= 1.
        weighting: "uniform", "distance" or "softmax".
        temperature: T of the softmax weighting, > 0, in the unit of ``distance``.
        ignore_label: the label without a vote, and the winner of a row without votes.

    Returns:
        winner [Q] int64 (ties go to the smaller class), share [Q] float32 in [0, 1], margin [Q]
        float32 in [0, 1]; a row without votes gives ``ignore_label``, 0, 0.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or devices that do not fit, a value out of range. A label outside [0,
            num_classes) is named on the CPU (as a RuntimeError out of ``torch.compile`` and
            ``torch.vmap``); on CUDA, where looking would wait for the device, it has no vote.

    Note:
        No gradient. Works in ``torch.compile`` with fullgraph and in CUDA graphs. Votes are summed
        in fixed point (2^-40), so the result is the same to the bit in any order and on any number
        of threads; CPU and CUDA can differ only where their ``exp`` does. k <= 4096 on CUDA. Memory
        beyond the outputs: none on CUDA; on the CPU 8 bytes x (num_classes + k) a thread, and 4
        bytes a label where the rows hold more neighbours than there are labels.

    Example:
        >>> import torch
        >>> from als_ext.ops import knn_vote
        >>> distance = torch.tensor([[0.1, 0.2, 0.3]])
        >>> index = torch.tensor([[4, 0, 2]])
        >>> winner, share, margin = knn_vote(distance, index, torch.tensor([1, 0, 1, 0, 2]), 3)
        >>> winner.item(), round(share.item(), 3), margin.item()
        (1, 0.667, 0.3333333432674408)
    """
    check_tensor("distance", distance, shape=("Q", "k"), dtypes=[torch.float32])
    check_tensor("index", index, shape=tuple(distance.shape), dtypes=[torch.int64], like=distance)
    if distance.shape[1] > CUDA_MAX_K and distance.device.type == "cuda":
        raise ValueError(
            f"distance: expected at most {CUDA_MAX_K} neighbours a row on CUDA, got "
            f"{distance.shape[1]}"
        )
    check_tensor("label", label, shape=("N",), dtypes=[torch.int64], like=distance)
    check_int("num_classes", num_classes, low=1)
    check_choice("weighting", weighting, WEIGHTINGS)
    check_float("temperature", temperature, low=0.0, open_low=True)
    check_int("ignore_label", ignore_label, low=-(2**63))
    winner: Tensor
    share: Tensor
    margin: Tensor
    try:
        winner, share, margin = torch.ops.als_ext.knn_vote.default(
            distance.detach() if distance.requires_grad else distance,
            index,
            label,
            num_classes,
            WEIGHTINGS.index(weighting),
            temperature,
            ignore_label,
        )
    except RuntimeError:
        _check_labels(label, num_classes, ignore_label)
        raise
    return winner, share, margin


def _check_labels(label: Tensor, num_classes: int, ignore_label: int) -> None:
    """Name the first class outside [0, num_classes), for what the operator has refused."""
    if not values_readable(label):
        return
    wrong = ((label < 0) | (label >= num_classes)) & (label != ignore_label)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"label: expected values in [0, {num_classes}) or ignore_label={ignore_label}, "
            f"got {int(label[at])} at position {at}"
        )


@torch.library.register_fake("als_ext::knn_vote")
def _fake(
    distance: Tensor,
    index: Tensor,
    label: Tensor,
    num_classes: int,
    weighting: int,
    temperature: float,
    ignore_label: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = distance.shape[0]
    share = distance.new_empty(rows)
    return index.new_empty(rows), share, torch.empty_like(share)


@torch.library.register_vmap("als_ext::knn_vote")
def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    distance: Tensor,
    index: Tensor,
    label: Tensor,
    *options: Any,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    batch = info.batch_size
    distance = batched_first(distance, in_dims[0], batch)
    index = batched_first(index, in_dims[1], batch)
    if in_dims[2] is not None:  # lay the label lists end to end, and shift the indices into them
        label = label.movedim(in_dims[2], 0)
        size = label.shape[1]
        start = size * torch.arange(batch, device=index.device)[:, None, None]
        index = torch.where((index >= 0) & (index < size), index + start, -1)
    votes = torch.ops.als_ext.knn_vote.default(
        distance.flatten(0, 1), index.flatten(0, 1), label.flatten(), *options
    )
    winner, share, margin = (t.view(distance.shape[:2]) for t in votes)
    return (winner, share, margin), (0, 0, 0)
