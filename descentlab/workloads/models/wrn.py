"""Wide residual networks (Zagoruyko and Komodakis 2016) for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import UserError
from ..base import Data, ModelFactory
from .fit import images


class Block(nn.Module):
    """BatchNorm and ReLU come before each of the two 3x3 convolutions, dropout between them. Where the shape changes,
    the shortcut is a 1x1 convolution of what the first ReLU gives."""

    def __init__(self, a: int, b: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(a), nn.BatchNorm2d(b)])
        self.first = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.shortcut = nn.Conv2d(a, b, 1, stride, bias=False) if a != b or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](x))
        kept = x if self.shortcut is None else self.shortcut(y)
        return kept + self.second(self.drop(F.relu(self.norms[1](self.first(y)))))


class WideResNet(nn.Module):
    """``[B, C, H, W]`` -> ``[B, classes]``: three stages of (depth - 4) / 6 blocks, 16, 32, 64 times ``widen`` wide."""

    def __init__(self, inputs: int, classes: int, depth: int, widen: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(inputs, 16, 3, padding=1, bias=False)
        a, blocks = 16, []
        for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for i in range((depth - 4) // 6):
                blocks.append(Block(a, width, 2 if stage and i == 0 else 1, dropout))
                a = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(a)
        self.head = nn.Linear(a, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


def factory(depth: int, widen: int, dropout: float) -> ModelFactory:
    """``depth`` = 6 n + 4."""
    if depth < 10 or depth % 6 != 4:
        raise UserError("model.depth", depth, "6 n + 4: 10, 16, 22, 28, 40 …")

    def build(data: Data) -> nn.Module:
        return WideResNet(images("wrn", data)[0], data.classes, depth, widen, dropout)

    return ModelFactory(build)
