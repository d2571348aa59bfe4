"""Curvature for the diffusion study: of all data at one point, and of batches along a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.footprint import footprint
from ...core.tree import Tree
from ...observe.curvature import ROWS, hessian, top_k
from ...observe.layered import recognise
from ...observe.spectrum import spectral_density
from .program_pull import Pull
from .spec import HessianRun

ELEMENTS = 2**23  # numbers kept for the rows of a Hessian at once by the general route
Loss = Callable[[Any, Any], Tensor]


def set_weights(module: nn.Module, theta: np.ndarray) -> None:
    """Write the weights ``[D]`` into the module, all parameters in their order."""
    params = list(module.parameters())
    with torch.no_grad():
        for p, piece in zip(params, np.split(theta, np.cumsum([p.numel() for p in params])[:-1]), strict=True):
            p.copy_(torch.from_numpy(np.ascontiguousarray(piece.reshape(p.shape))))


def pieces(module: nn.Module, data: tuple[Tensor, Tensor], rows: int = ROWS) -> list[tuple[Tensor, Tensor]]:
    """``data`` of a model whose samples do not mix, cut for derivatives: a plain network takes all samples at once, any
    other so many that what is kept for ``rows`` rows of a Hessian, or 1 gradient, stays small."""
    x, y = data
    if recognise(module) is not None:
        return [(x, y)]
    at_once = max(1, ELEMENTS // (rows * max(1, footprint(module, x).kept)))
    return [(x[i : i + at_once], y[i : i + at_once]) for i in range(0, len(x), at_once)]


def dense_hessian(module: nn.Module, loss: Loss, parts: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    """The Hessian ``[D, D]`` of the mean loss over all samples of the :func:`pieces`, float64."""
    return hessian(module, loss, parts if len(parts) > 1 else parts[0]).numpy(force=True)


class CurvatureAlong:
    """Eigenvalues along several runs, as the settings ask; ``held`` as a checkpoint has kept it."""

    def __init__(self, own: HessianRun, module: nn.Module, work: Any, pull: Pull, held: Tree) -> None:
        self.own, self.module, self.work, self.pull = own, module, work, pull
        self._kept: dict[str, dict[int, dict[int, np.ndarray]]] = {}  # name -> run -> step
        self._sums: dict[int, np.ndarray] = {}
        for key, value in held.items():
            name, run, step = key.split("@")
            if name == "sum":
                self._sums[int(run)] = value.numpy()
            else:
                self._keep(name, int(run), int(step), value.numpy())

    def _keep(self, name: str, run: int, step: int, value: np.ndarray) -> None:
        self._kept.setdefault(name, {}).setdefault(run, {})[step] = value

    def look(self, run: int, step: int, theta: np.ndarray, buffers: Mapping[str, Tensor], index: np.ndarray) -> None:
        """Measure at a run's weights before update ``step``, whose batch is ``index`` ``[B]``."""
        set_weights(self.module, theta)
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])
        x, y = self.work.data.x_train, self.work.data.y_train
        data = (x[torch.from_numpy(index)], y[torch.from_numpy(index)]) if self.own.data == "batch" else (x, y)
        for name, value in self._measure(run, data).items():
            self._keep(name, run, step, value)

    def _measure(self, run: int, data: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
        k = self.own.k
        if self.own.method == "top_k":
            top = top_k(self.module, self.work.loss, data, k)
            return {
                "eigenvalues": top.values.numpy(force=True) + self.pull.gamma,
                "vectors": top.vectors.numpy(force=True),
            }
        if self.own.method == "density":
            found = spectral_density(self.module, self.work.loss, data)
            return {
                "nodes": found.nodes.numpy(force=True) + self.pull.gamma,
                "weights": found.weights.numpy(force=True),
            }
        matrix = self.pull.added(dense_hessian(self.module, self.work.loss, pieces(self.module, data)))
        self._sums[run] = self._sums[run] + matrix if run in self._sums else matrix
        values, vectors = np.linalg.eigh(matrix)
        return {"eigenvalues": values, "vectors": vectors[:, ::-1][:, :k]}

    def held(self) -> Tree:
        """What a checkpoint has to hold."""
        out = {
            f"{name}@{run}@{step}": torch.from_numpy(np.ascontiguousarray(value))
            for name, runs in self._kept.items()
            for run, kept in runs.items()
            for step, value in kept.items()
        }
        return {**out, **{f"sum@{run}@0": torch.from_numpy(total) for run, total in self._sums.items()}}

    def arrays(self) -> dict[str, np.ndarray]:
        """For one .npz: ``steps`` ``[K]``; per run ``eigenvalues`` ``[R, K, ...]`` and ``vectors``, or ``nodes`` and
        ``weights``; where Hessians are dense ``mean_hessian`` ``[R, D, D]``, every run's mean over its steps. NaN where
        a run had diverged, and a mean of NaN for a run that did not reach the last of the steps."""
        steps = list(range(0, self.own.steps, self.own.every))
        out = {"steps": np.array(steps)}
        for name, runs in self._kept.items():
            missing = np.full_like(next(iter(next(iter(runs.values())).values())), np.nan)
            out[name] = np.stack([np.stack([runs[run].get(step, missing) for step in steps]) for run in sorted(runs)])
        if self._sums:
            seen = {run: len(kept) for run, kept in self._kept["eigenvalues"].items()}
            whole = {run: 1.0 if seen[run] == len(steps) else np.nan for run in self._sums}
            out["mean_hessian"] = np.stack([whole[run] * self._sums[run] / len(steps) for run in sorted(self._sums)])
        return out
