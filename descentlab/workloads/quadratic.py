"""A noisy quadratic whose trajectory, stability limit and stationary covariance are known in closed form.

loss(Theta) = mean_b 1/2 |Theta A^T - Z_b|_F^2 with Theta [R, D], A = diag(sqrt(h)), so every row has the Hessian
diag(h) and the gradient of a batch is (Theta A^T - mean_b Z_b) A.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.streams import Streams
from .base import Data, ModelFactory


def curvatures(dimension: int, condition: float) -> np.ndarray:
    """Hessian eigenvalues ``[D]``, log-spaced from 1 down to 1 / condition."""
    return np.logspace(0.0, -np.log10(condition), dimension)


def load(rows: int, dimension: int, condition: float, noise: float, n: int) -> Data:
    """Inputs ``[n, D, D]``: the matrix A (the same for every sample); targets ``[n, R, D]``, N(0, noise^2)."""
    a = np.diag(np.sqrt(curvatures(dimension, condition)))
    z = noise * Streams(0).normal("targets", 2 * n * rows * dimension, replicate=0).reshape(2 * n, rows, dimension)
    x = torch.from_numpy(a).expand(n, dimension, dimension)
    train, test = torch.from_numpy(z[:n]), torch.from_numpy(z[n:])
    half = n // 2
    return Data(
        "quadratic", x, train, x[:half], test[:half], x[half:], test[half:],
        classes=0, source="generated", licence="none needed",
    )  # fmt: skip


class Matrix(nn.Module):
    """One parameter matrix Theta ``[R, D]``; output ``[B, R, D]`` = Theta A^T, computed by one linear map."""

    def __init__(self, rows: int, dimension: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(rows, dimension))

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.linear(self.theta, x[0])
        return out.expand(x.shape[0], *out.shape)


def model_factory() -> ModelFactory:
    """Theta starts at N(0, 1)."""

    def build(data: Data) -> nn.Module:
        if data.name != "quadratic":
            raise UserError(
                "model", "matrix", f"a model that fits dataset '{data.name}'; matrix belongs to 'quadratic'"
            )
        return Matrix(*data.y_train.shape[1:])

    return ModelFactory(build)
