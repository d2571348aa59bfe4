"""Curvature for the diffusion study: of all data at one point, and of batches along a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.footprint import footprint
from ...core.tree import Tree
from ...observe.curvature import hessian, top_k
from ...observe.layered import recognise
from ...observe.spectrum import spectral_density
from .spec import HessianRun

ELEMENTS = 2**27  # numbers kept for the rows of a Hessian at once by the general route: 1 GB
Loss = Callable[[Any, Any], Tensor]


def set_weights(module: nn.Module, theta: np.ndarray) -> None:
    """Write the weights ``[D]`` into the module, all parameters in their order."""
    params = list(module.parameters())
    with torch.no_grad():
        for p, piece in zip(params, np.split(theta, np.cumsum([p.numel() for p in params])[:-1]), strict=True):
            p.copy_(torch.from_numpy(np.ascontiguousarray(piece.reshape(p.shape))))


def dense_hessian(module: nn.Module, loss: Loss, data: tuple[Tensor, Tensor]) -> np.ndarray:
    """The Hessian ``[D, D]`` of the mean loss over ``data``, float64, of a model whose samples do not mix.

    A plain network takes all samples at once; any other so many that what is kept for all rows fits into memory.
    """
    x, y = data
    if recognise(module) is not None:
        return hessian(module, loss, (x, y)).numpy(force=True)
    rows = sum(p.numel() for p in module.parameters())
    at_once = max(1, ELEMENTS // (rows * max(1, footprint(module, x).kept)))
    parts = [(x[i : i + at_once], y[i : i + at_once]) for i in range(0, len(x), at_once)]
    return hessian(module, loss, parts).numpy(force=True)


class CurvatureAlong:
    """Eigenvalues along a run, as its settings ask; ``held`` as a checkpoint has kept it."""

    def __init__(self, own: HessianRun, module: nn.Module, work: Any, held: Tree) -> None:
        self.own, self.module, self.work = own, module, work
        self._kept: dict[str, dict[int, np.ndarray]] = {}
        self._sum: np.ndarray | None = None
        for key, value in held.items():
            if key == "sum":
                self._sum = value.numpy()
                continue
            name, _, step = key.rpartition("@")
            self._kept.setdefault(name, {})[int(step)] = value.numpy()

    def look(self, step: int, theta: np.ndarray, buffers: Mapping[str, Tensor], index: np.ndarray) -> None:
        """Measure at the weights before update ``step``, whose batch is ``index`` ``[B]``."""
        set_weights(self.module, theta)
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])
        x, y = self.work.data.x_train, self.work.data.y_train
        data = (x[torch.from_numpy(index)], y[torch.from_numpy(index)]) if self.own.data == "batch" else (x, y)
        found = self._measure(data)
        for name, value in found.items():
            self._kept.setdefault(name, {})[step] = value

    def _measure(self, data: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
        k = self.own.k
        if self.own.method == "top_k":
            top = top_k(self.module, self.work.loss, data, k)
            return {"eigenvalues": top.values.numpy(force=True), "vectors": top.vectors.numpy(force=True)}
        if self.own.method == "density":
            found = spectral_density(self.module, self.work.loss, data)
            return {"nodes": found.nodes.numpy(force=True), "weights": found.weights.numpy(force=True)}
        matrix = dense_hessian(self.module, self.work.loss, data)
        self._sum = matrix if self._sum is None else self._sum + matrix
        values, vectors = np.linalg.eigh(matrix)
        return {"eigenvalues": values, "vectors": vectors[:, ::-1][:, :k]}

    def held(self) -> Tree:
        """What a checkpoint has to hold."""
        out = {
            f"{name}@{step}": torch.from_numpy(np.ascontiguousarray(value))
            for name, kept in self._kept.items()
            for step, value in kept.items()
        }
        return out if self._sum is None else {**out, "sum": torch.from_numpy(self._sum)}

    def arrays(self) -> dict[str, np.ndarray]:
        """For one .npz: ``steps`` ``[K]``, ``eigenvalues`` ``[K, …]``, ``vectors``, or ``nodes`` and ``weights``;
        ``mean_hessian`` ``[D, D]`` with its own eigenvalues where Hessians are dense."""
        steps = sorted(next(iter(self._kept.values())))
        out = {"steps": np.array(steps)}
        out |= {name: np.stack([kept[step] for step in steps]) for name, kept in self._kept.items()}
        if self._sum is not None:
            mean = self._sum / len(steps)
            out |= {"mean_hessian": mean, "mean_eigenvalues": np.linalg.eigvalsh(mean)}
        return out
