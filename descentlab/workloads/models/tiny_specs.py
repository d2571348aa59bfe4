"""Settings of VGG and wide residual networks for small images."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from ...core.specs import Option


class _Vgg(Option):
    batch_norm: bool = True
    dropout: float = Field(0.0, ge=0, lt=1, description="before the linear layer")

    def build(self) -> Any:
        from .vgg import factory

        return factory(self.name, self.batch_norm, self.dropout)


class Vgg11(_Vgg):
    """VGG with 8 convolutions for small images; 9,231,114 parameters on cifar10."""

    name: Literal["vgg11"] = "vgg11"


class Vgg13(_Vgg):
    """VGG with 10 convolutions for small images; 9,416,010 parameters on cifar10."""

    name: Literal["vgg13"] = "vgg13"


class Vgg16(_Vgg):
    """VGG with 13 convolutions for small images; 14,728,266 parameters on cifar10."""

    name: Literal["vgg16"] = "vgg16"


class Vgg19(_Vgg):
    """VGG with 16 convolutions for small images; 20,040,522 parameters on cifar10."""

    name: Literal["vgg19"] = "vgg19"


class WideResNet(Option):
    """Wide residual network, WRN-depth-widen, for small images; 2,748,890 parameters on cifar10."""

    name: Literal["wrn"] = "wrn"
    depth: PositiveInt = Field(16, description="6 n + 4")
    widen: PositiveInt = Field(4, description="times 16, 32 and 64 channels")
    dropout: float = Field(0.0, ge=0, lt=1, description="between the two convolutions of a block")

    def build(self) -> Any:
        from .wrn import factory

        return factory(self.depth, self.widen, self.dropout)
