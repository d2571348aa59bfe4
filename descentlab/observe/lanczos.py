"""Lanczos with full reorthogonalisation (Golub and Van Loan, Matrix Computations, section 10.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .operators import Operator


class Krylov(NamedTuple):
    """After m products: orthonormal ``basis`` (m vectors ``[n]``), the tridiagonal matrix's eigenvalues ``values``
    ``[m]`` (ascending) and eigenvectors ``small`` ``[m, m]``, and the norm ``beta`` of what leaves the space."""

    basis: Sequence[Tensor]
    values: Tensor
    small: Tensor
    beta: float

    @property
    def scale(self) -> float:
        """The largest |eigenvalue| seen."""
        return max(float(self.values.abs().max()), torch.finfo(torch.float64).tiny)


def krylov(matrix: Operator, start: Tensor, generator: torch.Generator) -> Iterator[Krylov]:
    """One item per product, from the unit vector ``start``; an invariant space is left for one beside it (beta 0)."""
    basis: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    vector = start
    while True:
        basis.append(vector)
        image = matrix.product(vector)
        alphas.append(float(image @ vector))
        rest = orthogonal(image, basis)
        beta = float(torch.linalg.vector_norm(rest))
        tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            side = torch.tensor(betas, dtype=torch.float64)
            tridiagonal += torch.diag(side, 1) + torch.diag(side, -1)
        values, small = torch.linalg.eigh(tridiagonal)
        found = Krylov(basis, values, small, beta)
        if beta <= 1e-12 * found.scale:
            found = found._replace(beta=0.0)
        yield found
        if len(basis) == matrix.n:
            return
        betas.append(found.beta)
        vector = rest / beta if found.beta else fresh(basis, matrix.n, generator, matrix.device)


def fresh(basis: Sequence[Tensor], n: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """A random unit vector orthogonal to the basis."""
    rest = orthogonal(torch.randn(n, dtype=torch.float64, generator=generator).to(device), basis)
    return rest / torch.linalg.vector_norm(rest)


def orthogonal(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """``vector`` without its part in the basis; twice, because once leaves rounding errors of the size removed."""
    if not basis:
        return vector
    q = torch.stack(list(basis), dim=1)
    for _ in range(2):
        vector = vector - q @ (q.T @ vector)
    return vector
