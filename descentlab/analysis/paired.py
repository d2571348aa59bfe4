"""Statistics of paired differences, one difference per replicate: intervals, tests, Holm, power, Wilson.

Under 20 replicates: Student's t. From 20: the BCa bootstrap over replicates (Efron 1987) with a sign-flip
permutation test. Exact zeros, as masked faults give, make both inadequate: then Wilcoxon's signed-rank test with
Pratt's treatment of zeros (Pratt 1959), exact. The method used is part of every answer.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special  # scipy.stats takes a second to import and is loaded only where it is needed

BOOTSTRAP_FROM = 20
RESAMPLES = 9999
BATCH = 2**22  # numbers that the bootstrap draws at once, 32 MB: with 10,000 replicates all of them would take 2 GB
SEED = 20230617  # constant, so that the same table gives the same report


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` replicates with its interval; ``sd`` and ``dz`` (mean / sd) are None where undefined."""

    value: float
    n: int
    low: float | None
    high: float | None
    method: str
    sd: float | None = None
    dz: float | None = None


@dataclass(frozen=True)
class Test:
    """A two-sided test of mean (or symmetric) difference zero; ``p`` is None when it was not run, ``note`` says why.

    ``direction`` is the sign of what was tested: the mean, or the rank sum, which can differ from the mean's.
    """

    __test__ = False  # not a pytest class

    p: float | None
    method: str
    note: str = ""
    direction: int = 0


def replicate_means(values: Iterable[float], replicates: Iterable[Hashable]) -> np.ndarray:
    """Average several values of one replicate to one, so that the replicate stays the unit."""
    groups: dict[Hashable, list[float]] = {}
    for value, replicate in zip(values, replicates, strict=True):
        groups.setdefault(replicate, []).append(float(value))
    return np.array([np.mean(group) for group in groups.values()])


