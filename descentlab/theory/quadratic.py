"""SGD on a quadratic, in closed form: moments at every step, the stationary covariance, the largest stable rate.

Setting: loss 1/2 (theta - theta*)^T H (theta - theta*), gradient H (theta - theta*) + noise, the noise independent from
step to step with mean 0 and covariance C. With e = theta - theta* one step is e' = (1 - lr H) e - lr noise.
"""

from __future__ import annotations

import math

import numpy as np


def sgd_moments(
    hessian: np.ndarray, noise: np.ndarray, lr: float, steps: int, mean: np.ndarray, covariance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``[steps + 1, D]`` and covariance ``[steps + 1, D, D]`` of theta - theta* after 0, 1, … ``steps`` updates.

    ``hessian`` ``[D, D]``, ``noise`` ``[D, D]``: covariance of one gradient; ``mean`` ``[D]`` and ``covariance``
    ``[D, D]``: of the start. Exact for independent noise of any distribution.
    """
    contraction = np.eye(len(hessian)) - lr * hessian
    means, covariances = [np.asarray(mean, dtype=float)], [np.asarray(covariance, dtype=float)]
    for _ in range(steps):
        means.append(contraction @ means[-1])
        covariances.append(contraction @ covariances[-1] @ contraction.T + lr**2 * noise)
    return np.stack(means), np.stack(covariances)


def stationary_covariance(hessian: np.ndarray, noise: np.ndarray, lr: float) -> np.ndarray:
    """The covariance ``[D, D]`` that a step leaves as it is: S = (1 - lr H) S (1 - lr H) + lr^2 C.

    ``hessian`` symmetric and positive definite. ValueError where no such covariance exists: lr not in (0, 2 / lambda).
    """
    values, vectors = np.linalg.eigh(hessian)
    if values[0] <= 0 or not 0 < lr < stability_limit(float(values[-1])):
        raise ValueError(f"lr = {lr}: expected 0 < lr < 2 / {values[-1]:g} and a positive definite Hessian")
    factor = 1.0 - lr * values
    inside = vectors.T @ noise @ vectors
    return vectors @ (lr**2 * inside / (1.0 - np.outer(factor, factor))) @ vectors.T


def batch_noise(per_sample: np.ndarray, batch_size: int, *, population: int | None = None) -> np.ndarray:
    """Covariance of a batch's mean gradient from that of single samples ``[D, D]`` (divided by n, not n - 1).

    With ``population`` the batch is drawn without replacement from that many samples: factor (n - B) / (n - 1).
    Batches of one epoch are then also correlated with each other, which :func:`sgd_moments` does not know.
    """
    correction = 1.0 if population is None else (population - batch_size) / (population - 1)
    return per_sample * correction / batch_size


def stability_limit(curvature: float, staleness: int = 0) -> float:
    """The learning rate above which gradient descent diverges along a direction of that ``curvature`` (> 0).

    2 / lambda; with gradients ``staleness`` updates old 2 sin(pi / (2 (2 staleness + 1))) / lambda, where a root of
    z^(s+1) = z^s - lr lambda reaches the unit circle.
    """
    return 2.0 * math.sin(math.pi / (2 * (2 * staleness + 1))) / curvature
