"""What a user writes against the installed package: .ci/run runs it, and mypy --strict checks it.

assert_type is for mypy: a public name without a type would be Any.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import assert_type

import als_ext
from als_ext import ALSO, CorrectionResult, SampleWeights, TrainConfig, Trainer, TrainResult, ops

assert "site-packages" in Path(als_ext.__file__).parts, f"not the installed one: {als_ext.__file__}"

# Three blobs, 30 % of the labels wrong.
torch.manual_seed(0)
truth = torch.arange(900) % 3
x = torch.randn(900, 8)
x[:, :3] += 5 * torch.nn.functional.one_hot(truth, 3)
labels = torch.where(torch.rand(900) < 0.3, (truth + 1) % 3, truth)

corrected = als_ext.correct_labels(x, labels)
assert_type(corrected, CorrectionResult[Tensor])
assert_type(corrected.new_label, Tensor)
assert (corrected.new_label == truth).double().mean() > 0.99

rows: NDArray[np.float32] = x.numpy()
again = als_ext.correct_labels(rows, labels.numpy())
assert_type(again, CorrectionResult[NDArray[np.generic]])
assert np.array_equal(again.new_label, corrected.new_label.numpy())

distance, neighbours = ops.knn(x, x, k=5, exclude_self=True)
winner, share, margin = ops.knn_vote(distance, neighbours, labels, num_classes=3)
assert_type(
    (distance, neighbours, winner, share, margin), tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
)
assert (winner == truth).double().mean() > 0.8

model = torch.nn.Linear(8, 3)
optimizer = ALSO(model.parameters(), n=len(x), lr=0.01)
loss, losses = ops.weighted_loss(model(x), labels, optimizer.loss_weight(torch.arange(900)))
assert_type((loss, losses), tuple[Tensor, Tensor])
loss.backward()  # type: ignore[no-untyped-call]
optimizer.step(index=torch.arange(900), losses=losses)
assert_type(ops.sample_loss(model(x), labels, loss="gce", q=0.7), Tensor)

weights = SampleWeights(len(x), lr=0.1)
weights.update_(torch.arange(900), losses.detach())
assert_type(weights.pi(), Tensor)
assert torch.isclose(weights.pi().sum(), torch.tensor(1.0), atol=1e-5)

trainer = Trainer(model, TrainConfig(method="erm", epochs=1), num_classes=3, progress=False)
result = trainer.fit(x, labels, test=(x, truth))
assert_type(result, TrainResult)
assert_type(result.test_accuracy, float | None)
info = als_ext.build_info()
print(
    f"als_ext {als_ext.__version__} on torch {info['torch']}, built with {info['built_with_torch']}"
)
