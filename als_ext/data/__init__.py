"""Data sets, synthetic label noise, label files, and batches that carry the sample index."""

from als_ext.data.datasets import ArrayDataset, load_dataset
from als_ext.data.idx import read_idx
from als_ext.data.indexed import IndexedDataset, TensorBatches
from als_ext.data.labels import as_labels, as_positions, read_labels, write_labels
from als_ext.data.noise import ASYMMETRIC_MAPS, NoiseSpec, NoisyLabels, apply_noise, parse_noise

__all__ = [
    "ASYMMETRIC_MAPS",
    "ArrayDataset",
    "IndexedDataset",
    "NoiseSpec",
    "NoisyLabels",
    "TensorBatches",
    "apply_noise",
    "as_labels",
    "as_positions",
    "load_dataset",
    "parse_noise",
    "read_idx",
    "read_labels",
    "write_labels",
]
