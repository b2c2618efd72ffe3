"""The vote of all: what its neighbours would call each sample."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from als_ext.correction import CorrectionConfig, CorrectionResult
from als_ext.correction.correct import correct


def plurality(
    embeddings: Tensor, given: Tensor, current: Tensor, num_classes: int, config: CorrectionConfig
) -> CorrectionResult[Tensor]:
    """Ask the k neighbours of every sample, itself left out, for its label.

    Args:
        embeddings: float32 [n, D].
        given: int64 [n] on the same device, the labels that vote.
        current: int64 [n], the labels in use: ``changed`` is against these.
        num_classes: number of classes.
        config: k and its candidates, the metric.

    Returns:
        The correction that suspects everyone and trusts everyone: ``new_label`` is the plurality of
        the votes (the own label where nobody votes or a threshold of ``config`` is missed).
    """
    return correct(
        embeddings,
        given,
        current,
        None,
        num_classes,
        replace(config, voters="all"),
        suspect_mask=torch.ones_like(given, dtype=torch.bool),
    )
