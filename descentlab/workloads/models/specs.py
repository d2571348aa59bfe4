"""Settings of models. The first line of a class states its parameter count, for ``descentlab list``."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from ...core.errors import UserError
from ...core.specs import External, Option, Registry
from .tiny_specs import Vgg11, Vgg13, Vgg16, Vgg19, WideResNet
from .vision_specs import Clip, DenseNet121, EfficientNetB0, NfResNet26, Timm

Activation = Literal["silu", "relu", "tanh", "gelu"]


def _each(key: str, values: list[Any], n: int) -> list[Any]:
    """``n`` values from one for all, or from one for each."""
    if len(values) == 1:
        return values * n
    if len(values) != n:
        raise UserError(f"model.{key}", values, f"one value, or one for each of the {n} layers")
    return values


class Linear(Option):
    """One linear map of the flattened input (softmax or linear regression); 7,850 parameters on mnist."""

    name: Literal["linear"] = "linear"
    bias: bool = True

    def build(self) -> Any:
        from .mlp import factory

        return factory(self.name, (), bias=self.bias)


class Mlp(Option):
    """Fully connected network; MLP-386 = pool to 6x6, one hidden layer of 8 SiLU units: 386 parameters on mnist."""

    name: Literal["mlp"] = "mlp"
    hidden: list[PositiveInt] = Field([8], description="widths of the hidden layers")
    activation: Activation = "silu"
    activations: list[Activation] = Field([], description="one for each hidden layer; empty = activation for all")
    pool: int = Field(6, ge=0, description="adaptive average pooling of images to pool x pool first; 0 = none")
    batch_norm: bool = Field(False, description="BatchNorm before every activation")
    dropout: float = Field(0.0, ge=0, lt=1, description="after every activation")

    def build(self) -> Any:
        from .mlp import factory

        names = _each("activations", list(self.activations or [self.activation]), len(self.hidden))
        return factory(self.name, tuple(self.hidden), names, self.pool, self.dropout, self.batch_norm)


class SmallCnn(Option):
    """Three 3x3 convolutions with BatchNorm and ReLU, global average, linear head; 3,778 parameters on mnist."""

    name: Literal["cnn"] = "cnn"
    channels: list[PositiveInt] = Field([8, 16, 16], min_length=3, max_length=3)
    batch_norm: bool = True
    pool: PositiveInt = Field(2, description="images are averaged over pool x pool pixels first; 1 = as they are")

    def build(self) -> Any:
        from .cnn import factory

        return factory(tuple(self.channels), self.batch_norm, self.pool)


class FlexibleCnn(Option):
    """Convolutional network with every part to choose; by default CNN-395: 395 parameters on mnist."""

    name: Literal["flexible_cnn"] = "flexible_cnn"
    channels: list[PositiveInt] = Field([12], min_length=1, description="channels of each convolution")
    kernels: list[PositiveInt] = Field([3], description="one for all or one for each; kernel // 2 zeros are padded")
    strides: list[PositiveInt] = Field([1], description="one for all or one for each")
    pools: list[PositiveInt] = Field([1], description="pooling after each activation, 1 = none; one for all or each")
    pooling: Literal["max", "avg"] = Field("max", description="kind of pooling")
    downsample: PositiveInt = Field(1, description="images are averaged over so many squared pixels first")
    gap: bool = Field(True, description="global average before the head, instead of flattening")
    head: list[PositiveInt] = Field([11], description="widths of the hidden layers of the head; may be empty")
    activation: Activation = "silu"
    activations: list[Activation] = Field([], description="one for each convolution and head layer; empty = the same")
    batch_norm: bool = Field(True, description="BatchNorm after each convolution, which then has no bias")
    dropout: float = Field(0.0, ge=0, lt=1, description="after every hidden layer of the head")

    def build(self) -> Any:
        from .flexible_cnn import Layer, factory

        n = len(self.channels)
        names = _each("activations", list(self.activations or [self.activation]), n + len(self.head))
        columns = [_each(key, list(getattr(self, key)), n) for key in ("kernels", "strides", "pools")]
        layers = [Layer(*row) for row in zip(self.channels, *columns, names[:n], strict=True)]
        return factory(
            layers,
            list(zip(self.head, names[n:], strict=True)),
            downsample=self.downsample,
            batch_norm=self.batch_norm,
            pooling=self.pooling,
            gap=self.gap,
            dropout=self.dropout,
        )


class Lenet5(Option):
    """LeNet5 with ReLU and max-pooling; 61,706 parameters on mnist."""

    name: Literal["lenet5"] = "lenet5"

    def build(self) -> Any:
        from .plain_cnns import factory

        return factory(self.name)


class Cnn1(Option):
    """Two 3x3 convolutions (32, 64), one pooling, 128 hidden units, dropout; 1,199,882 parameters on mnist."""

    name: Literal["cnn1"] = "cnn1"
    dropout: list[float] = Field(
        [0.25, 0.5], min_length=2, max_length=2, description="after pooling, after the hidden units"
    )

    def build(self) -> Any:
        from .plain_cnns import factory

        return factory(self.name, _shares(self.dropout))


class Cnn2(Option):
    """Two padded 3x3 convolutions (32, 64), each pooled, 512 hidden units, dropout; 2,122,186 parameters on cifar10."""

    name: Literal["cnn2"] = "cnn2"
    dropout: list[float] = Field(
        [0.25, 0.5], min_length=2, max_length=2, description="after pooling, after the hidden units"
    )

    def build(self) -> Any:
        from .plain_cnns import factory

        return factory(self.name, _shares(self.dropout))


def _shares(values: list[float]) -> tuple[float, float]:
    for value in values:
        if not 0 <= value < 1:
            raise UserError("model.dropout", value, "a share of at least 0 and less than 1")
    return values[0], values[1]


class _ResNet(Option):
    """What the residual networks share."""

    stem: Literal["3x3", "7x7"] = Field("3x3", description="first convolution: 3x3, or 7x7 with stride 2; no pooling")
    batch_norm: bool = True
    bias: bool = Field(False, description="convolutions have biases; without BatchNorm they always do")
    dropout: float = Field(0.0, ge=0, lt=1, description="after every activation of a block")

    def build(self) -> Any:
        from .resnet import Style, factory

        return factory(self.name, self.stem, Style(self.batch_norm, self.bias, self.dropout))


class ResNet18(_ResNet):
    """Residual network of 8 basic blocks for small images; 11,173,962 parameters on cifar10."""

    name: Literal["resnet18"] = "resnet18"


class ResNet34(_ResNet):
    """Residual network of 16 basic blocks for small images; 21,282,122 parameters on cifar10."""

    name: Literal["resnet34"] = "resnet34"


class ResNet50(_ResNet):
    """Residual network of 16 bottleneck blocks for small images; 23,520,842 parameters on cifar10."""

    name: Literal["resnet50"] = "resnet50"


class ResNet101(_ResNet):
    """Residual network of 33 bottleneck blocks for small images; 42,512,970 parameters on cifar10."""

    name: Literal["resnet101"] = "resnet101"


class ResNet152(_ResNet):
    """Residual network of 50 bottleneck blocks for small images; 58,156,618 parameters on cifar10."""

    name: Literal["resnet152"] = "resnet152"


class NanoGpt(Option):
    """Decoder-only transformer; 960 parameters on tinyshakespeare."""

    name: Literal["nanogpt"] = "nanogpt"
    width: PositiveInt = Field(8, description="length of a token's vector")
    heads: PositiveInt = Field(1, description="attention heads; divides width")
    layers: PositiveInt = Field(1, description="transformer blocks")
    hidden: NonNegativeInt = Field(8, description="hidden units of a block's two linear layers; 0 = four times width")
    dropout: float = Field(0.0, ge=0, lt=1)

    def build(self) -> Any:
        from .nanogpt import factory

        return factory(self.width, self.heads, self.layers, self.hidden or 4 * self.width, self.dropout)


class QuadraticModel(Option):
    """The parameter matrix of the ``quadratic`` dataset; 24 parameters at its default size."""

    name: Literal["matrix"] = "matrix"

    def build(self) -> Any:
        from ..quadratic import model_factory

        return model_factory()


class ExternalModel(External):
    """An ``nn.Module`` class given as ``module:Class``; called with ``options`` and no arguments else."""

    def build(self) -> Any:
        from ..base import ModelFactory

        constructor = self.load()
        try:
            inspect.signature(constructor).bind(**self.options)
        except TypeError as error:
            raise UserError("model.options", self.options, f"arguments of {self.name} ({error})") from None
        return ModelFactory(lambda data: constructor(**self.options))


MODELS = Registry(
    "model",
    Mlp,
    SmallCnn,
    QuadraticModel,
    Linear,
    FlexibleCnn,
    Lenet5,
    Cnn1,
    Cnn2,
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
    Vgg11,
    Vgg13,
    Vgg16,
    Vgg19,
    WideResNet,
    NanoGpt,
    EfficientNetB0,
    DenseNet121,
    NfResNet26,
    Timm,
    Clip,
    external=ExternalModel,
)
