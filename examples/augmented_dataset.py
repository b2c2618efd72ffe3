"""The Trainer on a torch Dataset with random augmentation: shifted digits, 40 % wrong labels."""

import torch
from torch.utils.data import Dataset, TensorDataset

from als_ext import TrainConfig, Trainer
from als_ext.data import apply_noise, load_dataset
from als_ext.models import MLP


class Shifted(Dataset):
    """Each image moved by up to one pixel, anew each time."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, at):
        move = torch.randint(-1, 2, (2,)).tolist()
        return torch.roll(self.images[at], move, dims=(1, 2))


torch.manual_seed(0)
torch.set_num_threads(1)
data = load_dataset("digits")
labels = apply_noise(data.y_train, "symmetric:0.4", num_classes=10, seed=0).labels

config = TrainConfig(method="als-lc", epochs=8, batch_size=32, warmup=4, period=2)
trainer = Trainer(MLP((1, 8, 8), 10), config, num_classes=10)
result = trainer.fit(
    Shifted(data.x_train),
    labels,
    plain=TensorDataset(data.x_train),  # embeddings come from images that do not move
    test=TensorDataset(data.x_test, data.y_test),
    true_labels=data.y_train,
)
print(f"test accuracy {result.test_accuracy:.3f}, {result.label_metrics}")
assert result.label_metrics["label_accuracy_after"] > 0.9
