"""The loss on a plane through the weights, evaluated as one ensemble, with the paths of training runs on it.

Directions: ``pca`` of the paths; ``random`` Gaussian; ``filter``, random with every filter (row of a weight) scaled to
the norm of the filter at the centre, and biases and normalisation layers left alone (Li et al. 2018, arXiv 1712.09913);
``hessian``, the eigenvectors of the two largest eigenvalues at the centre.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..core.errors import UserError
from .curvature import top_k
from .operators import Loss, at

Directions = Literal["pca", "random", "filter", "hessian"]
KINDS = ("pca", "random", "filter", "hessian")
CHUNK_BYTES = 2**26  # weights of the members evaluated at once


class Path(NamedTuple):
    """One run on the plane: ``xy`` ``[T, 2]``, the ``loss`` ``[T]`` at its own weights (not on the plane), ``steps``
    ``[T]``, and ``inside``: which share of its squared distances from the centre lies in the plane."""

    name: str
    xy: np.ndarray
    loss: np.ndarray
    steps: np.ndarray
    inside: float


class Surface(NamedTuple):
    """``loss`` ``[K, K]``: row i at ``y[i]``, column j at ``x[j]``; the centre is (0, 0). ``directions`` ``[2, n]`` are
    one unit of x and of y, ``labels`` what the axes are; ``shares``: which part of the variance of the paths each axis
    explains (NaN without paths)."""

    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray
    center_loss: float
    paths: list[Path]
    directions: np.ndarray
    labels: tuple[str, str]
    shares: tuple[float, float]
    kind: str


def landscape(
    model: nn.Module,
    loss: Loss,
    data: tuple[Any, Any],
    *,
    paths: Mapping[str, Any] | None = None,
    directions: Directions = "pca",
    center: Tensor | None = None,
    span: float | None = None,
    resolution: int = 31,
    seed: int = 0,
) -> Surface:
    """The loss ``loss(model(x), y)`` on a plane through ``center`` (None: the end of the first path, else the model).

    ``paths``: name -> weights ``[T, n]`` along a run, in the order of ``named_parameters()`` that require a gradient.
    ``span``: half the width of the plane in units of its directions; None fits the paths. Float64, in evaluation mode,
    but BatchNorm takes the statistics of the data (stored ones belong to other weights). Raises :class:`UserError` for
    paths of another model, no paths where PCA needs them, another direction.
    """
    if directions not in KINDS:
        raise UserError("directions", directions, f"one of {', '.join(KINDS)}")
    if resolution < 3:
        raise UserError("resolution", resolution, "at least 3 points along an axis")
    held = {name: torch.as_tensor(np.asarray(w), dtype=torch.float64) for name, w in (paths or {}).items()}
    twin = _ready(model)
    own = torch.cat([p.detach().flatten() for p in twin.parameters() if p.requires_grad])
    for name, w in held.items():
        if w.dim() != 2 or w.shape[1] != len(own) or not len(w):
            raise UserError("paths", name, f"weights [T, {len(own)}] of this model, not {list(w.shape)}")
    finite = {name: w[torch.isfinite(w).all(1)] for name, w in held.items()}
    middle = center.double() if center is not None else (next(iter(held.values()))[-1] if held else own)
    if not bool(torch.isfinite(middle).all()):
        raise UserError("center", "not finite", "finite weights: the first run must not have diverged")
    basis, labels = _directions(twin, loss, data, directions, middle, list(finite.values()), seed)
    placed = {name: _project(w - middle, basis) for name, w in finite.items()}
    limits = _limits(list(placed.values()), span, directions)
    x, y = (torch.linspace(low, high, resolution, dtype=torch.float64) for low, high in limits)
    points = torch.cartesian_prod(y, x)
    values = evaluate(twin, loss, data, middle, points[:, [1, 0]] @ basis).view(resolution, resolution)
    made = []
    for name, w in finite.items():
        away = (w - middle).square().sum()
        inside = float((placed[name] @ basis).square().sum() / away) if away > 0 else 1.0
        true = evaluate(twin, loss, data, torch.zeros_like(middle), w)
        steps = torch.isfinite(held[name]).all(1).nonzero()[:, 0]
        made.append(Path(name, placed[name].numpy(), true.numpy(), steps.numpy(), inside))
    start = float(evaluate(twin, loss, data, middle, torch.zeros(1, len(middle), dtype=torch.float64))[0])
    shares = _shares(list(finite.values()), basis)
    return Surface(x.numpy(), y.numpy(), values.numpy(), start, made, basis.numpy(), labels, shares, directions)


def _ready(model: nn.Module) -> nn.Module:
    """A float64 copy in evaluation mode whose BatchNorm layers use the statistics of what they see."""
    twin = copy.deepcopy(model).double().eval()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    return twin


def evaluate(model: nn.Module, loss: Loss, data: tuple[Any, Any], center: Tensor, offsets: Tensor) -> Tensor:
    """The loss ``[G]`` at ``center`` ``[n]`` + ``offsets`` ``[G, n]``: members of an ensemble, a few at a time."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    x, y = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in data)

    def one(weights: Tensor) -> Tensor:
        parts = weights.split([p.numel() for _, p in named])
        held = {name: part.view_as(p) for (name, p), part in zip(named, parts, strict=True)}
        return loss(functional_call(model, held, (x,)), y)

    samples = len(x) if isinstance(x, Tensor) else 1
    chunk = max(1, min(CHUNK_BYTES // (8 * len(center)), CHUNK_BYTES // (8 * 64 * max(samples, 1))))
    with torch.no_grad():
        found = [vmap(one, randomness="same")(center + part) for part in offsets.split(chunk)]
    return torch.cat(found)


def _directions(
    model: nn.Module,
    loss: Loss,
    data: tuple[Any, Any],
    kind: Directions,
    middle: Tensor,
    paths: Sequence[Tensor],
    seed: int,
) -> tuple[Tensor, tuple[str, str]]:
    """(two rows ``[2, n]``, what the axes are called)."""
    if kind == "pca":
        points = torch.cat(list(paths)) if paths else middle.unsqueeze(0)
        if len(points) < 2:
            raise UserError("directions", kind, "paths of at least two points, or another direction")
        apart = points - points.mean(0)
        if not bool((apart.abs().amax() > 0).item()):
            raise UserError("directions", kind, "paths that move")
        rows = torch.linalg.svd(apart, full_matrices=False).Vh[:2]
        return rows, ("principal component 1", "principal component 2")
    if kind == "hessian":
        found = top_k(at(model, middle), loss, data, 2, tolerance=1e-6)
        rows = found.vectors.T
        names = [f"Hessian eigenvector {i + 1} (eigenvalue {float(v):.4g})" for i, v in enumerate(found.values)]
        return rows, (names[0], names[1])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, len(middle), dtype=torch.float64, generator=generator)
    if kind == "filter":
        return filter_normalised(model, rows, middle), (
            "filter-normalised direction 1",
            "filter-normalised direction 2",
        )
    rows = torch.linalg.qr(rows.T)[0].T * torch.linalg.vector_norm(middle)
    return rows, ("random direction 1 (units of the weights' norm)", "random direction 2")


def filter_normalised(model: nn.Module, rows: Tensor, middle: Tensor) -> Tensor:
    """``rows`` ``[r, n]`` with d_ij <- d_ij |theta_ij| / |d_ij| for filter j of layer i; zero for everything that is no
    matrix or kernel (biases, normalisation)."""
    out, first = torch.zeros_like(rows), 0
    for p in (p for p in model.parameters() if p.requires_grad):
        place = slice(first, first + p.numel())
        first = place.stop
        if p.dim() >= 2:
            d, theta = rows[:, place].view(len(rows), p.shape[0], -1), middle[place].view(p.shape[0], -1)
            scale = torch.linalg.vector_norm(theta, dim=1) / torch.linalg.vector_norm(d, dim=2).clamp(min=1e-30)
            out[:, place] = (d * scale.unsqueeze(-1)).flatten(1)
    return out


def _project(points: Tensor, basis: Tensor) -> Tensor:
    """Coordinates ``[T, 2]`` of the nearest points of the plane; the directions need not be orthogonal."""
    return torch.linalg.solve(basis @ basis.T, basis @ points.T).T


def _limits(placed: Sequence[Tensor], span: float | None, kind: str) -> list[tuple[float, float]]:
    """Lowest and highest coordinate of each axis: the paths and the centre with a margin, or the span."""
    if span is not None or not placed:
        half = span if span is not None else 1.0
        return [(-half, half)] * 2
    points = torch.cat([*placed, torch.zeros(1, 2, dtype=torch.float64)])
    low, high = points.amin(0), points.amax(0)
    margin = 0.25 * (high - low).clamp(min=0.2 * float((high - low).max()), max=None)
    if float(margin.max()) == 0:
        margin = torch.ones(2, dtype=torch.float64)
    return [(float(a), float(b)) for a, b in zip(low - margin, high + margin, strict=True)]


def _shares(paths: Sequence[Tensor], basis: Tensor) -> tuple[float, float]:
    """Variance of all points along each direction over their total variance."""
    if not paths:
        return float("nan"), float("nan")
    points = torch.cat(list(paths))
    apart = points - points.mean(0)
    total = float(apart.square().sum())
    unit = basis / torch.linalg.vector_norm(basis, dim=1, keepdim=True)
    along = (apart @ unit.T).square().sum(0) / total if total > 0 else torch.full((2,), torch.nan)
    return float(along[0]), float(along[1])
