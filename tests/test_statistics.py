"""Intervals and process statistics on processes with a known answer: their coverage, levels and powers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_iris

from descentlab.theory import intervals, processes
from descentlab.theory.intervals import Interval

TRIES = 200


def assert_coverage(covered: int, tries: int, level: float = 0.95) -> None:
    """As many intervals hold the truth as promised, within what chance allows (about 1 in 10,000 fails)."""
    low, high = stats.binom.ppf([5e-5, 1 - 5e-5], tries, level)
    assert low - 0.01 * tries <= covered <= high, f"{covered} of {tries}"


def holds(interval: Interval, truth: float | np.ndarray) -> np.ndarray:
    return (interval.low <= truth) & (truth <= interval.high)


def test_eigenvalues_of_a_mean_matrix() -> None:
    """Wishart matrices with well-separated eigenvalues; breaks without the jackknife's factor R - 1."""
    rng, truth = np.random.default_rng(0), np.array([0.2, 1.0, 5.0])
    covered = np.zeros(3)
    for _ in range(TRIES):
        x = rng.normal(size=(12, 40, 3)) * np.sqrt(truth)
        covered += holds(intervals.eigenvalues_of_mean(np.einsum("rni,rnj->rij", x, x) / 40), truth)
    for count in covered:
        assert_coverage(int(count), TRIES)
    with pytest.raises(ValueError, match="2 replicates: expected at least 3"):
        intervals.eigenvalues_of_mean(np.zeros((2, 3, 3)))


def test_mean_over_replicates() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(3.0, 2.0, size=(4, 1000))
    assert_coverage(int(holds(intervals.over_replicates(values), 3.0).sum()), 1000)
    with pytest.raises(ValueError, match="at least 2"):
        intervals.over_replicates(values[:1])


def test_variances_and_their_ratio() -> None:
    rng = np.random.default_rng(2)
    measured = rng.normal(0, 2.0, size=(25, 2000)).var(0, ddof=1)
    assert_coverage(int(holds(intervals.variance_interval(measured, 25), 4.0).sum()), 2000)
    low, high = intervals.ratio_band(25)
    assert_coverage(int(((low <= measured / 4) & (measured / 4 <= high)).sum()), 2000)
    assert intervals.ratio_band(1000)[1] - 1 == pytest.approx(1.96 * np.sqrt(2 / 999), rel=0.03)


def test_holm_by_hand() -> None:
    """Sorted .01 .02 .04 times 3, 2, 1, then never falling."""
    assert intervals.holm([0.04, 0.01, 0.02]).tolist() == pytest.approx([0.04, 0.03, 0.04])
    assert intervals.holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_henze_zirkler_on_published_values() -> None:
    """The first species of the iris data: 0.9488453, p = 0.04995356 by R's package MVN."""
    statistic, p = intervals.henze_zirkler(load_iris().data[:50])
    assert statistic == pytest.approx(0.9488453, abs=1e-6) and p == pytest.approx(0.04995356, abs=1e-6)
    with pytest.raises(ValueError, match="full rank"):
        intervals.henze_zirkler(np.ones((9, 2)))


def test_gaussianity_has_its_level_and_finds_what_is_not_gaussian() -> None:
    """Nine correlated directions. A Gaussian mixture that has Gaussian margins in two of them is found all the same."""
    rng, mix = np.random.default_rng(3), np.random.default_rng(4).normal(size=(9, 9))
    smallest = [intervals.gaussianity(rng.normal(size=(150, 9)) @ mix).smallest for _ in range(TRIES)]
    assert sum(p < 0.05 for p in smallest) <= stats.binom.ppf(1 - 5e-5, TRIES, 0.06)
    assert intervals.gaussianity(rng.standard_t(4, size=(400, 9)) @ mix).smallest < 1e-3
    hidden = rng.normal(size=(600, 9))
    hidden[:, 4] = np.abs(hidden[:, 4]) * np.sign(hidden[:, 3])  # margins stay Gaussian, the pair does not
    found = intervals.gaussianity(hidden)
    assert found.p[1] < 1e-6 and found.p[[0, 2]].min() > 0.01 and found.groups[1].tolist() == [3, 4, 5]


