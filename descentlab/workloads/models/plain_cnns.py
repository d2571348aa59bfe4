"""LeNet5 and two plain convolutional networks of the usual MNIST and CIFAR tutorials, with ReLU and max-pooling."""

from __future__ import annotations

from torch import Tensor, nn

from ..base import Data, ModelFactory
from .fit import images, large_enough


class PlainCNN(nn.Module):
    """``[B, C, H, W]`` -> ``[B, classes]``: ``features``, flattened, then ``head``."""

    def __init__(self, features: list[nn.Module], head: list[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.head = nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def lenet5(channels: int, height: int, width: int, classes: int) -> PlainCNN:
    """Convolutions 6 @ 5x5 (padded by 2) and 16 @ 5x5, each pooled by 2; 120, 84, classes."""
    features = [nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    inputs = 16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
    head = [nn.Linear(inputs, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)]
    return PlainCNN(features, head)


def cnn1(channels: int, height: int, width: int, classes: int, dropout: tuple[float, float]) -> PlainCNN:
    """Convolutions 32 and 64 @ 3x3, pooled by 2 once, dropout, 128, dropout, classes."""
    features = [nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
    inputs = 64 * ((height - 4) // 2) * ((width - 4) // 2)
    return PlainCNN(features, _head(inputs, 128, classes, dropout))


def cnn2(channels: int, height: int, width: int, classes: int, dropout: tuple[float, float]) -> PlainCNN:
    """Convolutions 32 and 64 @ 3x3 (padded by 1), each pooled by 2, dropout, 512, dropout, classes."""
    features = [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return PlainCNN(features, _head(64 * (height // 4) * (width // 4), 512, classes, dropout))


def _head(inputs: int, hidden: int, classes: int, dropout: tuple[float, float]) -> list[nn.Module]:
    drop = [[nn.Dropout(p)] if p else [] for p in dropout]
    return [*drop[0], nn.Linear(inputs, hidden), nn.ReLU(), *drop[1], nn.Linear(hidden, classes)]


def factory(name: str, dropout: tuple[float, float] = (0.0, 0.0)) -> ModelFactory:
    """``name``: lenet5 (which has no dropout), cnn1 or cnn2."""

    def build(data: Data) -> nn.Module:
        channels, height, width = images(name, data)
        left = {"lenet5": lambda n: (n // 2 - 4) // 2, "cnn1": lambda n: (n - 4) // 2, "cnn2": lambda n: n // 4}[name]
        large_enough(name, data, left(height), left(width))
        if name == "lenet5":
            return lenet5(channels, height, width, data.classes)
        return (cnn1 if name == "cnn1" else cnn2)(channels, height, width, data.classes, dropout)

    return ModelFactory(build)
