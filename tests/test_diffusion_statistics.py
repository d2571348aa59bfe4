"""What is said of a cloud's process, on linear processes simulated here whose every property is known."""

from __future__ import annotations

import numpy as np
import pytest

from descentlab.studies.diffusion import process_figures
from descentlab.studies.diffusion.statistics import Linear, measured, memory

LR, BATCH, STEPS, LENGTH = 0.2, 4, 200, 40
CURVATURE = np.array([2.5, 1.2, 0.6, 0.1, 0.0])
D = len(CURVATURE)
BASIS = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
NOISE = BASIS * np.array([2.0, 1.0, 0.5, 0.2, 0.1]) @ BASIS.T  # does not commute with diag(CURVATURE)


def simulated(runs: int, noise: np.ndarray, seed: int = 0, heavy: bool = False) -> np.ndarray:
    """``[runs, LENGTH + 1, D]``: x' = (1 - lr H) x - lr noise, the last LENGTH + 1 of STEPS states, from zero."""
    rng = np.random.default_rng(seed)
    root = np.linalg.cholesky(noise / BATCH)
    x, kept = np.zeros((runs, D)), []
    for step in range(STEPS):
        drawn = rng.standard_cauchy((runs, D)) if heavy else rng.normal(size=(runs, D))
        x = (1 - LR * CURVATURE) * x - LR * drawn @ root.T
        if step >= STEPS - LENGTH - 1:
            kept.append(x)
    return np.stack(kept, axis=1)


def found(series: np.ndarray, noise: np.ndarray, independent: bool = True) -> dict[str, np.ndarray]:
    curvature = {"eigenvectors": np.eye(D), "eigenvalues": CURVATURE, "covariance": noise}
    steps = np.arange(STEPS - LENGTH, STEPS + 1)
    return measured(series[:, -1], series, steps, np.arange(D), curvature, LR, BATCH, STEPS, independent=independent)


def test_predictions_are_those_of_the_recursion() -> None:
    """Every number against matrices multiplied step by step. Breaks with a wrong age, sign or window."""
    linear = Linear(CURVATURE, NOISE / BATCH, LR)
    push = np.diag(1 - LR * CURVATURE)
    covariances = [np.zeros((D, D))]
    for _ in range(STEPS):
        covariances.append(push @ covariances[-1] @ push + LR**2 * NOISE / BATCH)
    steps = np.arange(3, 20)
    lagged = np.mean([np.linalg.matrix_power(push, 4) @ covariances[t] for t in steps[:-4]], axis=0)
    assert np.allclose(linear.autocovariance(steps, [0, 4])[:, 1], np.diag(lagged))
    ahead = np.mean([covariances[t] @ push for t in steps[:-1]], axis=0)  # E[x(t) x(t + 1)^T]
    assert np.allclose(linear.current(steps), (ahead - ahead.T) / 2) and np.abs(linear.current(steps)).max() > 1e-4
    jumps = []
    for lag in (1, 2):
        moved = np.linalg.matrix_power(push, lag)
        each = [covariances[t] + covariances[t + lag] - moved @ covariances[t] * 2 for t in steps[:-lag]]
        jumps.append(np.log(np.diag(np.mean(each, axis=0))))
    assert np.allclose(linear.hurst(steps, (1, 2)), (jumps[1] - jumps[0]) / np.log(2) / 2)


def test_a_linear_cloud_is_what_it_is_predicted_to_be() -> None:
    """2,000 runs. Breaks when runs are not the unit, the mean of the runs is left in, or a factor is lost."""
    out = found(simulated(2000, NOISE, seed=1), NOISE)
    for name in ("autocovariance_over_predicted", "current_over_predicted"):
        value, low, high = out[name]
        assert abs(value - 1) < high - low < 0.1, name  # twice the half-width: four standard errors
    assert 5 <= (out["current_p"] < 0.05).sum() <= 10  # of 10 planes; the noise turns with most of them
    inside = (out["hurst"][:, 1] < out["hurst_predicted"]) & (out["hurst_predicted"] < out["hurst"][:, 2])
    assert inside.sum() >= 4 and out["hurst_predicted"][0] < 0.25 < 0.49 < out["hurst_predicted"][-1]
    assert out["temperature_directions"].tolist() == [0, 1, 2, 3] and float(out["temperature_p"]) < 1e-6
    assert np.allclose(out["temperature"][:, 0], out["temperature_predicted"], rtol=0.12)
    assert np.allclose(out["temperature_predicted"], LR * np.diag(NOISE)[:4] / BATCH / 2)
    assert out["gaussian_p"].min() > 0.01 and out["tail_end"][:, 2].min() > 1.97
    items = process_figures.items(out)
    assert items["current_over_predicted"].value == pytest.approx(out["current_over_predicted"][0])
    verdicts = {row[1]: row[-1] for row in process_figures.table({"x": (out, items)}).rows}
    assert verdicts["memory: autocovariance / linear theory"] == "linear theory holds within noise"
    assert verdicts["Gaussianity: smallest p of groups of directions"] == "within noise of Gaussian"
    assert verdicts["equipartition: hottest / coldest stationary direction"].startswith("not one temperature")


def test_noise_that_commutes_with_the_curvature_obeys_detailed_balance_at_one_temperature() -> None:
    """Breaks when a test finds rotation, or several temperatures, in a cloud that has none."""
    noise = np.eye(D) * 0.7
    out = found(simulated(1500, noise, seed=4), noise)
    assert (out["current_p"] < 0.05).sum() == 0 and float(out["temperature_p"]) > 0.01
    text = {row[1]: row[-1] for row in process_figures.table({"x": (out, process_figures.items(out))}).rows}
    assert text["detailed balance: planes with a current"] == "no rotation beyond noise"
    assert text["equipartition: hottest / coldest stationary direction"] == "one temperature is within noise"


def test_heavy_tails_are_seen_and_dependent_batches_have_no_prediction() -> None:
    out = found(simulated(1500, NOISE, heavy=True), NOISE, independent=False)
    assert not [name for name in out if "predicted" in name]
    assert out["tail_end"][:, 2].max() < 1.3 and out["tail_step"][:, 0].max() < 1.3  # of a Cauchy law: 1
    assert out["gaussian_p"].max() < 1e-3


def test_few_runs_and_short_clouds_say_less_and_do_not_fail() -> None:
    series = simulated(12, NOISE)
    out = found(series[:, -4:], NOISE)
    assert "tail_end" not in out and "gaussian_p" not in out and out["autocovariance"].shape[0] == D
    alone = measured(
        series[:, -1],
        None,
        np.empty(0, dtype=np.int64),
        np.arange(D),
        {"eigenvectors": np.eye(D), "eigenvalues": CURVATURE, "covariance": NOISE},
        LR,
        BATCH,
        STEPS,
        independent=True,
    )
    assert "current" not in alone and "temperature" in alone and process_figures.items(alone)
    assert memory(series[:, -2:], np.array([4, 5]), None)["lags"].tolist() == [0]
