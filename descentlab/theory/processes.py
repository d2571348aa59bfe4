"""What kind of process a cloud of runs is: memory, irreversibility, temperature, roughness, tails. No torch.

Series are ``[R, T]`` or ``[R, T, D]``: runs first, then time. Runs are independent, moments in time are not; therefore
intervals come from the spread over runs, by Student's t on one value per run. ValueError for fewer than two runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from .intervals import Interval, jackknife, over_replicates, variance_interval


def autocovariance(series: np.ndarray, lags: Sequence[int], level: float = 0.95) -> Interval:
    """c_k = mean_t x_t x_(t+k) of stationary ``series`` ``[R, T]`` whose mean over runs and time is taken off ``[K]``.

    For x' = a x + noise of variance s^2: c_k = a^|k| s^2 / (1 - a^2); in a Hessian direction a = 1 - lr lambda.
    """
    x = np.asarray(series, dtype=float)
    x = x - x.mean()
    each = np.stack([(x[:, : x.shape[1] - k] * x[:, k:]).mean(1) for k in lags], axis=1)
    return over_replicates(each, level)


def probability_current(series: np.ndarray, level: float = 0.95) -> Interval:
    """The rotation of a stationary cloud ``[R, T, D]`` per step: antisymmetric ``[D, D]`` with entries
    (E[x_i(t) x_j(t+1)] - E[x_j(t) x_i(t+1)]) / 2, the area swept in the plane (i, j).

    Zero if and only if a linear process obeys detailed balance. For x' = M x + noise with stationary covariance C it is
    (C M^T - M C) / 2: for SGD (M = 1 - lr H) the part of lr [H, C] that does not vanish where noise and curvature do
    not commute. (Zia and Schmittmann, J. Stat. Mech. 2007, P07012; Battle et al., Science 352, 2016.)
    """
    x = np.asarray(series, dtype=float)
    x = x - x.mean((0, 1))
    ahead = np.einsum("rti,rtj->rij", x[:, :-1], x[:, 1:]) / (x.shape[1] - 1)
    return over_replicates((ahead - ahead.transpose(0, 2, 1)) / 2, level)


def effective_temperature(
    variances: np.ndarray, curvatures: np.ndarray, runs: int, lr: float = 0.0, level: float = 0.95
) -> Interval:
    """T_i = lambda_i V_i (1 - lr lambda_i / 2), the temperature at which direction i would have the variance V_i.

    One number for all directions is equipartition: Ornstein-Uhlenbeck noise of covariance 2 T gives V_i = T / lambda_i;
    the factor, 1 for ``lr`` = 0, takes the discrete step out (V_i = lr S_ii / (lambda_i (2 - lr lambda_i)) has T_i =
    lr S_ii / 2). Ends by chi-square for variances over ``runs`` Gaussian runs. For lambda_i > 0 only.
    """
    curvatures = np.asarray(curvatures, dtype=float)
    if (curvatures <= 0).any():
        raise ValueError("curvatures: expected positive ones")
    factor = curvatures * (1 - lr * curvatures / 2)
    return Interval(*(factor * part for part in variance_interval(variances, runs, level)))


def hurst(series: np.ndarray, lags: Sequence[int] = (1, 2, 4, 8, 16), level: float = 0.95) -> Interval:
    """The Hurst exponent of paths ``[R, T]`` with stationary increments: E (x_(t+k) - x_t)^2 = c k^(2H).

    Half the slope of the logarithm of the mean-square increment against log k, over runs by
    :func:`.intervals.jackknife`, which takes the bias of the logarithm out. 1/2 is diffusion, above it increments
    persist, below it they revert (Mandelbrot and Van Ness, SIAM Review 10, 1968). ValueError where the path is shorter
    than twice the largest lag.
    """
    x = np.asarray(series, dtype=float)
    if x.shape[1] < 2 * max(lags):
        raise ValueError(f"{x.shape[1]} points: expected at least twice the largest lag {max(lags)}")
    squares = np.stack([((x[:, k:] - x[:, :-k]) ** 2).mean(1) for k in lags], axis=1)
    at = np.log(np.asarray(lags, dtype=float))
    weights = (at - at.mean()) / ((at - at.mean()) ** 2).sum()
    return jackknife(squares, lambda mean: np.log(mean) @ weights / 2, level)


POINTS = np.pi * np.arange(1, 11) / 25  # where the characteristic function is looked at, in units of 1 / scale


def tail_index(samples: np.ndarray, level: float = 0.95) -> Interval:
    """The index alpha of a stable law from independent ``samples`` ``[n]``; 2 is Gaussian, less means heavy tails.

    |phi(t)| = exp(-|sigma t|^alpha) whatever location and skewness, so alpha is the slope of log(-log |phi|^2) against
    log t (Koutrouvelis, J. Amer. Stat. Assoc. 75, 1980); |phi|^2 without its bias, (n |phi_n|^2 - 1) / (n - 1), at ten
    points in units of the quartile range. The interval is that of the regression's influence function, cut at 2. Other
    heavy-tailed laws have no such line; see :func:`stable_misfit`. ValueError for fewer than 50 samples.
    """
    slope, error, _ = _regression(samples)
    half = special.ndtri((1 + level) / 2) * error
    return Interval(*np.minimum([slope, slope - half, slope + half], 2.0))


def stable_misfit(samples: np.ndarray) -> float:
    """P-value of a straight line in :func:`tail_index`: small where the law is not stable (Student's t, say)."""
    return _regression(samples)[2]


def _regression(samples: np.ndarray) -> tuple[float, float, float]:
    """(slope, its standard error, p-value of the quadratic term)."""
    x = np.asarray(samples, dtype=float).ravel()
    n = len(x)
    if n < 50:
        raise ValueError(f"{n} samples: expected at least 50")
    low, middle, high = np.quantile(x, [0.25, 0.5, 0.75])
    if high <= low:
        raise ValueError("samples: expected values of which less than half are equal")
    scaled = np.outer((x - middle) / ((high - low) / 1.654), POINTS)
    cosine, sine = np.cos(scaled), np.sin(scaled)
    real, imaginary = cosine.mean(0), sine.mean(0)
    power = (n * (real**2 + imaginary**2) - 1) / (n - 1)
    at = np.log(POINTS)
    basis = np.stack([np.ones_like(at), at, (at - at.mean()) ** 2], axis=1)
    line, curve = np.linalg.pinv(basis[:, :2])[1], np.linalg.pinv(basis)[2]
    heights = np.log(-np.log(power))
    influence = 2 * (real * cosine + imaginary * sine) / (power * np.log(power))
    slope = float(line @ heights)
    error = float((influence @ line).std(ddof=1)) / math.sqrt(n)
    bend, bend_error = float(curve @ heights), float((influence @ curve).std(ddof=1)) / math.sqrt(n)
    return slope, error, float(2 * special.ndtr(-abs(bend) / bend_error))
