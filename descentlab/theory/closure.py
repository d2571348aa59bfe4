"""The covariance of an SGD cloud where curvature and noise change over the size of the cloud.

:mod:`.diffusion` takes gradient, Hessian and noise at the point all runs start from. A cloud that has spread sees
others: here they are averaged over a Gaussian with the predicted mean m and covariance V, again and again as it grows.
With g, H, C averaged over theta ~ N(theta0 + m, V), C the covariance of single-sample gradients given theta, one step
is

    m' = m - lr g        V' = (1 - lr H) V (1 - lr H) + lr^2 C / B.

By Stein's lemma E[d grad L(theta0 + m + d)^T] = V H, so this is exact for a Gaussian cloud up to terms of order
lr^2 V^2: multiplicative noise (every sample's own Hessian), third and fourth derivatives of the loss are all in it.
What it leaves out is that the cloud is not quite Gaussian. No constant is fitted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .diffusion import _geometric


class Averages(NamedTuple):
    """Over the cloud: ``gradient`` ``[D]``, ``hessian`` ``[D, D]``, ``noise`` ``[D, D]``, the covariance of
    single-sample gradients given the weights."""

    gradient: np.ndarray
    hessian: np.ndarray
    noise: np.ndarray


Average = Callable[[np.ndarray, np.ndarray], Averages]  # (mean displacement, covariance) -> averages there


class _Stretch:
    """``steps`` -> mean and covariance after so many updates with fixed averages, from ``mean`` and ``covariance``."""

    def __init__(self, over: Averages, mean: np.ndarray, covariance: np.ndarray, lr: float, batch_size: int) -> None:
        values, self.vectors = np.linalg.eigh(over.hessian)
        self.a, self.lr, self.mean = 1.0 - lr * values, lr, mean
        self.pairs = np.outer(self.a, self.a)
        self.slope = self.vectors.T @ over.gradient
        self.start = self.vectors.T @ covariance @ self.vectors
        self.noise = lr**2 / batch_size * (self.vectors.T @ over.noise @ self.vectors)

    def after(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        mean = self.mean - self.lr * self.vectors @ (_geometric(self.a, steps) * self.slope)
        inside = self.start * self.pairs**steps + self.noise * _geometric(self.pairs, steps)
        covariance = self.vectors @ inside @ self.vectors.T
        return mean, (covariance + covariance.T) / 2


def gaussian_closure(
    average: Average, dimension: int, lr: float, at: Sequence[int], *, batch_size: int, intervals: int = 4
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(steps, mean displacement ``[D]``, covariance ``[D, D]``) for each of the rising numbers of steps ``at``.

    Time is cut into ``intervals``; in each the averages are those of the cloud predicted for its middle (the midpoint
    rule: the error falls with the square of the interval). ``average`` is called ``intervals`` + 1 times.
    """
    mean, covariance = np.zeros(dimension), np.zeros((dimension, dimension))
    edges = np.unique(np.linspace(0, max(at), intervals + 1).round().astype(int))
    now = average(mean, covariance)
    for first, last in itertools.pairwise(edges.tolist()):
        half = (last - first) // 2
        middle, spread = _Stretch(now, mean, covariance, lr, batch_size).after(half)
        now = average(middle, spread)
        back = now.gradient - now.hessian @ (
            middle - mean
        )  # the averages are around the middle, the stretch begins before
        stretch = _Stretch(Averages(back, now.hessian, now.noise), mean, covariance, lr, batch_size)
        for t in at:
            if first < t <= last or (t == 0 and first == 0):
                yield (t, *stretch.after(t - first))
        mean, covariance = stretch.after(last - first)
        now = Averages(now.gradient + now.hessian @ (mean - middle), now.hessian, now.noise)
