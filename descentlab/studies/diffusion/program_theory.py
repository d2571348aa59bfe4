"""What theory says of a cloud, from gradient, Hessian and noise at theta* and, with the closure, around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ...core.streams import Streams
from ...theory import diffusion
from ...theory.closure import Averages, gaussian_closure
from .program_curvature import dense_hessian, set_weights
from .spec import DiffusionSpec

CHUNK_BYTES = 2**27  # single-sample gradients held at once


def predict(
    cell: DiffusionSpec,
    curvature: dict[str, np.ndarray],
    module: nn.Module,
    work: Any,
    times: Sequence[int],
    snapshots: Sequence[int],
    samples: int,
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """``Vhat`` ``[D, D]`` after the last of ``snapshots`` and ``Vhat_T`` after the others; ``times`` ``[L]`` with the
    variances along the eigenvectors ``variances`` ``[L, D]``; the same of plain linear theory as ``linear_…``, and of
    independent batches, which the bridge is compared with, as ``independent_variances``. Empty for an optimizer that
    has no theory here."""
    if cell.optimizer.name != "sgd" or getattr(cell.optimizer, "dampening", 0):
        return {"theory": np.array("none")}
    linear = _Linear(cell, curvature, samples)
    if cell.theory.closure == "linear" or not linear.plain:
        found = _collected(linear.along(), times, snapshots, curvature)
        if linear.bridge:
            apart = _collected(linear.along(bridge=False), times, snapshots, curvature)
            found["independent_variances"] = apart["variances"]
        return {**found, "theory": np.array(linear.name)}
    found = _collected(linear.along(), times, snapshots, curvature)
    average = CloudAverages(cell, module, work, curvature, advance)
    at, lr = sorted({*times, *snapshots}), float(cell.optimizer.lr)
    own = cell.theory
    steps = gaussian_closure(average, average.n, lr, at, batch_size=cell.batch_size, intervals=own.intervals)
    closed = {t: v for t, _, v in steps}
    better = _collected(closed.__getitem__, times, snapshots, curvature)
    return {**better, **{f"linear_{k}": v for k, v in found.items()}, "theory": np.array("gaussian closure")}


def _collected(
    at: Callable[[int], np.ndarray], times: Sequence[int], snapshots: Sequence[int], curvature: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    vectors = curvature["eigenvectors"]
    along = np.stack([((vectors.T @ at(t)) * vectors.T).sum(1) for t in times])
    last = max(snapshots)
    named = {"Vhat" if t == last else f"Vhat_{t}": at(t) for t in snapshots}
    return {"times": np.array(times), "variances": along, **named}


class _Linear:
    """Curvature and noise as they are at theta*."""

    def __init__(self, cell: DiffusionSpec, curvature: dict[str, np.ndarray], samples: int) -> None:
        self.cell, self.samples = cell, samples
        self.hessian, self.noise = curvature["hessian"], curvature["covariance"]
        self.heavy = bool(getattr(cell.optimizer, "momentum", 0) or getattr(cell.optimizer, "weight_decay", 0))
        self.bridge = cell.sampler.name == "shuffle"
        self.plain = not (self.heavy or self.bridge)
        self.name = "linear, momentum" if self.heavy else "bridge" if self.bridge else "linear"

    def along(self, bridge: bool = True) -> Callable[[int], np.ndarray]:
        """Steps -> covariance; without ``bridge`` that of batches drawn with replacement, whatever the loader."""
        lr, batch = float(self.cell.optimizer.lr), self.cell.batch_size

        def at(t: int) -> np.ndarray:
            if self.heavy:
                o: Any = self.cell.optimizer
                kw = {"momentum": o.momentum, "weight_decay": o.weight_decay, "nesterov": o.nesterov}
                return diffusion.momentum_covariance(self.hessian, self.noise / batch, lr, t, **kw)
            if self.bridge and bridge:
                sizes = {"batch_size": batch, "population": self.samples}
                return diffusion.bridge_covariance(self.hessian, self.noise, lr, t, **sizes)
            return diffusion.finite_time_covariance(self.hessian, self.noise / batch, lr, t)

        return at


class CloudAverages:
    """Gradient, Hessian and noise averaged over theta* + m + d, d ~ N(0, V), of all training data.

    Every displacement comes with its mirror image, and only the difference from the centre is averaged, so what is
    odd in d cancels and the error is a small share of a small correction. Noise and gradient see another displacement
    for every sample (``theory.draws`` pairs), the Hessian the same for all (``theory.hessians`` pairs).
    """

    def __init__(
        self,
        cell: DiffusionSpec,
        module: nn.Module,
        work: Any,
        curvature: dict[str, np.ndarray],
        advance: Callable[[int], None],
    ) -> None:
        self.own, self.module, self.work, self.advance = cell.theory, module.double(), work, advance
        self.theta = torch.cat([p.detach().flatten() for p in module.parameters()]).double().numpy(force=True)
        self.n, self.streams, self.calls = len(self.theta), Streams(cell.seed), 0
        self.x, self.y = (t.double() if t.is_floating_point() else t for t in (work.data.x_train, work.data.y_train))
        self.centre = curvature

    def __call__(self, mean: np.ndarray, covariance: np.ndarray) -> Averages:
        """See :data:`~descentlab.theory.closure.Average`."""
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(values.clip(min=0.0))
        centre = self.theta + mean
        self.calls += 1
        self.generator = np.random.Generator(np.random.Philox(self.streams.torch_seed("closure", replicate=self.calls)))
        if values[-1] <= 0 and not mean.any():
            return Averages(self.centre["gradient"], self.centre["hessian"], self.centre["covariance"])
        matrix = self._hessian(centre, root)
        gradient, noise = self._noise(centre, root, matrix)
        return Averages(gradient, matrix, noise)

    def _hessian(self, centre: np.ndarray, root: np.ndarray) -> np.ndarray:
        pairs = self.own.hessians
        total = np.zeros_like(root)
        for _ in range(pairs):
            d = root @ self.generator.standard_normal(self.n)
            for point in (centre + d, centre - d):
                set_weights(self.module, point)
                total += dense_hessian(self.module, self.work.loss, (self.x, self.y))
                self.advance(0)
        return total / (2 * pairs)

    def _noise(self, centre: np.ndarray, root: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, pairs = len(self.x), self.own.draws
        rows = max(1, CHUNK_BYTES // (8 * self.n))
        gradient, second = np.zeros(self.n), np.zeros_like(root)
        moved, spread = np.zeros(self.n), np.zeros_like(root)
        for first in range(0, n, rows):
            part = slice(first, min(n, first + rows))
            middle = self._gradients(np.broadcast_to(centre, (part.stop - first, self.n)), part)
            gradient += middle.sum(0) / n
            second += middle.T @ middle / n
            for _ in range(pairs):
                d = self.generator.standard_normal((len(middle), self.n)) @ root.T
                push = d @ matrix  # what the displacement does to the mean gradient is no noise
                ahead, behind = self._gradients(centre + d, part), self._gradients(centre - d, part)
                moved += (0.5 * (ahead + behind) - middle).sum(0) / (n * pairs)
                ahead -= push
                behind += push
                spread += (0.5 * (ahead.T @ ahead + behind.T @ behind) - middle.T @ middle) / (n * pairs)
            self.advance(0)
        gradient = gradient + moved
        return gradient, second + spread - np.outer(gradient, gradient)

    def _gradients(self, theta: np.ndarray, part: slice) -> np.ndarray:
        """The gradient ``[R, D]`` of every sample of ``part`` at weights of its own ``[R, D]``."""
        params = dict(self.module.named_parameters())
        pieces = np.split(theta, np.cumsum([p.numel() for p in params.values()])[:-1], axis=1)
        stacked = {
            name: torch.from_numpy(np.ascontiguousarray(piece)).reshape(len(theta), *p.shape)
            for (name, p), piece in zip(params.items(), pieces, strict=True)
        }

        def one(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
            return self.work.vectorised_loss(functional_call(self.module, p, (a.unsqueeze(0),)), b.unsqueeze(0))

        found = vmap(grad(one))(stacked, self.x[part], self.y[part])
        return torch.cat([found[name].reshape(len(theta), -1) for name in params], dim=1).numpy(force=True)
