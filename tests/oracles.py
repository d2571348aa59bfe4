"""Short numpy versions of everything the engines combine, on the quadratic: loss = 1/2 |Theta A^T - Z|_F^2.

Written from the papers and torch's documentation, float64, one member, no import of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


def quadratic_gradient(
    theta: np.ndarray, a: np.ndarray, z: np.ndarray, fault: tuple[Sequence[int], float] | None = None
) -> np.ndarray:
    """(Theta A^T - mean_b Z_b) A; a fault replaces flat elements of Theta A^T, the backward pass stays as it was."""
    out = theta @ a.T
    if fault is not None:
        out = out.copy()
        out.flat[list(fault[0])] = fault[1]
    return (out - z.mean(0)) @ a


@dataclass
class Momentum:
    """v = mu v + g (v = g at first); theta -= lr v. mu = 0 is plain SGD."""

    mu: float = 0.0
    v: np.ndarray | None = None

    def step(self, theta: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        self.v = g if self.v is None else self.mu * self.v + g
        return theta - lr * self.v


@dataclass
class Adam:
    """arXiv 1412.6980, Algorithm 1."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    m: np.ndarray | float = 0.0
    v: np.ndarray | float = 0.0
    t: int = 0

    def step(self, theta: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m_hat, v_hat = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        return theta - lr * m_hat / (np.sqrt(v_hat) + self.eps)


def gram_schmidt(p: np.ndarray) -> np.ndarray:
    """Orthonormal columns, one after the other."""
    out = np.zeros_like(p)
    for j in range(p.shape[1]):
        column = p[:, j]
        for i in range(j):
            column = column - (out[:, i] @ column) * out[:, i]
        out[:, j] = column / np.sqrt(column @ column)
    return out


@dataclass
class LowRank:
    """PowerSGD with error feedback and warm start (arXiv 1905.13727, Algorithms 1 and 2) on one matrix."""

    q: np.ndarray
    residual: dict[int, np.ndarray] = field(default_factory=dict)
    ranks: Sequence[int] | None = None  # of each update; the columns of ``q`` are then those a growing rank brings in
    updates: int = 0
    columns: np.ndarray | None = None

    def average(self, grads: dict[int, np.ndarray]) -> np.ndarray:
        """``grads``: worker -> gradient ``[n, m]``."""
        if self.ranks is not None:
            self.columns = self.q if self.columns is None else self.columns
            held, rank = (0 if self.updates == 0 else self.q.shape[1]), self.ranks[self.updates]
            self.q = np.concatenate([self.q[:, : min(held, rank)], self.columns[:, held:rank]], axis=1)
        self.updates += 1
        inputs = {w: g + self.residual.get(w, 0.0) for w, g in grads.items()}
        p = gram_schmidt(np.mean([x @ self.q for x in inputs.values()], axis=0))
        self.q = np.mean([x.T @ p for x in inputs.values()], axis=0)
        approximation = p @ self.q.T
        self.residual |= {w: x - approximation for w, x in inputs.items()}
        return approximation


def train(
    theta: np.ndarray,
    a: np.ndarray,
    batch: Callable[[int, int], np.ndarray],
    updates: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    rule: Momentum | Adam,
    lr: Callable[[int], float],
    faults: dict[tuple[int, int], tuple[Sequence[int], float]] | None = None,
    low_rank: LowRank | None = None,
    over_staleness: bool = False,
    event: Callable[[int, int | None, np.ndarray], np.ndarray] = lambda t, worker, g: g,
) -> list[np.ndarray]:
    """Theta after 0, 1, … updates.

    ``updates[t]`` = (workers, versions read); ``batch(w, i)``: targets of worker w's i-th batch; ``faults``: (update,
    worker) -> (flat elements, value); ``over_staleness``: a gradient tau > 1 updates old is divided by tau.
    ``event``: what becomes of a worker's gradient, and (worker None) of the averaged one just before update t.
    """
    versions, drawn = [theta], dict.fromkeys((w for workers, _ in updates for w in workers), 0)
    for t, (workers, read) in enumerate(updates):
        grads = {}
        for w, version in zip(workers, read, strict=True):
            z = batch(w, drawn[w])
            grads[w] = quadratic_gradient(versions[version], a, z, (faults or {}).get((t, w)))
            grads[w] = event(t, w, grads[w])
            if over_staleness and t - version > 1:
                grads[w] = grads[w] / (t - version)
            drawn[w] += 1
        mean = low_rank.average(grads) if low_rank else np.mean(list(grads.values()), axis=0)
        versions.append(rule.step(versions[-1], event(t, None, mean), lr(t)))
    return versions
