"""The operations: per-sample losses, exact nearest neighbours and votes, on CPU and CUDA."""

from als_ext.ops.knn import knn as knn
from als_ext.ops.knn_vote import knn_vote as knn_vote
from als_ext.ops.pi_step import pi_step_ as pi_step_
from als_ext.ops.sample_loss import sample_loss as sample_loss
from als_ext.ops.weighted_loss import weighted_loss as weighted_loss
