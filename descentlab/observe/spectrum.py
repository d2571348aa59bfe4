"""The whole spectrum of a curvature matrix without the matrix: its density and its trace, with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from .lanczos import krylov
from .operators import Data, Loss, Matrix, Operator, operator


@dataclass(frozen=True)
class Density:
    """Stochastic Lanczos quadrature: of every probe the ``nodes`` ``[P, m]`` and ``weights`` ``[P, m]`` (each row sums
    to 1). For any function f, ``n`` times the mean over probes of sum_j w_j f(node_j) estimates tr f(matrix)."""

    nodes: Tensor
    weights: Tensor
    n: int

    def density(self, at: Tensor, width: float) -> Tensor:
        """Eigenvalues per unit as a share of n, at the points ``at`` ``[K]``, each node a Gaussian of std ``width``."""
        z = (at[:, None, None] - self.nodes) / width
        bumps = torch.exp(-0.5 * z.square()) / (width * math.sqrt(2 * math.pi))
        return (bumps * self.weights).sum(-1).mean(-1)

    def moment(self, power: int) -> tuple[float, float]:
        """(tr matrix^power, its standard error over probes)."""
        each = self.n * (self.weights * self.nodes**power).sum(1)
        return float(each.mean()), _standard_error(each)


class Trace(NamedTuple):
    """``value`` with its ``standard_error``, after so many matrix-vector ``products``."""

    value: float
    standard_error: float
    products: int


def _standard_error(each: Tensor) -> float:
    return float(each.std() / math.sqrt(len(each))) if len(each) > 1 else math.nan


def _signs(n: int, columns: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Independent +1 and -1 ``[n, columns]``."""
    return (torch.randint(2, (n, columns), generator=generator) * 2 - 1).double().to(device)


def spectral_density(
    model: nn.Module,
    loss: Loss,
    data: Data,
    *,
    probes: int = 8,
    steps: int = 60,
    matrix: Matrix = "hessian",
    parameters: Sequence[str] | None = None,
    seed: int = 0,
) -> Density:
    """Nodes and weights of ``probes`` Lanczos runs of ``steps`` products each (arXiv 1901.10159).

    Needs ``steps`` vectors of memory at a time. Raises :class:`UserError` for fewer than one probe or step.
    """
    for key, value in (("probes", probes), ("steps", steps)):
        if value < 1:
            raise UserError(key, value, "at least 1")
    curvature = operator(model, loss, data, matrix, parameters)
    generator, m = torch.Generator().manual_seed(seed), min(steps, curvature.n)
    nodes, weights = torch.zeros(probes, m, dtype=torch.float64), torch.zeros(probes, m, dtype=torch.float64)
    for p in range(probes):
        start = _signs(curvature.n, 1, generator, curvature.device)[:, 0] / math.sqrt(curvature.n)
        *_, found = krylov(curvature, start, m)  # shorter where the probe's space is exhausted: no weight is missing
        k = len(found.values)
        nodes[p, :k], weights[p, :k] = found.values, found.small[0].square()
    return Density(nodes, weights, curvature.n)


def trace(
    model: nn.Module,
    loss: Loss,
    data: Data,
    *,
    method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace",
    products: int = 60,
    matrix: Matrix = "hessian",
    parameters: Sequence[str] | None = None,
    seed: int = 0,
) -> Trace:
    """The trace from about ``products`` matrix-vector products with random signs.

    ``hutchinson``: mean of z^T A z (error ~ 1 / sqrt(products)). ``hutch++``: a third of the products finds a subspace
    whose trace is exact (Meyer et al., arXiv 2010.09649). ``xtrace``: every vector serves both purposes (Epperly,
    Tropp, Webber, arXiv 2301.07825). The standard error is that of the exchangeable or independent terms. A matrix
    with no more rows than ``products`` is summed up exactly. Raises :class:`UserError` for another method or too few
    products.
    """
    methods = {"xtrace": (_xtrace, 4), "hutch++": (_hutchpp, 6), "hutchinson": (_hutchinson, 2)}
    if method not in methods:
        raise UserError("method", method, f"one of {', '.join(methods)}")
    estimate, least = methods[method]
    if products < least:
        raise UserError("products", products, f"at least {least} for {method}")
    curvature = operator(model, loss, data, matrix, parameters)
    if curvature.n <= products:
        eye = torch.eye(curvature.n, dtype=torch.float64, device=curvature.device)
        return Trace(float(curvature.rows(eye).diagonal().sum()), 0.0, curvature.n)
    return estimate(curvature, products, torch.Generator().manual_seed(seed))


def _times(matrix: Operator, columns: Tensor) -> Tensor:
    return torch.stack([matrix.product(column) for column in columns.T], dim=1)


def _hutchinson(matrix: Operator, products: int, generator: torch.Generator) -> Trace:
    z = _signs(matrix.n, products, generator, matrix.device)
    each = (z * _times(matrix, z)).sum(0)
    return Trace(float(each.mean()), _standard_error(each), products)


def _hutchpp(matrix: Operator, products: int, generator: torch.Generator) -> Trace:
    third = products // 3
    basis = torch.linalg.qr(_times(matrix, _signs(matrix.n, third, generator, matrix.device)))[0]
    inside = float((basis * _times(matrix, basis)).sum())
    z = _signs(matrix.n, third, generator, matrix.device)
    z = z - basis @ (basis.T @ z)
    each = (z * _times(matrix, z)).sum(0)
    return Trace(inside + float(each.mean()), _standard_error(each), 3 * third)


def _xtrace(matrix: Operator, products: int, generator: torch.Generator) -> Trace:
    """Leave one test vector out of the subspace, in the small coordinates of Y = Q R, and test with it."""
    m = products // 2
    omega = _signs(matrix.n, m, generator, matrix.device)
    y = _times(matrix, omega)
    q, r = torch.linalg.qr(y)
    z = _times(matrix, q)
    inner, seen = q.T @ z, q.T @ omega  # Q^T A Q, Q^T Omega
    terms = []
    for i in range(m):
        others = torch.cat([r[:, :i], r[:, i + 1 :]], dim=1)
        u, scales, _ = torch.linalg.svd(others, full_matrices=False)
        u = u[:, scales > 1e-12 * max(float(scales.max()), torch.finfo(torch.float64).tiny)]
        c = u @ (u.T @ seen[:, i])
        outside, image = omega[:, i] - q @ c, y[:, i] - z @ c
        terms.append((u * (inner @ u)).sum() + outside @ image)
    each = torch.stack(terms)
    return Trace(float(each.mean()), _standard_error(each), 2 * m)
