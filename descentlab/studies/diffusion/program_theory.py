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
from .program_curvature import dense_hessian, pieces, set_weights
from .program_pull import Pull
from .spec import DiffusionSpec

CHUNK_BYTES = 2**27  # single-sample gradients held at once


def predict(
    cell: DiffusionSpec,
    curvature: dict[str, np.ndarray],
    module: nn.Module,
    work: Any,
    pull: Pull,
    times: Sequence[int],
    snapshots: Sequence[int],
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """``Vhat`` ``[D, D]`` after the last of ``snapshots`` and ``Vhat_T`` after the others; ``times`` ``[L]`` with the
    variances along the eigenvectors ``variances`` ``[L, D]``; the same of plain linear theory as ``linear_…``, and of
    independent batches, which the bridge is compared with, as ``independent_variances``. Empty for an optimizer that
    has no theory here."""
    if cell.optimizer.name != "sgd" or getattr(cell.optimizer, "dampening", 0):
        return {"theory": np.array("none")}
    linear = _Linear(cell, curvature, len(work.data.x_train))
    found = {"times": np.array(times), "variances": np.stack([linear.variances(t) for t in times])}
    found |= _named(linear.covariance, snapshots)
    if linear.bridge:
        found["independent_variances"] = np.stack([linear.variances(t, bridge=False) for t in times])
    if cell.theory.closure == "linear" or linear.heavy or linear.bridge:
        return {**found, "theory": np.array(linear.name)}
    average, vectors = CloudAverages(cell, module, work, pull, curvature, advance), curvature["eigenvectors"]
    at, lr, own = sorted({*times, *snapshots}), float(cell.optimizer.lr), cell.theory
    along, kept = {}, {}
    for t, _, v in gaussian_closure(average, average.n, lr, at, batch_size=cell.batch_size, intervals=own.intervals):
        along[t] = ((vectors.T @ v) * vectors.T).sum(1)
        if t in snapshots:
            kept[t] = v
    better = {"times": np.array(times), "variances": np.stack([along[t] for t in times])}
    better |= _named(kept.__getitem__, snapshots)
    return {**better, **{f"linear_{k}": v for k, v in found.items()}, "theory": np.array("gaussian closure")}


def _named(at: Callable[[int], np.ndarray], snapshots: Sequence[int]) -> dict[str, np.ndarray]:
    last = max(snapshots)
    return {"Vhat" if t == last else f"Vhat_{t}": at(t) for t in snapshots}


class _Linear:
    """Curvature and noise as they are at theta*."""

    def __init__(self, cell: DiffusionSpec, curvature: dict[str, np.ndarray], samples: int) -> None:
        self.batch, self.lr, self.optimizer = cell.batch_size, float(cell.optimizer.lr), cell.optimizer
        self.hessian, self.noise, self.values = (curvature[k] for k in ("hessian", "covariance", "eigenvalues"))
        vectors = curvature["eigenvectors"]
        self.along = ((vectors.T @ self.noise) * vectors.T).sum(1)
        self.heavy = bool(getattr(cell.optimizer, "momentum", 0) or getattr(cell.optimizer, "weight_decay", 0))
        self.bridge = cell.sampler.name == "shuffle" and not self.heavy
        drawn = ", batches taken as independent" if cell.sampler.name == "shuffle" else ""
        self.name = f"linear, momentum{drawn}" if self.heavy else "bridge" if self.bridge else "linear"
        self.sizes = {"batch_size": cell.batch_size, "population": samples}

    def covariance(self, t: int) -> np.ndarray:
        """``[D, D]`` after ``t`` updates."""
        if self.heavy:
            return diffusion.momentum_covariance(self.hessian, self.noise / self.batch, self.lr, t, **self._momentum())
        if self.bridge:
            return diffusion.bridge_covariance(self.hessian, self.noise, self.lr, t, **self.sizes)
        return diffusion.finite_time_covariance(self.hessian, self.noise / self.batch, self.lr, t)

    def variances(self, t: int, bridge: bool = True) -> np.ndarray:
        """Along the Hessian's eigenvectors ``[D]``; without ``bridge`` as if batches were drawn with replacement."""
        if self.heavy:
            noise = self.along / self.batch
            return diffusion.momentum_variances(self.values, noise, self.lr, t, **self._momentum())
        if self.bridge and bridge:
            return diffusion.bridge_variances(self.values, self.along, self.lr, t, **self.sizes)
        return diffusion.finite_time_variances(self.values, self.along / self.batch, self.lr, t)

    def _momentum(self) -> dict[str, Any]:
        o: Any = self.optimizer
        return {"momentum": o.momentum, "weight_decay": o.weight_decay, "nesterov": o.nesterov}


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
        pull: Pull,
        curvature: dict[str, np.ndarray],
        advance: Callable[[int], None],
    ) -> None:
        self.own, self.module, self.work, self.advance = cell.theory, module.double(), work, advance
        self.pull = pull
        self.theta = torch.cat([p.detach().flatten() for p in module.parameters()]).double().numpy(force=True)
        self.n, self.streams, self.calls = len(self.theta), Streams(cell.seed), 0
        self.x, self.y = (t.double() if t.is_floating_point() else t for t in (work.data.x_train, work.data.y_train))
        self.centre, self.parts = curvature, pieces(self.module, (self.x, self.y))

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
                total += dense_hessian(self.module, self.work.loss, self.parts)
                self.advance(0)
        return self.pull.added(total / (2 * pairs))

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
        cut = np.split(theta, np.cumsum([p.numel() for p in params.values()])[:-1], axis=1)
        stacked = {
            name: torch.from_numpy(np.ascontiguousarray(piece)).reshape(len(theta), *p.shape).to(self.x.device)
            for (name, p), piece in zip(params.items(), cut, strict=True)
        }

        def one(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
            return self.work.vectorised_loss(functional_call(self.module, p, (a.unsqueeze(0),)), b.unsqueeze(0))

        found = vmap(grad(one))(stacked, self.x[part], self.y[part])
        slopes = torch.cat([found[name].reshape(len(theta), -1) for name in params], dim=1).numpy(force=True)
        return slopes + self.pull.gradient(theta) if self.pull.gamma else slopes
