"""ALSO and LabelCorrector in a loop of your own, on digits with 40 % wrong labels.

Lines 1 to 3 weight the samples. Line 4 says which samples a batch holds. Line 5 puts theta into the
model to evaluate it; optimizer.train() would go back. The block with `corrector` corrects labels.
"""

import torch
from torch.utils.data import DataLoader

import als_ext
from als_ext.data import IndexedDataset, apply_noise, load_dataset

EPOCHS, WARMUP, PERIOD, BATCH = 12, 3, 3, 32

torch.manual_seed(0)
torch.set_num_threads(1)  # steps this small only wait for a second thread
data = load_dataset("digits")
x, x_test = data.x_train.flatten(1), data.x_test.flatten(1)
labels = apply_noise(data.y_train, "symmetric:0.4", num_classes=10, seed=0).labels

body = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
body.append(torch.nn.ReLU())
model = torch.nn.Sequential(body, torch.nn.Linear(128, 10))

train_set = IndexedDataset(x, labels)  # 4: items (x, label, index)
loader = DataLoader(train_set, BATCH, shuffle=True)
optimizer = als_ext.ALSO(model.parameters(), n=len(train_set), weight_decay=0.0)  # 1
corrector = als_ext.LabelCorrector(labels, num_classes=10)

for epoch in range(EPOCHS):
    if epoch >= WARMUP and (epoch - WARMUP) % PERIOD == 0:
        optimizer.eval()  # theta itself, not the half point that it trains at
        with torch.no_grad():
            result = corrector.step(body(x), scores=optimizer.weights.scores(), epoch=epoch)
        optimizer.train()
        train_set.set_labels(result.new_label)
        optimizer.weights.reset_(result.changed.nonzero()[:, 0])  # their past is the old label's
    for inputs, targets, index in loader:
        loss, losses = als_ext.ops.weighted_loss(  # 2
            model(inputs), targets, optimizer.loss_weight(index)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(index=index, losses=losses)  # 3

optimizer.eval()  # 5
with torch.no_grad():
    accuracy = (model(x_test).argmax(1) == data.y_test).double().mean()
before = (corrector.original == data.y_train).double().mean()
after = (corrector.labels == data.y_train).double().mean()
print(f"labels right: {before:.3f} -> {after:.3f}, test accuracy {accuracy:.3f}")
assert after > before + 0.3
