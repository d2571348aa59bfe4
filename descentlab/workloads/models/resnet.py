"""Residual networks (He et al. 2016) for small images, with two stems, with and without BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Data, ModelFactory
from .fit import images

Stem = Literal["3x3", "7x7"]
WIDTHS, STRIDES = (64, 128, 256, 512), (1, 2, 2, 2)


@dataclass(frozen=True)
class Style:
    """What all convolutions of a network have in common. ``bias``: always so without BatchNorm."""

    batch_norm: bool = True
    bias: bool = False
    dropout: float = 0.0

    def conv(self, a: int, b: int, kernel: int, stride: int = 1) -> nn.Sequential:
        """A convolution that keeps the size (up to the stride), and its BatchNorm."""
        conv = nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=self.bias or not self.batch_norm)
        return nn.Sequential(conv, nn.BatchNorm2d(b)) if self.batch_norm else nn.Sequential(conv)


class Block(nn.Module):
    """``[B, a, H, W]`` -> ``[B, width * expansion, H / stride, W / stride]``.

    Basic: two 3x3 convolutions. Bottleneck: 1x1, 3x3, 1x1 with four times the width. The shortcut is a 1x1 convolution
    where the shape changes. Dropout follows every activation.
    """

    def __init__(self, a: int, width: int, stride: int, bottleneck: bool, style: Style) -> None:
        super().__init__()
        b = 4 * width if bottleneck else width
        if bottleneck:
            convs = [style.conv(a, width, 1), style.conv(width, width, 3, stride), style.conv(width, b, 1)]
        else:
            convs = [style.conv(a, width, 3, stride), style.conv(width, b, 3)]
        self.convs = nn.ModuleList(convs)
        self.shortcut = style.conv(a, b, 1, stride) if stride != 1 or a != b else nn.Identity()
        self.drop = nn.ModuleList(nn.Dropout(style.dropout) if style.dropout else nn.Identity() for _ in convs)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, drop) in enumerate(zip(self.convs, self.drop, strict=True), start=1):
            y = conv(y)
            if i == len(self.convs):
                y = y + self.shortcut(x)
            y = drop(F.relu(y))
        return y


class ResNet(nn.Module):
    """``[B, C, H, W]`` -> ``[B, classes]``. Stem: 3x3 convolution, or 7x7 with stride 2; no max-pooling."""

    def __init__(
        self, inputs: int, classes: int, depths: tuple[int, ...], bottleneck: bool, stem: Stem, style: Style
    ) -> None:
        super().__init__()
        self.stem = style.conv(inputs, 64, 3) if stem == "3x3" else style.conv(inputs, 64, 7, 2)
        a, blocks = 64, []
        for width, depth, stride in zip(WIDTHS, depths, STRIDES, strict=True):
            for i in range(depth):
                blocks.append(Block(a, width, stride if i == 0 else 1, bottleneck, style))
                a = 4 * width if bottleneck else width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(a, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


DEPTHS: dict[str, tuple[tuple[int, ...], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


def factory(name: str, stem: Stem, style: Style) -> ModelFactory:
    """``name``: one of :data:`DEPTHS`."""
    depths, bottleneck = DEPTHS[name]

    def build(data: Data) -> nn.Module:
        return ResNet(images(name, data)[0], data.classes, depths, bottleneck, stem, style)

    return ModelFactory(build)
