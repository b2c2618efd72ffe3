"""Embeddings and class names, some of them wrong, in tables of pandas, Arrow and datasets."""

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset
from sklearn.datasets import load_digits

from als_ext.data import apply_noise
from als_ext.integrations.tables import correct_table

names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
x, true = load_digits(return_X_y=True)
given = apply_noise(true, "symmetric:0.3", num_classes=10, seed=0).labels.numpy()
frame = pd.DataFrame({"embedding": list((x / 16).astype(np.float32)), "label": names[given]})

corrected = correct_table(frame, metric="l2")
right = (corrected.new_label == names[true]).mean()
print(f"labels right: {(given == true).mean():.3f} -> {right:.3f}")
print(corrected[corrected.changed].drop(columns="embedding").head())

arrow = correct_table(pa.Table.from_pandas(frame), metric="l2")
print(arrow.select(["label", "new_label", "share"]).slice(0, 3))

dataset = correct_table(Dataset.from_pandas(frame), metric="l2")
print(dataset)
assert right > 0.95
assert arrow["new_label"].to_pylist() == list(corrected.new_label) == dataset["new_label"][:]
