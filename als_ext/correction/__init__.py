"""Find wrong labels by scores and neighbours, and replace them."""

from als_ext.correction.config import CorrectionConfig
from als_ext.correction.correct import correct_labels
from als_ext.correction.corrector import LabelCorrector
from als_ext.correction.decisions import Decisions, labels_digest, read_decisions
from als_ext.correction.history import RelabelHistory
from als_ext.correction.result import CorrectionResult

__all__ = [
    "CorrectionConfig",
    "CorrectionResult",
    "Decisions",
    "LabelCorrector",
    "RelabelHistory",
    "correct_labels",
    "labels_digest",
    "read_decisions",
]
