"""Lightning: digits with 40 % wrong labels, weighted by ALSO and corrected between epochs."""

import logging

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from als_ext.data import IndexedDataset, apply_noise, load_dataset
from als_ext.integrations.lightning import AlsoMixin, BatchALSO, CorrectionCallback
from als_ext.models import MLP

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
torch.set_num_threads(1)  # steps this small only wait for a second thread
seed_everything(0, verbose=False)
data = load_dataset("digits")
noisy = apply_noise(data.y_train, "symmetric:0.4", num_classes=10, seed=0).labels
train_set = IndexedDataset(data.x_train, noisy)  # items (x, label, index)
test_set = TensorDataset(data.x_test, data.y_test)


class Digits(AlsoMixin, LightningModule):
    def __init__(self, samples):
        super().__init__()
        self.samples = samples
        self.net = MLP((1, 8, 8), 10)

    def forward(self, x):
        return self.net(x)

    def embed(self, x):  # what neighbours are searched in
        return self.net.embed(x)

    def training_step(self, batch, batch_idx):
        x, label, index = batch
        loss, _ = self.weighted_loss(self(x), label, index)
        return loss

    def validation_step(self, batch, batch_idx):
        x, label = batch
        self.log("accuracy", (self(x).argmax(1) == label).float().mean())

    def configure_optimizers(self):
        return BatchALSO(self.parameters(), n=self.samples)


correction = CorrectionCallback(train_set, num_classes=10, warmup=3, period=3)
trainer = Trainer(
    max_epochs=12,
    accelerator="cpu",
    callbacks=[correction],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(
    Digits(len(train_set)),
    DataLoader(train_set, batch_size=32, shuffle=True),
    DataLoader(test_set, batch_size=256),
)
accuracy = float(trainer.callback_metrics["accuracy"])
before = (noisy == data.y_train).float().mean()
after = (train_set.labels == data.y_train).float().mean()
print(f"labels right: {before:.3f} -> {after:.3f}, test accuracy {accuracy:.3f}")
assert after > before + 0.3
