"""Methods of the literature to compare with, each from its source's definition.

Importing this package registers them: ``TrainConfig(method="gce")``, ``als-ext run --method gce``.
"""

from als_ext.baselines.gce import GCE

__all__ = ["GCE"]
