"""Curvature of any model and loss: the Hessian as a matrix, and its largest eigenvalues without the matrix.

See :mod:`descentlab.observe.operators` for what ``data``, ``matrix`` and ``parameters`` may be, and what is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from .lanczos import fresh, krylov
from .operators import Data, Loss, Matrix, Operator, operator, size

DENSE_BYTES = 2**31  # largest matrix made without asking: 16,384 parameters
CHUNK_BYTES = 2**26  # rows differentiated at once


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
    matrix: Matrix = "hessian",
    parameters: Sequence[str] | None = None,
    max_bytes: int = DENSE_BYTES,
) -> Tensor:
    """The Hessian ``[n, n]`` of ``loss(model(x), y)`` with ``data = (x, y)``: float64, symmetric to the bit.

    ``matrix="ggn"`` is the generalised Gauss-Newton matrix instead; ``parameters`` restricts it to some layers. Raises
    :class:`UserError` when the matrix would take more than ``max_bytes``.
    """
    n = size(model, parameters)
    if 8 * n * n > max_bytes:
        expected = f"at most {max_bytes:,}; the Hessian of {n:,} parameters takes {8 * n * n:,} bytes"
        raise UserError("max_bytes", 8 * n * n, expected, hint="top_k and spectral_density need no matrix")
    curvature = operator(model, loss, data, matrix, parameters)
    out = torch.empty(n, n, dtype=torch.float64, device=curvature.device)
    chunk = max(1, CHUNK_BYTES // (8 * n))
    for first in range(0, n, chunk):
        unit = torch.zeros(min(chunk, n - first), n, dtype=torch.float64, device=out.device)
        unit[:, first : first + chunk].fill_diagonal_(1.0)
        out[first : first + chunk] = curvature.rows(unit)
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
        dense = hessian(model, loss, data, matrix=matrix, parameters=parameters)
        values, vectors = torch.linalg.eigh(dense)
        values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
        return TopK(values, vectors, torch.linalg.vector_norm(dense @ vectors - vectors * values, dim=0))
    return _lanczos(operator(model, loss, data, matrix, parameters), k, seed, min(iterations, n), tolerance)


def _lanczos(matrix: Operator, k: int, seed: int, limit: int, tolerance: float) -> TopK:
    generator = torch.Generator().manual_seed(seed)
    start = fresh((), matrix.n, generator, matrix.device)
    for found in itertools.islice(krylov(matrix, start, generator), limit):
        m = len(found.basis)
        bound = (found.beta * found.small[-1, -k:]).abs().max()
        if m >= k and (m == matrix.n or float(bound) <= tolerance * found.scale):
            vectors = torch.stack(list(found.basis), dim=1) @ found.small[:, -k:].flip(1).to(matrix.device)
            top = found.values[-k:].flip(0).to(matrix.device)
            return TopK(top, vectors, torch.linalg.vector_norm(matrix.rows(vectors.T).T - vectors * top, dim=0))
    raise UserError("iterations", limit, "more: the residuals are above the tolerance", hint="or a smaller k")
