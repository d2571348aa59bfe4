"""Fully connected networks of any width."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import UserError
from .base import Data, ModelFactory

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class MLP(nn.Module):
    """``[B, …]`` -> ``[B, classes]``; widths[0] inputs after flattening. With widths (36, 8, 10): 386 parameters."""

    def __init__(self, widths: tuple[int, ...], activation: str = "silu", dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            if i:
                layers.append(ACTIVATIONS[activation]())
                if dropout:
                    layers.append(nn.Dropout(dropout))
            layers.append(nn.Linear(a, b))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def factory(hidden: tuple[int, ...], activation: str, pool: int, dropout: float) -> ModelFactory:
    """Adaptive average pooling of images to ``pool`` x ``pool`` (0 = none), then the network."""

    def build(data: Data) -> nn.Module:
        if not data.classes:
            raise UserError("model", "mlp", f"a model that fits dataset '{data.name}'; mlp is a classifier")
        image = data.x_train.shape[1:]
        channels = image[0] if len(image) == 3 else 1
        inputs = channels * pool * pool if pool and len(image) == 3 else image.numel()
        return MLP((inputs, *hidden, data.classes), activation, dropout)

    def stem(x: Tensor) -> Tensor:
        return (F.adaptive_avg_pool2d(x, pool) if x.dim() == 4 else x).flatten(1)

    return ModelFactory(build, stem if pool else None)
