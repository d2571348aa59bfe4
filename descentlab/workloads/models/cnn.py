"""A small convolutional network with BatchNorm: the cheapest model in which running variances can be polluted."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Data, ModelFactory
from .fit import images


class SmallCNN(nn.Module):
    """Three 3x3 convolutions (stride 2, 2, 2), each with BatchNorm and ReLU; global average pooling; linear head.

    ``[B, C, H, W]`` -> ``[B, classes]``. With channels (8, 16, 16), one input channel and 10 classes: 3,778 parameters.
    """

    def __init__(self, inputs: int, channels: tuple[int, ...], classes: int, batch_norm: bool = True) -> None:
        super().__init__()
        for i, (a, b) in enumerate(zip((inputs, *channels[:-1]), channels, strict=True), start=1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, 3, stride=2, padding=1, bias=not batch_norm))
            self.add_module(f"norm{i}", nn.BatchNorm2d(b) if batch_norm else nn.Identity())
        self.depth = len(channels)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.depth + 1):
            x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)).relu()
        return self.head(x.mean((2, 3)))


def factory(channels: tuple[int, ...], batch_norm: bool, pool: int) -> ModelFactory:
    """For images ``[n, C, H, W]``, averaged over ``pool`` x ``pool`` pixels first (1 = as they are)."""

    def build(data: Data) -> nn.Module:
        return SmallCNN(images("cnn", data)[0], channels, data.classes, batch_norm)

    return ModelFactory(build, (lambda x: F.avg_pool2d(x, pool) if x.dim() == 4 else x) if pool > 1 else None)
