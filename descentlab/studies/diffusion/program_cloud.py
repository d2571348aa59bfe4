"""What is kept of a cloud while it runs: moments in the Hessian's eigendirections, coordinates, chosen snapshots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.tree import Tree


class Looks:
    """The displacements of M runs from ``theta`` ``[D]`` at chosen ``times``.

    At each time: how many runs are finite, mean and sum of squared deviations (M2) along every eigenvector ``[D]``, and
    the coordinates of every run along the ``picked`` ones. At ``snapshots``: all weights ``[M, D]``; at the last time
    also the buffers. From ``series`` updates before the last time on, the coordinates along the ``picked`` ones are
    kept at every step. Nothing grows with the number of steps.
    """

    def __init__(
        self,
        times: Sequence[int],
        snapshots: Sequence[int],
        theta: np.ndarray,
        vectors: np.ndarray,
        picked: np.ndarray,
        held: Tree,
        series: int = 0,
    ) -> None:
        self.due, self.snapshots, self.last = frozenset(times), frozenset(snapshots), max(times)
        self.dense = range(max(0, self.last - series) if series else self.last + 1, self.last + 1)
        self.theta, self.vectors, self.picked = theta, vectors, picked
        self._kept: dict[str, dict[int, np.ndarray]] = {}
        for key, value in held.items():
            name, _, step = key.rpartition("@")
            self._kept.setdefault(name, {})[int(step)] = value.numpy()

    def wants(self, step: int) -> bool:
        """Whether anything is recorded after ``step`` updates."""
        return step in self.due or step in self.dense

    def look(self, step: int, theta: np.ndarray, buffers: Mapping[str, Tensor]) -> None:
        """``theta`` ``[M, D]`` after ``step`` updates."""
        if step in self.dense:
            self._keep("series", step, (theta - self.theta) @ self.vectors[:, self.picked])
        if step not in self.due:
            return
        alive = np.isfinite(theta).all(axis=1)
        inside = (theta - self.theta) @ self.vectors
        rows = inside[alive]
        mean = rows.mean(0) if len(rows) else np.full(len(self.theta), np.nan)
        self._keep("n", step, np.array(len(rows)))
        self._keep("mean", step, mean)
        self._keep("m2", step, ((rows - mean) ** 2).sum(0))
        self._keep("projections", step, inside[:, self.picked])
        self._keep("alive", step, alive)
        if step in self.snapshots:
            self._keep("snapshots", step, theta.copy())
        if step == self.last:
            for name, buffer in buffers.items():
                self._keep(f"buffer/{name}", step, buffer.detach().cpu().numpy().copy())

    def _keep(self, name: str, step: int, value: np.ndarray) -> None:
        self._kept.setdefault(name, {})[step] = value

    def held(self) -> Tree:
        """What a checkpoint has to hold."""
        return {
            f"{name}@{step}": torch.from_numpy(np.asarray(value))
            for name, kept in self._kept.items()
            for step, value in kept.items()
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """For one .npz: ``steps`` ``[L]``, ``n`` ``[L]``, ``mean`` and ``m2`` ``[L, D]``, ``projections`` ``[L, M, k]``
        along ``directions`` ``[k]``, ``series`` ``[T, M, k]`` along them at the successive ``series_steps``,
        ``snapshots`` ``[S, M, D]`` at ``snapshot_steps``, ``buffer/NAME`` ``[M, …]``."""
        out = {"steps": np.array(sorted(self.due)), "directions": self.picked}
        out["series_steps"] = np.array(sorted(self._kept.get("series", {})), dtype=np.int64)
        out["snapshot_steps"] = np.array(sorted(self._kept.get("snapshots", {})))
        for name, kept in self._kept.items():
            ordered = [kept[step] for step in sorted(kept)]
            out[name] = ordered[0] if name.startswith("buffer/") else np.stack(ordered)
        return out

    def lost(self, runs: Sequence[str]) -> dict[str, int]:
        """Run -> the first look at which its weights are not finite."""
        found: dict[str, int] = {}
        for step, alive in sorted(self._kept.get("alive", {}).items()):
            for m in np.flatnonzero(~alive).tolist():
                found.setdefault(runs[m], step)
        return found


def open_weights(path: Path, steps: int, members: int, theta: np.ndarray, begun: bool) -> np.ndarray:
    """A memory-mapped array ``[M, steps + 1, D]`` of every weight of every run, theta* first; taken up again where the
    stage has ``begun``."""
    from numpy.lib.format import open_memmap

    if begun and path.is_file():
        return open_memmap(path, mode="r+")
    path.parent.mkdir(parents=True, exist_ok=True)
    made: Any = open_memmap(path, mode="w+", dtype=np.float64, shape=(members, steps + 1, len(theta)))
    made[:, 0] = theta
    return made
