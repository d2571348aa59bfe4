"""How sure a measured covariance is: intervals over replicates and runs, and tests of its Gaussianity. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special  # scipy.stats takes a second to import, in every worker


class Interval(NamedTuple):
    """``value`` with the ends of its interval; numbers or arrays of one shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def over_replicates(values: np.ndarray, level: float = 0.95) -> Interval:
    """Mean over replicates ``[R, …]`` with Student's interval m -+ t_(R-1) s / sqrt(R), entry by entry.

    For quantities that every replicate gives by itself, for instance the sorted eigenvalues of its Hessian. ValueError
    for fewer than two replicates.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"{len(values)} replicates: expected at least 2")
    mean = values.mean(0)
    half = special.stdtrit(len(values) - 1, (1 + level) / 2) * values.std(0, ddof=1) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def student_p(values: np.ndarray) -> np.ndarray:
    """Two-sided p ``[m]`` of Student's test that the mean over rows ``[n, m]`` is zero; NaN where all are zero."""
    n = len(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = values.mean(0) / (values.std(0, ddof=1) / math.sqrt(n))
    return np.asarray(2 * special.stdtr(n - 1, -np.abs(t)))


def jackknife(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], level: float = 0.95) -> Interval:
    """A smooth ``statistic`` of the mean over replicates ``[R, …]``, by leaving out one replicate at a time.

    With theta_(r) the statistic without replicate r and their mean theta_(.): value = R theta - (R - 1) theta_(.),
    variance = (R - 1) / R sum_r (theta_(r) - theta_(.))^2, ends by Student's t (Efron and Stein, Ann. Stat. 9,
    1981). ValueError for fewer than three replicates.
    """
    values = np.asarray(values, dtype=float)
    r = len(values)
    if r < 3:
        raise ValueError(f"{r} replicates: expected at least 3")
    whole = values.mean(0)
    left = np.stack([statistic((r * whole - v) / (r - 1)) for v in values])
    value = r * np.asarray(statistic(whole)) - (r - 1) * left.mean(0)
    half = special.stdtrit(r - 1, (1 + level) / 2) * np.sqrt((r - 1) / r * ((left - left.mean(0)) ** 2).sum(0))
    return Interval(value, value - half, value + half)


def eigenvalues_of_mean(matrices: np.ndarray, level: float = 0.95) -> Interval:
    """Eigenvalues (ascending) of the mean of symmetric ``matrices`` ``[R, n, n]``, one per replicate or group, by
    :func:`jackknife`. Valid where eigenvalues lie further apart than their errors."""
    return jackknife(matrices, np.linalg.eigvalsh, level)


def variance_interval(variance: np.ndarray, runs: int, level: float = 0.95) -> Interval:
    """True variance behind one measured over ``runs`` Gaussian runs: (n - 1) V / chi2_(n-1) at both tails.

    The Monte Carlo error bar of a cloud's variance in any direction; its relative size is about sqrt(2 / (n - 1)).
    """
    variance = np.asarray(variance, dtype=float)
    low, high = (2 * special.gammaincinv((runs - 1) / 2, p) for p in ((1 - level) / 2, (1 + level) / 2))
    return Interval(variance, (runs - 1) * variance / high, (runs - 1) * variance / low)


def ratio_band(runs: int, level: float = 0.95) -> tuple[float, float]:
    """Where a measured variance over its true value lies with probability ``level``: chi2_(n-1) / (n - 1)."""
    low, high = (2 * special.gammaincinv((runs - 1) / 2, p) / (runs - 1) for p in ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """P-values adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979): sorted ascending,
    max over j <= i of (m - j) p_(j) with j from 0, at most 1."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    scaled = (len(p) - np.arange(len(p))) * p[order]
    out = np.empty(len(p))
    out[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return out


def henze_zirkler(samples: np.ndarray) -> tuple[float, float]:
    """(statistic, p-value) of the test that ``samples`` ``[n, d]`` are multivariate Gaussian; consistent against every
    alternative (Henze and Zirkler, Communications in Statistics: Theory and Methods 19, 1990).

    With squared Mahalanobis distances D_ij, D_i to the mean (covariance divided by n) and
    b = (n (2 d + 1) / 4)^(1 / (d + 4)) / sqrt(2): T = n [mean_ij e^(-b^2 D_ij / 2) - 2 (1 + b^2)^(-d/2) mean_i
    e^(-b^2 D_i / (2 (1 + b^2))) + (1 + 2 b^2)^(-d/2)], compared with the log-normal law of its first two moments.
    ValueError where the covariance is singular.
    """
    x = np.asarray(samples, dtype=float)
    n, d = x.shape
    apart = x - x.mean(0)
    covariance = apart.T @ apart / n
    if np.linalg.matrix_rank(covariance) < d:
        raise ValueError(f"{n} samples of {d} dimensions: expected a covariance of full rank")
    white = np.linalg.solve(np.linalg.cholesky(covariance), apart.T).T
    own = (white**2).sum(1)
    between = np.maximum(own[:, None] + own - 2 * white @ white.T, 0.0)
    b2 = ((n * (2 * d + 1) / 4) ** (1 / (d + 4))) ** 2 / 2
    pairs = np.exp(-b2 / 2 * between).mean()
    single = (1 + b2) ** (-d / 2) * np.exp(-b2 / (2 * (1 + b2)) * own).mean()
    statistic = n * (pairs - 2 * single + (1 + 2 * b2) ** (-d / 2))
    a, w = 1 + 2 * b2, (1 + b2) * (1 + 3 * b2)
    mean = 1 - a ** (-d / 2) * (1 + d * b2 / a + d * (d + 2) * b2**2 / (2 * a**2))
    variance = (
        2 * (1 + 4 * b2) ** (-d / 2)
        + 2 * a**-d * (1 + 2 * d * b2**2 / a**2 + 3 * d * (d + 2) * b2**4 / (4 * a**4))
        - 4 * w ** (-d / 2) * (1 + 3 * d * b2**2 / (2 * w) + d * (d + 2) * b2**4 / (2 * w**2))
    )
    spread = math.sqrt(math.log1p(variance / mean**2))
    center = math.log(mean) - spread**2 / 2
    p = special.ndtr((center - math.log(statistic)) / spread) if statistic > 0 else 1.0
    return float(statistic), float(p)


class Gaussianity(NamedTuple):
    """``p`` of every group of directions, adjusted by Holm; ``groups``: the columns in each; ``smallest``: of ``p``."""

    p: np.ndarray
    groups: list[np.ndarray]
    smallest: float


def gaussianity(projections: np.ndarray, width: int = 3) -> Gaussianity:
    """Whether a cloud ``[n, D]`` is Gaussian: Henze and Zirkler's test on each ``width`` successive columns (say,
    projections on Hessian eigenvectors), adjusted for their number by Holm. It is not, at level 5 %, where ``smallest``
    is below 0.05."""
    groups = [np.arange(i, min(i + width, projections.shape[1])) for i in range(0, projections.shape[1], width)]
    p = holm([henze_zirkler(projections[:, group])[1] for group in groups])
    return Gaussianity(p, groups, float(p.min()))
