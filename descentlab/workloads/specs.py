"""Settings of datasets and models, from one place, and of the order in which samples are seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pydantic import Field

from ..core.errors import UserError
from ..core.specs import External, Option, Registry
from .datasets.specs import (
    DATASETS,
    Cifar10,
    Cifar100,
    Digits,
    FashionMnist,
    GaussianMixture,
    Mnist,
    Mnist1dLike,
    Mnist5k,
    MnistSimilar,
    Quadratic,
    TeacherStudent,
    TinyShakespeare,
)
from .models.specs import (
    MODELS,
    Cnn1,
    Cnn2,
    FlexibleCnn,
    Lenet5,
    Linear,
    Mlp,
    NanoGpt,
    QuadraticModel,
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
    SmallCnn,
    Vgg11,
    Vgg13,
    Vgg16,
    Vgg19,
    WideResNet,
)

Maker = Callable[..., Any]  # (n, batch_size, streams) -> a sampler, see workloads/sampler.py
_SHARED = "all replicates see the same batches in the same order"


class Shuffle(Option):
    """Every epoch a fresh permutation, cut into n // batch_size batches; what is left over is dropped."""

    name: Literal["shuffle"] = "shuffle"
    shared: bool = Field(False, description=_SHARED)

    def build(self) -> Maker:
        from .sampler import Shuffled

        return partial(Shuffled, shared=self.shared)


class Replacement(Option):
    """Every batch drawn uniformly with replacement; n // batch_size batches count as an epoch."""

    name: Literal["replacement"] = "replacement"
    shared: bool = Field(False, description=_SHARED)

    def build(self) -> Maker:
        from .sampler import WithReplacement

        return partial(WithReplacement, shared=self.shared)


class Full(Option):
    """All samples at every step (gradient descent); a step is an epoch, and no batch_size may be given."""

    name: Literal["full"] = "full"

    def build(self) -> Maker:
        from .sampler import FullBatch

        return FullBatch


class ExternalSampler(External):
    """A third party's class, called with (n, batch_size, streams) and the ``options``."""

    def build(self) -> Maker:
        cls = self.load()

        def make(n: int, batch_size: int, streams: Any) -> Any:
            from .sampler import checked_sampler

            try:
                made = cls(n, batch_size, streams, **self.options)
            except TypeError as error:
                expected = f"a class that takes (n, batch_size, streams) and its options ({error})"
                raise UserError("sampler", self.name, expected) from None
            return checked_sampler(self.name, made, n)

        return make


SAMPLERS = Registry("sampler", Shuffle, Replacement, Full, external=ExternalSampler)
Dataset = DATASETS.field()
Model = MODELS.field()
Sampler = SAMPLERS.field()

__all__ = [
    "DATASETS",
    "MODELS",
    "SAMPLERS",
    "Cifar10",
    "Cifar100",
    "Cnn1",
    "Cnn2",
    "Dataset",
    "Digits",
    "ExternalSampler",
    "FashionMnist",
    "FlexibleCnn",
    "Full",
    "GaussianMixture",
    "Lenet5",
    "Linear",
    "Mlp",
    "Mnist",
    "Mnist1dLike",
    "Mnist5k",
    "MnistSimilar",
    "Model",
    "NanoGpt",
    "Quadratic",
    "QuadraticModel",
    "Replacement",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNet101",
    "ResNet152",
    "Sampler",
    "Shuffle",
    "SmallCnn",
    "TeacherStudent",
    "TinyShakespeare",
    "Vgg11",
    "Vgg13",
    "Vgg16",
    "Vgg19",
    "WideResNet",
]
