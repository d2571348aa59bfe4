"""Settings of datasets and models, from one place."""

from __future__ import annotations

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
    SmallCnn,
)

Dataset = DATASETS.field()
Model = MODELS.field()

__all__ = [
    "DATASETS",
    "MODELS",
    "Cifar10",
    "Cifar100",
    "Cnn1",
    "Cnn2",
    "Dataset",
    "Digits",
    "FashionMnist",
    "FlexibleCnn",
    "GaussianMixture",
    "Lenet5",
    "Linear",
    "Mlp",
    "Mnist",
    "Mnist1dLike",
    "Mnist5k",
    "Model",
    "NanoGpt",
    "Quadratic",
    "QuadraticModel",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "SmallCnn",
    "TeacherStudent",
    "TinyShakespeare",
]
