"""What kind of process a cloud is, measured on what its runs have left, and what linear theory says of the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from ...theory import processes
from ...theory.diffusion import _geometric
from ...theory.intervals import Interval, gaussianity, holm, over_replicates, student_p

LAGS = (0, 1, 2, 4, 8, 16, 32)
TESTED = 2000  # runs that the test of Gaussianity takes at most: its cost grows with their square
SETTLED = 0.01  # a direction is stationary where (1 - lr lambda)^(2 t) is below it
FEWEST = 50  # runs below which nothing is said of tails


@dataclass(frozen=True)
class Linear:
    """Independent batches at theta*, along chosen eigenvectors ``[k]``: curvature, and the noise ``[k, k]`` of one
    batch between them."""

    values: np.ndarray
    noise: np.ndarray
    lr: float

    @property
    def a(self) -> np.ndarray:
        return 1.0 - self.lr * self.values

    def covariance(self, steps: Sequence[int] | np.ndarray) -> np.ndarray:
        """Mean over ``steps`` of the covariance ``[k, k]`` after so many updates."""
        pairs = np.outer(self.a, self.a)
        return self.lr**2 * self.noise * np.mean([_geometric(pairs, int(t)) for t in steps], axis=0)

    def autocovariance(self, steps: np.ndarray, lags: Sequence[int]) -> np.ndarray:
        """``[k, K]``: E[x(t) x(t + lag)] = a^lag V(t), averaged as :func:`processes.autocovariance` does."""
        columns = [np.diag(self.covariance(steps[: len(steps) - lag])) * self.a**lag for lag in lags]
        return np.stack(columns, axis=1)

    def current(self, steps: np.ndarray) -> np.ndarray:
        """``[k, k]``: lr V_ij (lambda_i - lambda_j) / 2."""
        return self.lr / 2 * self.covariance(steps[:-1]) * np.subtract.outer(self.values, self.values)

    def hurst(self, steps: np.ndarray, lags: Sequence[int]) -> np.ndarray:
        """``[k]``: the slope that :func:`processes.hurst` finds in E[(x(t + lag) - x(t))^2]."""
        own = np.diag(self.noise) * self.lr**2
        rows = []
        for lag in lags:
            moved = np.diag(self.covariance(steps[: len(steps) - lag])) * (1 - self.a**lag) ** 2
            rows.append(moved + own * _geometric(self.a**2, lag))
        at = np.log(np.asarray(lags, dtype=float))
        weights = (at - at.mean()) / ((at - at.mean()) ** 2).sum()
        return weights @ np.log(np.stack(rows)) / 2


def _ends(found: Interval) -> np.ndarray:
    """``[…, 3]``: value, low, high."""
    return np.stack([np.asarray(part) for part in found], axis=-1)


def shape(ends: np.ndarray, steps_apart: np.ndarray) -> dict[str, np.ndarray]:
    """Gaussianity and tails of coordinates ``[n, k]`` at the end and of the last update ``[n, k]``.

    ``gaussian_p`` ``[G]`` (Henze and Zirkler on three directions each, Holm); ``skewness`` and excess ``kurtosis``
    ``[k]``; ``tail_end``, ``tail_step`` ``[k, 3]`` (stable index, low, high) with the p-values of a stable law
    ``…_misfit`` ``[k]``.
    """
    n = len(ends)
    with np.errstate(divide="ignore", invalid="ignore"):
        centred = (ends - ends.mean(0)) / ends.std(0)
    out = {"skewness": (centred**3).mean(0), "kurtosis": (centred**4).mean(0) - 3}
    if n > ends.shape[1] + 10:
        scaled = ends[:TESTED] / ends[:TESTED].std(axis=0)
        found = gaussianity(scaled)
        out |= {"gaussian_p": found.p, "gaussian_width": np.array([len(g) for g in found.groups])}
    if n >= FEWEST:
        for name, values in (("tail_end", ends), ("tail_step", steps_apart)):
            columns = [values[:, i] for i in range(values.shape[1])] if values.size else []
            out[name] = np.stack([_ends(processes.tail_index(c)) for c in columns]) if columns else np.empty((0, 3))
            out[f"{name}_misfit"] = np.array([processes.stable_misfit(c) for c in columns])
    return out


def memory(series: np.ndarray, steps: np.ndarray, linear: Linear | None) -> dict[str, np.ndarray]:
    """Autocovariance, probability current and Hurst exponent of ``series`` ``[n, S, k]`` after ``steps`` updates.

    Of each the mean over runs with Student's interval over runs, ``[…, 3]``; the prediction as ``…_predicted``; the
    autocovariance over that of lag 0 as ``autocorrelation``; and
    ``…_over_predicted`` ``[3]``, the factor between them: every run's, entries weighted by their precision.
    """
    n, length = series.shape[:2]
    x = (series - series.mean(0)) * np.sqrt(n / (n - 1))
    lags = [lag for lag in LAGS if lag < length // 2]
    rough = [lag for lag in LAGS[1:] if 2 * lag <= length and lag <= 16]
    k = series.shape[2]
    out = {"lags": np.array(lags), "series_steps": steps}
    each = np.stack([np.einsum("rtk,rtk->rk", x[:, : length - g], x[:, g:]) / (length - g) for g in lags], axis=2)
    found = over_replicates(each)
    out["autocovariance"] = _ends(found)
    whole = found.value[:, :1]
    ratio = over_replicates((each - found.value / whole * each[:, :, :1]) / whole)  # the error of c(lag) / c(0)
    out["autocorrelation"] = _ends(Interval(*(part + found.value / whole for part in ratio)))
    ahead = np.einsum("rti,rtj->rij", x[:, :-1], x[:, 1:]) / (length - 1)
    turning = (ahead - ahead.transpose(0, 2, 1)) / 2
    current = over_replicates(turning)
    out["current"] = _ends(current)
    upper = np.triu_indices(k, 1)
    out["current_p"] = holm(_p_values(turning[:, upper[0], upper[1]])) if k > 1 else np.empty(0)
    if len(rough) > 1:
        out["hurst"] = np.stack([_ends(processes.hurst(x[:, :, i], rough)) for i in range(k)])
    if linear is not None:
        out["autocovariance_predicted"] = linear.autocovariance(steps, lags)
        out["current_predicted"] = linear.current(steps)
        if len(rough) > 1:
            out["hurst_predicted"] = linear.hurst(steps, rough)
        pairs = (turning[:, upper[0], upper[1]], out["current_predicted"][upper])
        if out["current_predicted"].any():
            out["current_over_predicted"] = _factor(*pairs)
        if len(lags) > 1:
            pairs = (each[:, :, 1:].reshape(n, -1), out["autocovariance_predicted"][:, 1:].ravel())
            out["autocovariance_over_predicted"] = _factor(*pairs)
    return out


def _p_values(values: np.ndarray) -> np.ndarray:
    """Two-sided p ``[m]`` of Student's test that the mean over rows ``[n, m]`` is zero."""
    return student_p(values)


