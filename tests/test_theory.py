"""Closed forms of SGD on a quadratic against the engine and against hand recursions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import finish, plan_of, quadratic

from descentlab.cluster.specs import ConstantStaleness
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.virtual import Virtual
from descentlab.launch.build import build_parts
from descentlab.optim.specs import Sgd
from descentlab.theory.quadratic import batch_noise, sgd_moments, stability_limit, stationary_covariance
from descentlab.workloads.sampler import WithReplacement
from descentlab.workloads.specs import Quadratic


def test_moments_of_the_engine_s_sgd() -> None:
    """1,500 runs from one start, batches with replacement. Breaks when lr, noise or the batch size enter wrongly."""
    runs, steps, lr, b = 1500, 12, 0.4, 4
    data = Quadratic(rows=1, dimension=3, condition=5, noise=1.0, n=64)
    cell = quadratic(dataset=data, workers=1, batch_size=b, optimizer=Sgd(lr=lr))
    parts = build_parts(cell, "vmap")
    parts.sampler = WithReplacement(64, b, parts.streams)
    start = {"theta": torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)}
    parts.fresh = lambda replicate: (start, {})
    theta = finish(Lockstep(plan_of(cell, steps, replicates=range(runs)), parts)).state.params["theta"][:, 0].numpy()

    a, z = parts.train[0][0].numpy(), parts.train[1][:, 0].numpy()
    best = np.linalg.solve(a, z.mean(0))
    noise = batch_noise(np.cov((z @ a).T, bias=True), b)
    means, covariances = sgd_moments(a.T @ a, noise, lr, steps, start["theta"][0].numpy() - best, np.zeros((3, 3)))
    error = theta.mean(0) - best - means[-1]
    assert (np.abs(error) < 4.5 * np.sqrt(np.diag(covariances[-1]) / runs)).all()
    found, variance = np.cov(theta.T), np.diag(covariances[-1])
    spread = np.sqrt((np.outer(variance, variance) + covariances[-1] ** 2) / runs)
    assert (np.abs(found - covariances[-1]) < 4.5 * spread).all()
    assert (np.abs(found - covariances[-1] * 1.5).max() / spread.max()) > 4.5  # the test can tell


def test_stationary_covariance_is_the_limit_of_the_recursion() -> None:
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    hessian, noise = q @ np.diag([0.3, 0.5, 1.0, 2.0]) @ q.T, np.cov(rng.normal(size=(4, 9)))
    limit = sgd_moments(hessian, noise, 0.7, 400, np.ones(4), np.eye(4))[1][-1]
    np.testing.assert_allclose(stationary_covariance(hessian, noise, 0.7), limit, rtol=1e-10, atol=1e-12)
    assert stationary_covariance(np.eye(1), np.eye(1), 0.5)[0, 0] == pytest.approx(0.5 / (2 - 0.5))  # lr / (2 - lr h)
    for lr in (0.0, 1.0, 1.1):
        with pytest.raises(ValueError, match="expected 0 < lr"):
            stationary_covariance(hessian, noise, lr)


def test_noise_of_a_batch_drawn_without_replacement() -> None:
    """All pairs of five numbers, by hand."""
    values = np.array([0.0, 1.0, 3.0, 4.0, 9.0])
    pairs = [(values[i] + values[j]) / 2 for i in range(5) for j in range(i)]
    assert batch_noise(np.array([[values.var()]]), 2, population=5)[0, 0] == pytest.approx(np.var(pairs))


@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
def test_the_limit_is_where_the_recursion_turns(staleness: int) -> None:
    curvature = 1.7
    limit = stability_limit(curvature, staleness)

    def radius(lr: float) -> float:
        polynomial = np.zeros(staleness + 2)
        polynomial[:2] = 1.0, -1.0
        polynomial[-1] += lr * curvature
        return float(np.abs(np.roots(polynomial)).max())

    assert radius(limit) == pytest.approx(1.0, abs=1e-6)
    assert radius(0.99 * limit) < 1 < radius(1.01 * limit)


@pytest.mark.parametrize(("factor", "grows"), [(0.95, False), (1.05, True)])
def test_the_virtual_clock_diverges_above_the_limit(factor: float, grows: bool) -> None:
    """Noise-free, largest curvature 1, gradients two updates old."""
    lr = factor * stability_limit(1.0, staleness=2)
    data = Quadratic(rows=1, dimension=2, condition=2, noise=0.0, n=8)
    timeline = ConstantStaleness(staleness=2)
    cell = quadratic(dataset=data, batch_size=8, workers=1, optimizer=Sgd(lr=lr), timeline=timeline)
    engine = Virtual(plan_of(cell, 300, replicates=[0]), build_parts(cell, "vmap"), timeline=timeline.build())
    before = float(engine.state.params["theta"].norm())
    after = float(finish(engine).state.params["theta"].norm())
    assert (after > 3 * before) if grows else (after < before / 3)
