"""skorch: digits with 40 % wrong labels, weighted by ALSO and corrected between epochs."""

import torch
from skorch.dataset import ValidSplit

from als_ext.data import apply_noise, load_dataset
from als_ext.integrations.skorch import AlsNetClassifier, CorrectionCallback
from als_ext.models import MLP

torch.set_num_threads(1)  # steps this small only wait for a second thread
torch.manual_seed(0)
data = load_dataset("digits")
noisy = apply_noise(data.y_train, "symmetric:0.4", num_classes=10, seed=0).labels

net = AlsNetClassifier(
    MLP,  # has a function embed(x), what neighbours are searched in
    module__sample_shape=(1, 8, 8),
    module__num_classes=10,
    max_epochs=12,
    batch_size=32,
    iterator_train__shuffle=True,
    train_split=ValidSplit(0.1, stratified=True, random_state=0),
    callbacks=[CorrectionCallback(warmup=3, period=3)],
)
net.fit(data.x_train, noisy)

rows = net.train_rows_  # those that train_split did not hold back
truth = data.y_train.numpy()[rows]
before, after = ((labels[rows] == truth).mean() for labels in (noisy.numpy(), net.labels_))
accuracy = net.score(data.x_test, data.y_test.numpy())
print(f"labels right: {before:.3f} -> {after:.3f}, test accuracy {accuracy:.3f}")
assert after > before + 0.3