def _factor(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """``[3]``: by which factor the mean of ``measured`` ``[n, m]`` is ``predicted`` ``[m]``, entries weighted by their
    precision; one value per run, Student's interval over runs."""
    weight = predicted / measured.var(axis=0, ddof=1)
    return _ends(over_replicates(measured @ weight / (predicted @ weight)))


def temperatures(
    variances: np.ndarray, values: np.ndarray, noise: np.ndarray | None, lr: float, steps: int, runs: int
) -> dict[str, np.ndarray]:
    """Effective temperatures of the stationary directions among all ``[D]`` (chi-square intervals, ``[m, 3]``), their
    indices ``temperature_directions`` and eigenvalues ``temperature_curvature``, lr S_ii / 2 as
    ``temperature_predicted``, and ``temperature_p``: of one temperature for all, by the spread of their logarithms."""
    a = 1.0 - lr * values
    chosen = np.flatnonzero((values > 0) & (np.abs(a) ** (2 * steps) < SETTLED) & (variances > 0))
    if len(chosen) < 2:
        return {"temperature_directions": chosen, "temperature": np.empty((0, 3))}
    found = processes.effective_temperature(variances[chosen], values[chosen], runs, lr)
    logs = np.log(found.value)
    spread = float(((logs - logs.mean()) ** 2).sum()) * (runs - 1) / 2
    out = {"temperature_directions": chosen, "temperature": _ends(found), "temperature_curvature": values[chosen]}
    out["temperature_p"] = np.array(special.chdtrc(len(chosen) - 1, spread))
    if noise is not None:
        out["temperature_predicted"] = lr * noise[chosen] / 2
    return out


def measured(
    ends: np.ndarray,
    series: np.ndarray | None,
    series_steps: np.ndarray,
    directions: np.ndarray,
    curvature: Mapping[str, np.ndarray],
    lr: float,
    batch_size: int,
    steps: int,
    independent: bool,
    rounding: float = 0.0,
) -> dict[str, np.ndarray]:
    """Everything for ``statistics.npz``.

    ``ends`` ``[n, D]`` along all eigenvectors after ``steps`` updates, ``series`` ``[n, S, k]`` along ``directions``
    after ``series_steps``. ``independent``: batches are, and the optimizer is plain SGD, so that theory says something.
    ``rounding``: variance that rounding alone may give a direction.
    """
    n, vectors, values = len(ends), curvature["eigenvectors"], curvature["eigenvalues"]
    inside = vectors.T @ curvature["covariance"] @ vectors / batch_size
    variances = ends.var(axis=0, ddof=1)
    live = variances[directions] > max(1e-12 * variances.max(), rounding)
    chosen = directions[live]
    out = {"directions": chosen, "curvature": values[chosen], "runs": np.array(n), "lr": np.array(lr)}
    own = np.diag(inside) if independent else None
    out |= temperatures(variances * (variances > rounding), values, own, lr, steps, n)
    if series is not None and series.shape[1] > 1:
        kept = series[:, :, live]
        linear = Linear(values[chosen], inside[np.ix_(chosen, chosen)], lr) if independent else None
        out |= memory(kept, series_steps, linear)
        moved = kept[:, -1] - kept[:, -2]
    else:
        moved = np.empty((n, 0))
    return out | shape(ends[:, chosen], moved)
