"""Toy problems with known answers: each simulated here with numpy alone and compared with what theory says."""

from __future__ import annotations

import numpy as np
import pytest

from descentlab.theory import diffusion
from descentlab.theory.quadratic import stationary_covariance

RNG = np.random.default_rng(11)


def runs(hessian: np.ndarray, noise: np.ndarray, lr: float, steps: int, n: int = 20_000) -> np.ndarray:
    """``[n, D]``: ends of n runs of x' = x - lr (H x + noise) from zero."""
    root = np.linalg.cholesky(noise)
    x = np.zeros((n, len(hessian)))
    for _ in range(steps):
        x = x - lr * (x @ hessian + RNG.normal(size=x.shape) @ root.T)
    return x


def test_the_discrete_stationary_covariance_beats_that_of_continuous_time() -> None:
    """Ten dimensions, learning rate 0.15: the discrete law is off by the error of 20,000 runs, the continuous one by
    lr lambda / 2. Breaks when either is taken for the other."""
    basis = np.linalg.qr(RNG.normal(size=(10, 10)))[0]
    hessian = basis * np.linspace(0.5, 6.0, 10) @ basis.T
    noise = 0.01 * (np.eye(10) + 0.3 * hessian)
    measured = np.cov(runs(hessian, noise, 0.15, 120).T)
    errors = []
    for predicted in (
        stationary_covariance(hessian, noise, 0.15),
        diffusion.continuous_covariance(hessian, noise, 0.15, 10_000),
    ):
        errors.append(np.linalg.norm(measured - predicted) / np.linalg.norm(measured))
    assert errors[0] < 0.03 and errors[1] > 5 * errors[0]


@pytest.mark.parametrize(("share", "stable"), [(0.97, True), (1.03, False)])
def test_the_boundary_of_stability_under_multiplicative_noise(share: float, stable: bool) -> None:
    """x' = (1 - lr (lambda + z)) x, z of variance Gamma: second moments by the exact factor, step by step, on both
    sides of lr Gamma = lambda (2 - lr lambda); without Gamma all of these rates would be stable."""
    curvature, gamma = 1.0, 3.0
    edge = 2 * curvature / (curvature**2 + gamma)
    lr = share * edge
    assert lr < 2 / curvature and diffusion.variance_is_finite(lr, curvature, gamma) is stable
    moment, kicks = 1.0, np.array([-1.0, 1.0]) * gamma**0.5  # a law of two values with that variance
    for _ in range(400):
        moment *= np.mean((1 - lr * (curvature + kicks)) ** 2)
    assert bool(moment < 1) is stable


def test_negative_curvature_spreads_a_cloud_beyond_diffusion() -> None:
    """Along a falling direction the drift amplifies what noise has made: variance of a simulation against the discrete
    law, and against that of a flat direction, which it exceeds by (a^2T - 1) / (T (a^2 - 1))."""
    lr, steps, noise = 0.05, 60, 0.2
    hessian = np.diag([-0.8, 0.0])
    measured = runs(hessian, noise * np.eye(2), lr, steps).var(axis=0)
    predicted = diffusion.finite_time_variances(np.diag(hessian), np.full(2, noise), lr, steps)
    assert np.allclose(measured / predicted, 1, atol=0.05)
    a = 1 + lr * 0.8
    assert predicted[0] / predicted[1] == pytest.approx((a ** (2 * steps) - 1) / (steps * (a * a - 1)), rel=1e-9)
    assert measured[0] / measured[1] > 10


def test_the_modified_flow_follows_gradient_descent_one_order_longer() -> None:
    """One step on a quadratic: the flow of -g is wrong by lr^2, that of -g - lr/2 H g by lr^3 (published: slopes 1.95
    and 3.09). Breaks when a step's mean is not that of gradient descent."""
    values, vectors = np.array([0.4, 1.0, 2.0]), np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    hessian, gradient = vectors * values @ vectors.T, RNG.normal(size=3)
    rates = np.array([0.02, 0.04, 0.08, 0.16])
    errors: list[list[float]] = [[], []]
    for lr in rates:
        step = diffusion.mean_displacement(hessian, gradient, lr, 1)
        for kind, bent in enumerate((values, values + lr / 2 * values**2)):
            flow = vectors @ (np.expm1(-lr * bent) / values * (vectors.T @ gradient))
            errors[kind].append(float(np.linalg.norm(flow - step)))
    slopes = [np.polyfit(np.log(rates), np.log(e), 1)[0] for e in errors]
    assert slopes[0] == pytest.approx(2, abs=0.1) and slopes[1] == pytest.approx(3, abs=0.1)


def test_without_replacement_an_epoch_s_end_is_quiet_and_its_middle_is_not() -> None:
    """Published comparisons looked at whole epochs only. 4,000 runs of two epochs over 12 numbers in batches of one."""
    samples = RNG.normal(size=12)
    samples -= samples.mean()
    lr, n = 0.01, 4000
    orders = np.stack([np.concatenate([RNG.permutation(12), RNG.permutation(12)]) for _ in range(n)])
    path = -lr * np.cumsum(samples[orders], axis=1)
    for steps in (3, 6, 12, 18, 24):
        predicted = diffusion.bridge_variances(
            np.zeros(1), np.array([samples.var()]), lr, steps, batch_size=1, population=12
        )[0]
        assert path[:, steps - 1].var() == pytest.approx(predicted, rel=0.1, abs=1e-18)
    assert path[:, 23].var() < 1e-20 < path[:, 17].var()
