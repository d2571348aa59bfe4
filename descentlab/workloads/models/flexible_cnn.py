"""Convolutional networks with every part to choose; the default is CNN-395."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Data, ModelFactory
from .fit import images, large_enough
from .mlp import ACTIVATIONS

POOLS: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


@dataclass(frozen=True)
class Layer:
    """One convolution: ``kernel // 2`` zeros are padded on every side; ``pool`` = window and stride of the pooling
    after the activation, 1 = none."""

    channels: int
    kernel: int
    stride: int
    pool: int
    activation: str

    def size(self, n: int) -> int:
        """Pixels that are left of ``n``."""
        return ((n + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1) // self.pool


class FlexibleCNN(nn.Module):
    """``[B, C, H, W]`` -> ``[B, classes]``.

    Each layer: convolution (with a bias where there is no BatchNorm), BatchNorm, activation, pooling. Then a global
    average (``gap``) or flattening, and a head: linear layers of the widths ``head``, each with its activation and
    dropout, and a last linear layer.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        layers: Sequence[Layer],
        head: Sequence[tuple[int, str]],
        classes: int,
        *,
        batch_norm: bool = True,
        pooling: str = "max",
        gap: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, width = image
        features: list[nn.Module] = []
        for layer in layers:
            features.append(
                nn.Conv2d(channels, layer.channels, layer.kernel, layer.stride, layer.kernel // 2, bias=not batch_norm)
            )
            if batch_norm:
                features.append(nn.BatchNorm2d(layer.channels))
            features.append(ACTIVATIONS[layer.activation]())
            if layer.pool > 1:
                features.append(POOLS[pooling](layer.pool))
            channels, height, width = layer.channels, layer.size(height), layer.size(width)
        self.features = nn.Sequential(*features)
        self.gap = gap
        inputs = channels if gap else channels * height * width
        last: list[nn.Module] = []
        for size, activation in head:
            last += [nn.Linear(inputs, size), ACTIVATIONS[activation]()]
            if dropout:
                last.append(nn.Dropout(dropout))
            inputs = size
        self.head = nn.Sequential(*last, nn.Linear(inputs, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(x.mean((2, 3)) if self.gap else x.flatten(1))


def factory(
    layers: Sequence[Layer],
    head: Sequence[tuple[int, str]],
    *,
    downsample: int,
    batch_norm: bool,
    pooling: str,
    gap: bool,
    dropout: float,
) -> ModelFactory:
    """For images averaged over ``downsample`` x ``downsample`` pixels first (1 = as they are)."""

    def build(data: Data) -> nn.Module:
        channels, height, width = images("flexible_cnn", data)
        image = (channels, height // downsample, width // downsample)
        left = [image[1], image[2]]
        for layer in layers:
            left = [layer.size(n) if n > 0 else 0 for n in left]
        large_enough("flexible_cnn", data, *left)
        return FlexibleCNN(
            image, layers, head, data.classes, batch_norm=batch_norm, pooling=pooling, gap=gap, dropout=dropout
        )

    def stem(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, downsample) if x.dim() == 4 and min(x.shape[2:]) >= downsample else x

    return ModelFactory(build, stem if downsample > 1 else None)
