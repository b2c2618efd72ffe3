"""Work on rows that are spread over the processes of torch.distributed; see docs/scale.md."""

from als_ext.distributed.knn import knn
from als_ext.distributed.processes import all_rows

__all__ = ["all_rows", "knn"]
