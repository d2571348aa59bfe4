"""The noise of stochastic gradients: covariance of single-sample gradients, and how it lines up with the curvature."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..core.errors import UserError
from .curvature import DENSE_BYTES
from .operators import Loss

CHUNK_BYTES = 2**27  # single-sample gradients held at once
_MIXING = (nn.modules.batchnorm._BatchNorm,)


class GradientCovariance(NamedTuple):
    """``mean`` ``[n]`` of the single-sample gradients and their ``covariance`` ``[n, n]``, divided by ``samples``."""

    mean: Tensor
    covariance: Tensor
    samples: int


class Alignment(NamedTuple):
    """``cosine`` between two matrices (Frobenius), the ``scale`` s that makes s A closest to B, and ``error`` =
    |s A - B| / |B|."""

    cosine: float
    scale: float
    error: float


def gradient_covariance(
    model: nn.Module, loss: Loss, data: tuple[Tensor, Tensor], *, max_bytes: int = DENSE_BYTES
) -> GradientCovariance:
    """Mean and covariance of the gradients of ``loss(model(x_i), y_i)`` over the samples i of ``data = (x, y)``.

    Float64, exact, in chunks of samples, with a batch axis of length 1 for every sample. A batch of B samples drawn
    with replacement has noise of covariance / B. Raises :class:`UserError` where samples have no gradients of their own
    (BatchNorm in training mode), and when the matrix would take more than ``max_bytes``.
    """
    mixing = [name for name, m in model.named_modules() if isinstance(m, _MIXING) and m.training]
    if mixing:
        raise UserError("model", mixing[0], "a model whose samples do not mix: call model.eval() before")
    twin = copy.deepcopy(model).double()
    params = {k: p.detach() for k, p in twin.named_parameters() if p.requires_grad}
    if not params:
        raise UserError("model", type(model).__name__, "a model with parameters that require a gradient")
    n = sum(p.numel() for p in params.values())
    if 8 * n * n > max_bytes:
        expected = f"at most {max_bytes:,}; the covariance of {n:,} parameters takes {8 * n * n:,} bytes"
        raise UserError("max_bytes", 8 * n * n, expected)
    x, y = (t.double() if t.is_floating_point() else t for t in data)

    def one(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return loss(functional_call(twin, p, (a.unsqueeze(0),)), b.unsqueeze(0))

    each, chunk = vmap(one), max(1, CHUNK_BYTES // (8 * n))
    total = torch.zeros(n, dtype=torch.float64, device=x.device)
    squares = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    for first in range(0, len(x), chunk):
        rows = slice(first, first + chunk)
        g = _gradients(each, params, x[rows], y[rows])
        total += g.sum(0)
        squares += g.T @ g
    mean = total / len(x)
    covariance = squares / len(x) - torch.outer(mean, mean)
    return GradientCovariance(mean, (covariance + covariance.T) / 2, len(x))


def _gradients(each: object, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Gradients ``[samples, n]``: a copy of the parameters for every sample, one backward pass for all of them."""
    copies = {k: p.expand(len(x), *p.shape).clone().requires_grad_() for k, p in params.items()}
    value = each(copies, x, y)  # type: ignore[operator]
    if value.dim() != 1:
        raise UserError("loss", tuple(value.shape[1:]), "a function that returns one number (a mean over the samples)")
    grads = torch.autograd.grad(value.sum(), list(copies.values()), materialize_grads=True)
    return torch.cat([g.reshape(len(x), -1) for g in grads], dim=1)


def alignment(a: Tensor, b: Tensor) -> Alignment:
    """How far ``b`` is a multiple of ``a`` (both ``[n, n]``), for instance noise covariance and Hessian."""
    inner, aa, bb = float((a * b).sum()), float((a * a).sum()), float((b * b).sum())
    if aa == 0 or bb == 0:
        raise UserError("matrix", 0.0, "matrices that are not zero")
    scale = inner / aa
    return Alignment(inner / (aa * bb) ** 0.5, scale, float((scale * a - b).norm()) / bb**0.5)
