"""Curvature of any model and loss: the Hessian as a matrix, and its largest eigenvalues without the matrix.

All in float64 on a copy of the model; the model itself is not touched. Parameters are those that require a gradient,
in the order of ``named_parameters()``, each flattened. The model runs in the mode it is in (training or evaluation).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import UserError

Loss = Callable[[Tensor, Tensor], Tensor]
Data = tuple[Tensor, Tensor]
DENSE_BYTES = 2**31  # largest matrix made without asking: 16,384 parameters
CHUNK_BYTES = 2**26  # rows differentiated at once


class TopK(NamedTuple):
    """``values`` ``[k]``, largest first; ``vectors`` ``[n, k]``; ``residuals`` ``[k]`` = ``|H v - value v|``."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class _Gradient:
    """The gradient of the mean loss as one vector, differentiable once more."""

    def __init__(self, model: nn.Module, loss: Loss, data: Data) -> None:
        twin = copy.deepcopy(model).double()
        self.params = [p for p in twin.parameters() if p.requires_grad]
        if not self.params:
            raise UserError("model", type(model).__name__, "a model with parameters that require a gradient")
        x, y = (t.double() if t.is_floating_point() else t for t in data)
        value = loss(twin(x), y)
        if value.dim():
            raise UserError("loss", tuple(value.shape), "a function that returns one number (a mean over the samples)")
        parts = torch.autograd.grad(value, self.params, create_graph=True, materialize_grads=True)
        self.vector = torch.cat([g.reshape(-1) for g in parts])
        self.n = self.vector.numel()

    def rows(self, vectors: Tensor) -> Tensor:
        """``vectors`` ``[r, n]`` times the Hessian, ``[r, n]``: one vectorised reverse pass over the reverse pass."""
        if not self.vector.requires_grad:  # a loss that is linear in the parameters
            return torch.zeros_like(vectors)
        parts = torch.autograd.grad(
            self.vector, self.params, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        pairs = zip(parts, self.params, strict=True)
        flat = [vectors.new_zeros(len(vectors), p.numel()) if g is None else g.reshape(len(g), -1) for g, p in pairs]
        return torch.cat(flat, dim=1).detach()

    def product(self, vector: Tensor) -> Tensor:
        """Hessian times ``vector`` ``[n]``."""
        return self.rows(vector.unsqueeze(0))[0]


def hessian(model: nn.Module, loss: Loss, data: Data, *, max_bytes: int = DENSE_BYTES) -> Tensor:
    """The Hessian ``[n, n]`` of ``loss(model(x), y)`` with ``data = (x, y)``: float64, symmetric to the bit.

    Raises :class:`UserError` when the matrix would take more than ``max_bytes``.
    """
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if 8 * n * n > max_bytes:
        expected = f"at most {max_bytes:,}; the Hessian of {n:,} parameters takes {8 * n * n:,} bytes"
        raise UserError("max_bytes", 8 * n * n, expected, hint="top_k needs no matrix")
    gradient = _Gradient(model, loss, data)
    out = torch.empty(n, n, dtype=torch.float64, device=gradient.vector.device)
    chunk = max(1, CHUNK_BYTES // (8 * n))
    for first in range(0, n, chunk):
        unit = torch.zeros(min(chunk, n - first), n, dtype=torch.float64, device=out.device)
        unit[:, first : first + chunk].fill_diagonal_(1.0)
        out[first : first + chunk] = gradient.rows(unit)
    return (out + out.T) / 2


def top_k(
    model: nn.Module,
    loss: Loss,
    data: Data,
    k: int = 1,
    *,
    method: Literal["lanczos", "dense"] = "lanczos",
    seed: int = 0,
    iterations: int = 1000,
    tolerance: float = 1e-9,
) -> TopK:
    """The ``k`` largest eigenvalues (with sign) of the Hessian of ``loss(model(x), y)`` and their eigenvectors.

    ``lanczos`` needs one Hessian-vector product an iteration and ``n x iterations`` numbers of memory; it stops when
    every residual is below ``tolerance`` times the largest |eigenvalue| seen, and raises :class:`UserError` when
    ``iterations`` do not suffice. A multiple eigenvalue may come fewer times than its multiplicity. ``dense`` makes
    the matrix and misses nothing.
    """
    if method not in ("lanczos", "dense"):
        raise UserError("method", method, "lanczos or dense")
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not 1 <= k <= n:
        raise UserError("k", k, f"1 to {n}, the number of parameters")
    if method == "dense":
        matrix = hessian(model, loss, data)
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
        return TopK(values, vectors, torch.linalg.vector_norm(matrix @ vectors - vectors * values, dim=0))
    return _lanczos(_Gradient(model, loss, data), k, seed, min(iterations, n), tolerance)


def _lanczos(gradient: _Gradient, k: int, seed: int, limit: int, tolerance: float) -> TopK:
    """Lanczos with full reorthogonalisation (Golub and Van Loan, Matrix Computations, section 10.3)."""
    generator = torch.Generator().manual_seed(seed)
    device = gradient.vector.device
    basis: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    vector = _fresh(basis, gradient.n, generator, device)
    for m in range(1, limit + 1):
        basis.append(vector)
        image = gradient.product(vector)
        alphas.append(float(image @ vector))
        rest = _orthogonal(image, basis)
        beta = float(torch.linalg.vector_norm(rest))
        tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            side = torch.tensor(betas, dtype=torch.float64)
            tridiagonal += torch.diag(side, 1) + torch.diag(side, -1)
        values, small = torch.linalg.eigh(tridiagonal)
        scale = max(float(values.abs().max()), torch.finfo(torch.float64).tiny)
        if m >= k and (m == gradient.n or float((beta * small[-1, -k:]).abs().max()) <= tolerance * scale):
            vectors = torch.stack(basis, dim=1) @ small[:, -k:].flip(1).to(device)
            top = values[-k:].flip(0).to(device)
            return TopK(top, vectors, torch.linalg.vector_norm(gradient.rows(vectors.T).T - vectors * top, dim=0))
        if beta <= 1e-12 * scale:  # the space is invariant: go on beside it
            betas.append(0.0)
            vector = _fresh(basis, gradient.n, generator, device)
        else:
            betas.append(beta)
            vector = rest / beta
    raise UserError("iterations", limit, "more: the residuals are above the tolerance", hint="or a smaller k")


def _fresh(basis: Sequence[Tensor], n: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """A random unit vector orthogonal to the basis."""
    rest = _orthogonal(torch.randn(n, dtype=torch.float64, generator=generator).to(device), basis)
    return rest / torch.linalg.vector_norm(rest)


def _orthogonal(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """``vector`` without its part in the basis; twice, because once leaves rounding errors of the size removed."""
    if not basis:
        return vector
    q = torch.stack(list(basis), dim=1)
    for _ in range(2):
        vector = vector - q @ (q.T @ vector)
    return vector
