"""VGG networks (Simonyan and Zisserman 2015) for small images: one linear layer behind the convolutions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Data, ModelFactory
from .fit import images

WIDTHS = (64, 128, 256, 512, 512)  # of the five stages, each with a 2x2 max-pooling at its end
DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


class Vgg(nn.Module):
    """``[B, C, H, W]`` -> ``[B, classes]``: 3x3 convolutions with biases; pooled as long as there is more than a pixel,
    then averaged over what is left (one pixel for 32 x 32)."""

    def __init__(self, inputs: int, classes: int, depths: tuple[int, ...], batch_norm: bool, dropout: float) -> None:
        super().__init__()
        stages, a = [], inputs
        for width, depth in zip(WIDTHS, depths, strict=True):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [
                    nn.Conv2d(a, width, 3, padding=1),
                    *([nn.BatchNorm2d(width)] if batch_norm else []),
                    nn.ReLU(),
                ]
                a = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(a, classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
            if min(x.shape[-2:]) > 1:
                x = F.max_pool2d(x, 2)
        return self.head(self.drop(x.mean((2, 3))))


def factory(name: str, batch_norm: bool, dropout: float) -> ModelFactory:
    """``name``: one of :data:`DEPTHS`."""

    def build(data: Data) -> nn.Module:
        return Vgg(images(name, data)[0], data.classes, DEPTHS[name], batch_norm, dropout)

    return ModelFactory(build)