def _checked(differences: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(differences, dtype=float)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError("differences: expected one finite number per replicate; failures are scored before this")
    return array


def estimate(differences: Sequence[float] | np.ndarray, level: float = 0.95, resamples: int = RESAMPLES) -> Estimate:
    """Mean of one difference per replicate, shape [n], with its two-sided interval at ``level``."""
    d = _checked(differences)
    n = len(d)
    if n == 0:
        raise ValueError("differences: expected at least one replicate")
    mean = float(d.mean())
    if n == 1:
        return Estimate(mean, 1, None, None, "one replicate, no interval")
    sd = float(d.std(ddof=1))
    if np.ptp(d) == 0:
        return Estimate(mean, n, mean, mean, "all replicates equal", 0.0, None)
    dz = mean / sd
    if n < BOOTSTRAP_FROM:
        half = float(special.stdtrit(n - 1, 0.5 + level / 2)) * sd / math.sqrt(n)
        return Estimate(mean, n, mean - half, mean + half, f"{100 * level:g} % paired t interval", sd, dz)
    from scipy import stats

    interval = stats.bootstrap(
        (d,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, BATCH // n),
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    method = f"{100 * level:g} % BCa bootstrap over replicates ({resamples} resamples)"
    return Estimate(mean, n, float(interval.low), float(interval.high), method, sd, dz)


def pratt_p(differences: Sequence[float] | np.ndarray) -> float:
    """Exact two-sided p of the signed-rank test: zeros are ranked and then dropped (Pratt 1959); ties share ranks."""
    from scipy import stats

    d = _checked(differences)
    doubled = np.rint(2 * stats.rankdata(np.abs(d))).astype(int)  # mid-ranks are half-integers
    ranks, positive = doubled[d != 0], d[d != 0] > 0
    counts = np.zeros(int(ranks.sum()) + 1)  # probability of each sum of positive ranks under random signs
    counts[0] = 1.0
    for rank in ranks:
        shifted = np.zeros_like(counts)
        shifted[rank:] = counts[: len(counts) - rank]
        counts = (counts + shifted) / 2
    observed = int(ranks[positive].sum())
    return float(min(1.0, 2 * min(counts[: observed + 1].sum(), counts[observed:].sum())))


def sign_flip_p(differences: Sequence[float] | np.ndarray, resamples: int = RESAMPLES) -> float:
    """Two-sided permutation p of the mean under random signs (Monte Carlo with a fixed seed)."""
    from scipy import stats

    d = _checked(differences)
    result = stats.permutation_test(
        (d, np.zeros_like(d)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        rng=np.random.default_rng(SEED),
    )
    return float(result.pvalue)


def smallest_signed_p(differences: Sequence[float] | np.ndarray) -> float:
    """The smallest two-sided p any sign or signed-rank test can give: 2 / 2^m for m non-zero differences."""
    return min(1.0, 2.0 ** (1 - int(np.count_nonzero(_checked(differences)))))


def paired_test(differences: Sequence[float] | np.ndarray, level: float = 0.05) -> Test:
    """The test that fits the data (see the module's head); not run when it could not reach ``level`` at this n."""
    d = _checked(differences)
    n = len(d)
    if n < 2:
        return Test(None, "none", f"not run: n = {n}")
    if not d.any():
        return Test(None, "none", "not run: every difference is exactly 0")
    zeros = int((d == 0).sum())
    if zeros or np.ptp(d) == 0:
        why = f"exact zeros: {zeros} of {n}" if zeros else "all differences equal"
        method = f"exact Wilcoxon-Pratt ({why})"
        least = smallest_signed_p(d)
        if least > level:
            return Test(None, method, f"not run: its smallest possible p is {least:.2g}, the level {level:.2g}")
        from scipy import stats

        rank_sum = float(np.sum(stats.rankdata(np.abs(d)) * np.sign(d)))
        return Test(pratt_p(d), method, direction=int(np.sign(rank_sum)))
    direction = int(np.sign(d.mean()))
    if n < BOOTSTRAP_FROM:
        t = float(d.mean()) / (float(d.std(ddof=1)) / math.sqrt(n))
        return Test(float(2 * special.stdtr(n - 1, -abs(t))), "paired t", direction=direction)
    return Test(sign_flip_p(d), f"sign-flip permutation ({RESAMPLES} draws)", direction=direction)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p values (Holm 1979), in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def power(effect: float, n: int, alpha: float = 0.05) -> float:
    """Power of the two-sided paired t test at standardized effect d_z = ``effect``.

    The noncentral t probability, integrated over the sample's relative standard deviation s: scipy's own ``nct``
    answers NaN for some of the few degrees of freedom and large shifts needed here.
    """
    df = n - 1
    critical, shift = float(special.stdtrit(df, 1 - alpha / 2)), effect * math.sqrt(n)
    s = np.linspace(0.0, math.sqrt(float(special.chdtri(df, 1e-12)) / df), 20001)
    constant = math.log(2) + df / 2 * math.log(df / 2) - special.gammaln(df / 2)
    log_density = constant + special.xlogy(df - 1, s) - df / 2 * s**2
    beyond = special.ndtr(shift - critical * s) + special.ndtr(-shift - critical * s)
    return float(np.trapezoid(beyond * np.exp(log_density), s))


def detectable(sd: float | None, n: int, alpha: float = 0.05, wanted: float = 0.8) -> float | None:
    """The mean difference a paired t test finds with power ``wanted``, given the observed ``sd``; None if undefined."""
    if sd is None or n < 2 or sd == 0:
        return None
    return sd * _detectable_effect(n, alpha, wanted)


@lru_cache(maxsize=1024)
def _detectable_effect(n: int, alpha: float, wanted: float) -> float:
    """The standardized effect that is found with power ``wanted``."""
    low, high = 0.0, 1.0
    while power(high, n, alpha) < wanted:
        high *= 2
    while high - low > 1e-8 * high:  # power grows with the effect
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, n, alpha) < wanted else (low, middle)
    return high


def wilson(events: int, n: int, level: float = 0.95) -> Estimate:
    """A rate with its Wilson score interval (Wilson 1927)."""
    if n == 0:
        raise ValueError("n: expected at least one replicate")
    z, p = float(special.ndtri(0.5 + level / 2)), events / n
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((centre + side * half) / (1 + z**2 / n) for side in (-1, 1))
    return Estimate(p, n, max(0.0, low), min(1.0, high), f"{100 * level:g} % Wilson interval")
