"""Methods of the literature to compare with, each from its source's definition.

Importing this package registers them: ``TrainConfig(method="gce")``, ``als-ext run --method gce``.
"""

from als_ext.baselines.co_teaching import CoTeaching
from als_ext.baselines.elr import ELR
from als_ext.baselines.gce import GCE
from als_ext.baselines.l2rw import L2RW
from als_ext.baselines.mentornet import MentorNetDD, MentorNetPD

__all__ = ["ELR", "GCE", "L2RW", "CoTeaching", "MentorNetDD", "MentorNetPD"]
