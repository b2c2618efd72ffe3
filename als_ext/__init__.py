"""Adaptive loss scaling and embedding-based label correction for PyTorch."""

from als_ext import baselines, distributed, ops
from als_ext._library import __version__, build_info
from als_ext.als_lc import AlsLc
from als_ext.config import TrainConfig
from als_ext.contrast import pretrain
from als_ext.correction import (
    CorrectionConfig,
    CorrectionResult,
    LabelCorrector,
    correct_labels,
)
from als_ext.optim import ALSO
from als_ext.trainer import Trainer, TrainResult
from als_ext.weights import SampleWeights

__all__ = [
    "ALSO",
    "AlsLc",
    "CorrectionConfig",
    "CorrectionResult",
    "LabelCorrector",
    "SampleWeights",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "__version__",
    "baselines",
    "build_info",
    "correct_labels",
    "distributed",
    "ops",
    "pretrain",
]
