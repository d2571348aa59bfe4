"""Lanczos with full reorthogonalisation, plain and restarted (Golub and Van Loan, Matrix Computations, 10.3)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .operators import Operator

EXHAUSTED = 1e-12  # what leaves the space, relative to the largest eigenvalue seen, below which it counts as nothing
COLUMNS = 2**16  # of the basis turned at once, to keep memory small


class Krylov:
    """After m products: the tridiagonal matrix of ``alphas`` ``[m]`` and ``betas`` ``[m - 1]``, its eigenvalues
    ``values`` ``[m]`` and eigenvectors ``small`` ``[m, m]``, and the norm ``beta`` of what leaves the space."""

    def __init__(self, alphas: list[float], betas: list[float], beta: float) -> None:
        self._alphas, self._betas, self.beta = list(alphas), list(betas), beta

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        tridiagonal = torch.diag(torch.tensor(self._alphas, dtype=torch.float64))
        if self._betas:
            side = torch.tensor(self._betas, dtype=torch.float64)
            tridiagonal += torch.diag(side, 1) + torch.diag(side, -1)
        values, small = torch.linalg.eigh(tridiagonal)
        return values, small

    @property
    def values(self) -> Tensor:
        """Eigenvalues, ascending."""
        return self._eigen[0]

    @property
    def small(self) -> Tensor:
        """Eigenvectors in columns."""
        return self._eigen[1]


def krylov(matrix: Operator, start: Tensor, steps: int) -> Iterator[Krylov]:
    """One item per product, at most ``steps``, from the unit vector ``start``; ends where the space is exhausted
    (``beta`` 0). Holds ``steps`` vectors."""
    basis = start.new_empty(steps, matrix.n)
    alphas: list[float] = []
    betas: list[float] = []
    scale, vector = torch.finfo(torch.float64).tiny, start
    for m in range(steps):
        basis[m] = vector
        alpha, rest = _product(matrix, basis[: m + 1], betas[-1] if betas else 0.0)
        alphas.append(alpha)
        beta = float(torch.linalg.vector_norm(rest))
        scale = max(scale, abs(alpha))
        done = beta <= EXHAUSTED * scale
        yield Krylov(alphas, betas, 0.0 if done else beta)
        if done:
            return
        betas.append(beta)
        vector = rest / beta


def _product(matrix: Operator, basis: Tensor, beta: float) -> tuple[float, Tensor]:
    """(v . A v, A v without its part in the basis) for the last vector v of the basis; ``beta``: coupling to the one
    before."""
    vector = basis[-1]
    image = matrix.product(vector)
    alpha = float(image @ vector)
    rest = image.sub(vector, alpha=alpha)
    if beta:
        rest.sub_(basis[-2], alpha=beta)
    return alpha, orthogonal(rest, basis)


class Pairs(NamedTuple):
    """``values`` ``[k]``, largest first, and ``vectors`` ``[n, k]``, after so many ``products``."""

    values: Tensor
    vectors: Tensor
    products: int


def largest(matrix: Operator, k: int, *, capacity: int, products: int, tolerance: float, seed: int) -> Pairs | None:
    """The ``k`` largest eigenvalues by thick restarts (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000).

    The basis grows to ``capacity`` > k vectors; then its best Ritz vectors are kept and it grows again. Done when every
    residual is below ``tolerance`` times the largest |eigenvalue| seen; None when ``products`` do not suffice. An
    exhausted space is left for one beside it, so that with a capacity of n all n eigenvalues can be had.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.empty(capacity, matrix.n, dtype=torch.float64, device=matrix.device)
    small = torch.zeros(capacity, capacity, dtype=torch.float64)
    vector = fresh(basis[:0], generator)
    held, look, beta, scale = 0, k, 0.0, torch.finfo(torch.float64).tiny
    for count in range(1, products + 1):
        basis[held] = vector
        held += 1
        small[held - 1, held - 1], rest = _product(matrix, basis[:held], beta)
        beta = float(torch.linalg.vector_norm(rest))
        scale = max(scale, abs(float(small[held - 1, held - 1])))
        beta = 0.0 if beta <= EXHAUSTED * scale else beta
        restarted = False
        if held >= k and (held >= look or held == capacity or count == products or not beta):
            values, inner = torch.linalg.eigh(small[:held, :held])
            scale = max(scale, float(values.abs().max()))
            if held == matrix.n or float((beta * inner[-1, -k:]).abs().max()) <= tolerance * scale:
                chosen = inner[:, -k:].flip(1).to(matrix.device)
                return Pairs(values[-k:].flip(0).to(matrix.device), basis[:held].T @ chosen, count)
            restarted = held == capacity
            if restarted:
                held = _restart(basis, small, values, beta * inner[-1], inner, k)
            look = held + max(2, (held if not restarted else capacity - held) // 8)  # the small problem costs, too
        vector = rest / beta if beta else fresh(basis[:held], generator)
        if not restarted and held < capacity:
            small[held, held - 1] = small[held - 1, held] = beta
        beta = 0.0 if restarted else beta
    return None


def _restart(basis: Tensor, small: Tensor, values: Tensor, leaving: Tensor, inner: Tensor, k: int) -> int:
    """Replace the basis by its best Ritz vectors, coupled to the next vector by ``leaving``; how many there are."""
    capacity = len(basis)
    kept = min(capacity - 1, k + max(2, (capacity - k) // 3))
    turn = inner[:, -kept:].T.contiguous().to(basis.device)
    for first in range(0, basis.shape[1], COLUMNS):
        columns = slice(first, first + COLUMNS)
        basis[:kept, columns] = turn @ basis[:, columns]
    small.zero_()
    small[:kept, :kept] = torch.diag(values[-kept:])
    small[kept, :kept] = small[:kept, kept] = leaving[-kept:]
    return kept


def fresh(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector ``[n]`` orthogonal to the rows of ``basis`` ``[m, n]``."""
    made = torch.randn(basis.shape[1], dtype=torch.float64, generator=generator).to(basis.device)
    rest = orthogonal(made, basis)
    return rest / torch.linalg.vector_norm(rest)


def orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """``vector`` without its part in the rows of ``basis``; again where little is left, because a pass leaves rounding
    errors of the size removed (Daniel, Gragg, Kaufman, Stewart, Math. Comp. 30, 1976)."""
    before = float(torch.linalg.vector_norm(vector))
    for _ in range(3):
        vector = vector - basis.T @ (basis @ vector)
        after = float(torch.linalg.vector_norm(vector))
        if after > 0.7 * before:
            break
        before = after
    return vector
