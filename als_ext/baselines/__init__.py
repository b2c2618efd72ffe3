"""Methods of the literature to compare with, each from its source's definition.

Importing this package registers them: ``TrainConfig(method="gce")``, ``als-ext run --method gce``.
"""

from als_ext.baselines.also_min import AlsoMin
from als_ext.baselines.co_teaching import CoTeaching
from als_ext.baselines.confident_learning import ConfidentLearning
from als_ext.baselines.deep_knn import DeepKnn
from als_ext.baselines.elr import ELR
from als_ext.baselines.erm_early_stop import EarlyStop
from als_ext.baselines.gce import GCE
from als_ext.baselines.knn_floor import KnnFloor
from als_ext.baselines.knn_relabel import KnnRelabel
from als_ext.baselines.l2rw import L2RW
from als_ext.baselines.mentornet import MentorNetDD, MentorNetPD
from als_ext.baselines.random_relabel import RandomRelabel

__all__ = [
    "ELR",
    "GCE",
    "L2RW",
    "AlsoMin",
    "CoTeaching",
    "ConfidentLearning",
    "DeepKnn",
    "EarlyStop",
    "KnnFloor",
    "KnnRelabel",
    "MentorNetDD",
    "MentorNetPD",
    "RandomRelabel",
]
