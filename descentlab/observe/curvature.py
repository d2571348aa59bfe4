"""Curvature of any model and loss: the Hessian as a matrix, and its largest eigenvalues without the matrix.

See :mod:`descentlab.observe.operators` for what ``data``, ``matrix`` and ``parameters`` may be, and what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from .lanczos import largest
from .layered import dense, recognise
from .operators import Data, Loss, Matrix, Operator, at, batches_of, chosen, operator, shares, size, stacked

DENSE_BYTES = 2**31  # largest matrix made without asking: 16,384 parameters
CHUNK_BYTES = 2**26  # rows differentiated at once, at most
ROWS = 16  # and no more of them on a CPU: what is kept for each is as large as the graph, and more leaves the cache
ASYMMETRY = 1e-6  # difference of rows and columns that rounding does not explain
BASIS_BYTES = 2**28  # of vectors that Lanczos keeps, unless k needs more


class TopK(NamedTuple):
    """``values`` ``[k]``, largest first; ``vectors`` ``[n, k]``; ``residuals`` ``[k]`` = ``|H v - value v|``."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def hessian(
    model: nn.Module,
    loss: Loss,
    data: Data,
    *,
    weights: Tensor | None = None,
    matrix: Matrix = "hessian",
    parameters: Sequence[str] | None = None,
    max_bytes: int = DENSE_BYTES,
) -> Tensor:
    """The Hessian ``[n, n]`` of ``loss(model(x), y)`` with ``data = (x, y)``: float64, symmetric to the bit.

    ``weights``: where, instead of at the model's own weights: ``[n]`` in the order of ``named_parameters()`` that
    require a gradient, or an ensemble ``[M, n]``, which gives ``[M, n, n]``. ``matrix="ggn"`` is the generalised
    Gauss-Newton matrix instead; ``parameters`` restricts it to some layers. Plain networks have a written-out route
    (:mod:`descentlab.observe.layered`), everything else chunks of reverse over reverse. Raises :class:`UserError` when
    the result would take more than ``max_bytes``, or an operation of the model has wrong second derivatives.
    """
    n, members = size(model, parameters), 1 if weights is None or weights.dim() == 1 else len(weights)
    if (taken := 8 * n * n * members) > max_bytes:
        of = f"{n:,} parameters" if members == 1 else f"{members:,} members of {n:,} parameters each"
        expected = f"at most {max_bytes:,}; the Hessian of {of} takes {taken:,} bytes"
        raise UserError("max_bytes", taken, expected, hint="top_k and spectral_density need no matrix")
    if matrix not in ("hessian", "ggn"):
        raise UserError("matrix", matrix, "hessian or ggn")
    found = _layered(model, loss, data, weights, matrix, parameters)
    if found is None and weights is None:
        found = _rows(operator(model, loss, data, matrix, parameters))
    elif found is None:
        assert weights is not None
        each = weights.view(-1, weights.shape[-1])
        found = torch.stack([_rows(operator(at(model, w), loss, data, matrix, parameters)) for w in each])
    return found.view(n, n) if weights is None or weights.dim() == 1 else found


def _layered(
    model: nn.Module, loss: Loss, data: Data, weights: Tensor | None, matrix: Matrix, parameters: Sequence[str] | None
) -> Tensor | None:
    """``[M, n, n]`` by the written-out route, None where it does not apply."""
    plain = recognise(model)
    if plain is None:
        return None
    held = stacked(model, weights)
    names = [name for name, _ in model.named_parameters() if name in chosen(model, parameters)]
    batches = batches_of(data)
    total: Tensor | None = None
    for share, (x, y) in zip(shares(batches) if len(batches) > 1 else [1.0], batches, strict=True):
        found = dense(plain, held, names, loss, x, y, curved=matrix == "hessian")
        if found is None:
            return None
        total = found.mul_(share) if total is None else total.add_(found, alpha=share)
    return total


def _rows(curvature: Operator) -> Tensor:
    """The whole matrix ``[n, n]`` of an operator, a chunk of rows at a time."""
    n = curvature.n
    out = torch.empty(n, n, dtype=torch.float64, device=curvature.device)
    chunk = max(1, CHUNK_BYTES // (8 * n))
    if out.device.type == "cpu":
        chunk = min(chunk, ROWS)
    for first in range(0, n, chunk):
        unit = torch.zeros(min(chunk, n - first), n, dtype=torch.float64, device=out.device)
        unit[:, first : first + chunk].fill_diagonal_(1.0)
        out[first : first + chunk] = curvature.rows(unit)
    uneven = float((out - out.T).abs().max() / out.abs().max().clamp(min=torch.finfo(torch.float64).tiny))
    if uneven > ASYMMETRY:  # seen with torch's weight_norm; the symmetric part would hide it
        expected = (
            f"operations whose second derivatives are right: rows and columns differ by {uneven:.1e} of the largest"
        )
        raise UserError("matrix", "not symmetric", expected)
    return (out + out.T) / 2


def top_k(
    model: nn.Module,
    loss: Loss,
    data: Data,
    k: int = 1,
    *,
    method: Literal["lanczos", "dense"] = "lanczos",
    matrix: Matrix = "hessian",
    parameters: Sequence[str] | None = None,
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
    n = size(model, parameters)
    if not 1 <= k <= n:
        raise UserError("k", k, f"1 to {n}, the number of parameters")
    if method == "dense":
        whole = hessian(model, loss, data, matrix=matrix, parameters=parameters)
        values, vectors = torch.linalg.eigh(whole)
        values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
        return TopK(values, vectors, torch.linalg.vector_norm(whole @ vectors - vectors * values, dim=0))
    return _lanczos(operator(model, loss, data, matrix, parameters), k, seed, iterations, tolerance)


def _lanczos(matrix: Operator, k: int, seed: int, limit: int, tolerance: float) -> TopK:
    capacity = min(matrix.n, max(3 * k + 10, BASIS_BYTES // (8 * matrix.n)), max(limit, k + 1))
    found = largest(matrix, k, capacity=capacity, products=limit, tolerance=tolerance, seed=seed)
    if found is None:
        raise UserError("iterations", limit, "more: the residuals are above the tolerance", hint="or a smaller k")
    images = torch.stack([matrix.product(vector) for vector in found.vectors.T], dim=1)
    return TopK(found.values, found.vectors, torch.linalg.vector_norm(images - found.vectors * found.values, dim=0))
