"""Small networks with an ``embed`` function: enough for digits, MNIST and feature vectors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

MODELS = ("auto", "cnn", "mlp")
_CNN_MIN_SIDE = 12  # two 3x3 convolutions with 2x2 pooling leave nothing of a smaller image


class _EmbeddingClassifier(nn.Module):
    """A feature extractor and a linear head; ``embed`` gives the features."""

    def __init__(self, features: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """The penultimate activations [B, width], from which neighbours are found."""
        embedding: Tensor = self.features(x)
        return embedding

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        logits: Tensor = self.head(self.embed(x))
        return logits


class SmallCNN(_EmbeddingClassifier):
    """Two convolutions (32 and 64 channels, 3x3, each with 2x2 pooling) and a layer of 128.

    Batch normalisation after each convolution, none after the layer: so a last batch of one sample
    can be trained on.

    Args:
        sample_shape: (C, H, W) of one image, H and W >= 12.
        num_classes: width of the output.

    Raises:
        ValueError: another shape.

    Note:
        Expects pixels standardised to about mean 0 and standard deviation 1; 225,130 parameters at
        (1, 28, 28) and 10 classes.

    Example:
        >>> import torch
        >>> model = SmallCNN((1, 28, 28), 10)
        >>> x = torch.zeros(2, 1, 28, 28)
        >>> model(x).shape, model.embed(x).shape
        (torch.Size([2, 10]), torch.Size([2, 128]))
    """

    def __init__(self, sample_shape: Sequence[int], num_classes: int) -> None:
        if len(sample_shape) != 3 or min(sample_shape[1:]) < _CNN_MIN_SIDE:
            raise ValueError(
                f"model: cnn expects images [C, H, W] with H and W >= {_CNN_MIN_SIDE}, "
                f"got samples of shape {list(sample_shape)}"
            )
        channels, *sides = sample_shape
        height, width = (((side - 2) // 2 - 2) // 2 for side in sides)
        features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, bias=False),  # normalisation takes a bias out again
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * height * width, 128),
            nn.ReLU(),
        )
        super().__init__(features, 128, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """The penultimate activations [B, 128], from which neighbours are found.

        On a CPU the images go through in channels-last order: PyTorch pools those with vector
        instructions and others one by one.
        """
        if x.device.type == "cpu":
            x = x.to(memory_format=torch.channels_last)  # contiguous() leaves one channel alone
        return super().embed(x)


class MLP(_EmbeddingClassifier):
    """Flattened samples through ReLU layers; the last of them is the embedding.

    Args:
        sample_shape: shape of one sample, flattened by the model.
        num_classes: width of the output.
        hidden: widths of the layers, at least one.

    Raises:
        ValueError: no hidden layer.

    Example:
        >>> import torch
        >>> MLP((1, 8, 8), 10).embed(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 128])
    """

    def __init__(
        self, sample_shape: Sequence[int], num_classes: int, hidden: Sequence[int] = (256, 128)
    ) -> None:
        if not hidden:
            raise ValueError("hidden: expected at least one layer width, got none")
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in zip((prod(sample_shape), *hidden), hidden, strict=False):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), hidden[-1], num_classes)


def build_model(name: str, sample_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Build one of the small networks by name.

    Args:
        name: "cnn", "mlp", or "auto": cnn for images of 12 x 12 and more, else mlp.
        sample_shape: shape of one sample, [C, H, W] or [D].
        num_classes: number of classes.

    Returns:
        A module with ``embed``; its weights are drawn from torch's global generator.

    Raises:
        ValueError: an unknown name, or a cnn for samples that are no images.

    Example:
        >>> type(build_model("auto", (1, 8, 8), 10)).__name__
        'MLP'
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    is_image = len(sample_shape) == 3 and min(sample_shape[1:]) >= _CNN_MIN_SIDE
    if name == "cnn" or (name == "auto" and is_image):
        return SmallCNN(sample_shape, num_classes)
    return MLP(sample_shape, num_classes)