def linear(m: np.ndarray, noise: np.ndarray, runs: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Stationary paths of x' = M x + noise: ``[R, T, D]``, begun in the stationary law."""
    root, x = np.linalg.cholesky(noise), np.empty((runs, steps, len(m)))
    x[:, 0] = rng.normal(size=(runs, len(m))) @ np.linalg.cholesky(stationary(m, noise)).T
    for t in range(1, steps):
        x[:, t] = x[:, t - 1] @ m.T + rng.normal(size=(runs, len(m))) @ root.T
    return x


def stationary(m: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """vec C = (1 - M x M)^-1 vec S: another route than any recursion."""
    d = len(m)
    return np.linalg.solve(np.eye(d * d) - np.kron(m, m), noise.ravel()).reshape(d, d)


BALANCED = np.diag([0.9, 0.7]), np.eye(2)
ROTATING = np.array([[0.9, -0.2], [0.2, 0.9]]), np.eye(2)
UNEVEN = np.diag([0.9, 0.6]), np.array([[1.0, 0.7], [0.7, 1.0]])  # curvature and noise do not commute


@pytest.mark.parametrize(("m", "noise"), [BALANCED, ROTATING, UNEVEN])
def test_current_and_autocovariance(m: np.ndarray, noise: np.ndarray) -> None:
    """(C M^T - M C) / 2 and a_k: zero current where detailed balance holds, known ones where it does not."""
    rng, c = np.random.default_rng(5), stationary(m, noise)
    truth = (c @ m.T - m @ c) / 2
    inside = memory = 0
    for _ in range(TRIES):
        x = linear(m, noise, 10, 120, rng)
        found = processes.probability_current(x)
        assert (found.value == -found.value.T).all()
        inside += int(holds(found, truth)[0, 1])
        lagged = processes.autocovariance(x[:, :, 0], [0, 3])
        memory += int(holds(lagged, np.array([c[0, 0], (np.linalg.matrix_power(m, 3) @ c)[0, 0]]))[1])
    assert_coverage(inside, TRIES)
    assert memory / TRIES > 0.88  # the mean that is taken off costs a little
    big = processes.probability_current(linear(m, noise, 200, 400, rng))
    away = bool(big.low[0, 1] > 0 or big.high[0, 1] < 0)
    assert away is bool(abs(truth[0, 1]) > 1e-12)


def test_temperature_of_equipartition() -> None:
    """x' = (1 - lr L) x + noise of variance 2 lr T: one temperature in every direction, discrete factor included."""
    rng, lr, temperature, curvature = np.random.default_rng(6), 0.1, 0.7, np.array([0.5, 4.0, 12.0])
    variance = 2 * lr * temperature / (1 - (1 - lr * curvature) ** 2)
    covered = np.zeros(3)
    for _ in range(TRIES):
        measured = (rng.normal(size=(60, 3)) * np.sqrt(variance)).var(0, ddof=1)
        covered += holds(processes.effective_temperature(measured, curvature, 60, lr), temperature)
    for count in covered:
        assert_coverage(int(count), TRIES)
    with pytest.raises(ValueError, match="positive"):
        processes.effective_temperature(variance, -curvature, 60)


def fractional(h: float, runs: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Fractional Brownian motion by the Cholesky factor of its covariance (|s|^2H + |t|^2H - |s - t|^2H) / 2."""
    t = np.arange(1.0, steps + 1)
    covariance = (t[:, None] ** (2 * h) + t ** (2 * h) - np.abs(t[:, None] - t) ** (2 * h)) / 2
    return rng.normal(size=(runs, steps)) @ np.linalg.cholesky(covariance).T


@pytest.mark.parametrize("h", [0.3, 0.5, 0.8])
def test_hurst_exponent(h: float) -> None:
    rng = np.random.default_rng(7)
    paths = fractional(h, 20 * TRIES, 300, rng).reshape(TRIES, 20, 300)
    found = [processes.hurst(x, (1, 2, 3)) for x in paths]
    assert_coverage(sum(int(holds(f, h)) for f in found), TRIES)
    assert np.mean([f.value for f in found]) == pytest.approx(h, abs=0.01)
    with pytest.raises(ValueError, match="twice the largest lag"):
        processes.hurst(np.zeros((3, 20)))


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8, 2.0])
def test_tail_index_of_stable_laws(alpha: float, beta: float) -> None:
    """Right on known laws, skewed ones too, wherever they are; the published estimator gives .26 for 1.2. At 2 the
    interval is cut, so that only its lower end can fail."""
    samples = stats.levy_stable.rvs(alpha, beta, loc=5, scale=3, size=(TRIES, 1500), random_state=8)
    found = [processes.tail_index(x) for x in samples]
    covered = sum(int(holds(f, alpha)) for f in found)
    assert_coverage(covered, TRIES, 0.975 if alpha == 2 else 0.95)
    assert np.mean([f.value for f in found]) == pytest.approx(alpha, abs=0.03)
    if alpha < 2:
        assert all(f.high < 2 for f in found) or alpha == 1.8
    assert sum(processes.stable_misfit(x) < 0.05 for x in samples) <= stats.binom.ppf(1 - 5e-5, TRIES, 0.07)


def test_what_is_heavy_but_not_stable_is_noticed() -> None:
    rng = np.random.default_rng(9)
    assert processes.stable_misfit(rng.standard_t(3, size=20_000)) < 1e-3
    with pytest.raises(ValueError, match="at least 50"):
        processes.tail_index(np.zeros(9))
    with pytest.raises(ValueError, match="less than half"):
        processes.tail_index(np.zeros(90))
