"""Fully connected networks of any width."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Data, ModelFactory
from .fit import outputs

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class MLP(nn.Module):
    """``[B, …]`` -> ``[B, classes]``; widths[0] inputs after flattening. With widths (36, 8, 10): 386 parameters.

    After each hidden linear layer: BatchNorm if asked for, the activation (one name for all, or one for each), dropout.
    """

    plain = True  # forward is the only child and nothing else; see observe.layered

    def __init__(
        self,
        widths: tuple[int, ...],
        activation: str | Sequence[str] = "silu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        names = [activation] * (len(widths) - 2) if isinstance(activation, str) else list(activation)
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(widths[0], widths[1], bias=bias)]
        for name, (a, b) in zip(names, itertools.pairwise(widths[1:]), strict=True):
            if batch_norm:
                layers.append(nn.BatchNorm1d(a))
            layers.append(ACTIVATIONS[name]())
            if dropout:
                layers.append(nn.Dropout(dropout))
            layers.append(nn.Linear(a, b, bias=bias))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def factory(
    name: str,
    hidden: tuple[int, ...],
    activation: str | Sequence[str] = "silu",
    pool: int = 0,
    dropout: float = 0.0,
    batch_norm: bool = False,
    bias: bool = True,
) -> ModelFactory:
    """Adaptive average pooling of images to ``pool`` x ``pool`` (0 = none), then the network."""

    def build(data: Data) -> nn.Module:
        last = outputs(name, data)
        image = data.x_train.shape[1:]
        channels = image[0] if len(image) == 3 else 1
        inputs = channels * pool * pool if pool and len(image) == 3 else image.numel()
        return MLP((inputs, *hidden, last), activation, dropout, batch_norm, bias)

    def stem(x: Tensor) -> Tensor:
        return (F.adaptive_avg_pool2d(x, pool) if x.dim() == 4 else x).flatten(1)

    return ModelFactory(build, stem if pool else None)
