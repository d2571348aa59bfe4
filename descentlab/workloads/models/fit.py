"""Whether a model fits a dataset, in one clear line if not."""

from __future__ import annotations

from ...core.errors import UserError
from ..base import Data


def misfit(model: str, data: Data, why: str) -> UserError:
    """The error for a model that cannot be trained on ``data``."""
    return UserError("model", model, f"a model that fits dataset '{data.name}', inputs of shape {data.shape}; {why}")


def images(model: str, data: Data) -> tuple[int, int, int]:
    """(channels, height, width) of a dataset of images with one class each."""
    if data.x_train.dim() != 4 or not data.classes or data.y_train.dim() != 1:
        raise misfit(model, data, f"{model} classifies images [channels, height, width]")
    channels, height, width = data.shape
    return channels, height, width


def outputs(model: str, data: Data) -> int:
    """How many numbers a model of vectors has to predict for one sample: the classes, or the length of a target."""
    if not data.x_train.is_floating_point():
        raise misfit(model, data, f"{model} takes real numbers, these are token ids")
    if data.classes and data.y_train.dim() == 1:
        return data.classes
    if not data.classes and data.y_train.dim() == 2:
        return data.y_train.shape[1]
    raise misfit(model, data, f"{model} predicts one class or one target vector for a sample")


def tokens(model: str, data: Data) -> tuple[int, int]:
    """(vocabulary size, block length) of a dataset of token windows."""
    if data.x_train.is_floating_point() or data.x_train.dim() != 2 or data.y_train.shape != data.x_train.shape:
        raise misfit(model, data, f"{model} predicts the next token at every position of a window [tokens]")
    return data.classes, data.shape[0]


def large_enough(model: str, data: Data, height: int, width: int) -> None:
    """Raise unless something is left of an image after all convolutions and pooling."""
    if min(height, width) < 1:
        raise misfit(model, data, f"{model} needs larger images: nothing is left of these after its pooling")
