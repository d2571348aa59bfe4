"""Predictions for clouds of SGD runs against exhaustive enumeration: every sequence of batches there is, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from descentlab.theory import diffusion

D, N, LR = 2, 4, 0.3
RNG = np.random.default_rng(3)
HESSIAN = np.array([[1.7, 0.4], [0.4, 0.2]])
POINTS = RNG.normal(size=(N, D))  # sample n: 1/2 (d - c_n)^T H (d - c_n)
GRADIENTS = -POINTS @ HESSIAN
PER_SAMPLE = np.cov(GRADIENTS.T, bias=True)
Batches = Sequence[Sequence[int]]


def with_replacement(steps: int, b: int) -> Iterator[Batches]:
    yield from itertools.product(itertools.product(range(N), repeat=b), repeat=steps)


def permutations(steps: int, b: int) -> Iterator[Batches]:
    """Every choice of a permutation for each epoch; a last epoch may be cut short."""
    epoch = N // b
    orders = [[p[i * b : (i + 1) * b] for i in range(epoch)] for p in itertools.permutations(range(N))]
    for epochs in itertools.product(orders, repeat=-(-steps // epoch)):
        yield [batch for order in epochs for batch in order][:steps]


def moments(sequences: Iterator[Batches], walk: Callable[[Batches], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    ends = np.array([walk(batches) for batches in sequences])
    return ends.mean(0), np.cov(ends.T, bias=True)


def sgd(batches: Batches, hessians: np.ndarray | None = None) -> np.ndarray:
    each = np.tile(HESSIAN, (N, 1, 1)) if hessians is None else hessians
    d = np.zeros(D)
    for batch in batches:
        d = d - LR * np.mean([each[n] @ d + GRADIENTS[n] for n in batch], axis=0)
    return d


@pytest.mark.parametrize(("steps", "b"), [(1, 1), (3, 1), (2, 2)])
def test_with_replacement(steps: int, b: int) -> None:
    """Breaks with a wrong power of lr, a_i a_j, B, or a sum that is one step too long."""
    mean, covariance = moments(with_replacement(steps, b), sgd)
    assert np.allclose(mean, diffusion.mean_displacement(HESSIAN, GRADIENTS.mean(0), LR, steps), atol=1e-12)
    found = diffusion.finite_time_covariance(HESSIAN, PER_SAMPLE / b, LR, steps)
    assert np.allclose(covariance, found, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("steps", "b"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (1, 2), (2, 2), (3, 2), (5, 2)])
def test_without_replacement_is_a_bridge(steps: int, b: int) -> None:
    """Breaks when epochs are not independent, at the wrong phase, or without N / (N - 1)."""
    _, covariance = moments(permutations(steps, b), sgd)
    found = diffusion.bridge_covariance(HESSIAN, PER_SAMPLE, LR, steps, batch_size=b, population=N)
    assert np.allclose(covariance, found, rtol=1e-11, atol=1e-14)


def test_the_bridge_in_a_flat_direction() -> None:
    """k (n - k) / n and zero at the end of every epoch; half way .5 of what replacement gives (times N / (N - 1))."""
    n, b, c = 60, 64, np.eye(1)
    flat, population = np.zeros((1, 1)), n * b
    for k in (0, 1, 30, 59, 60, 90, 120):
        found = diffusion.bridge_covariance(flat, c, 0.01, k, batch_size=b, population=population)[0, 0]
        phase = k % n
        expected = 1e-4 / b * phase * (n - phase) / n * population / (population - 1)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-17)
    replaced = diffusion.finite_time_covariance(flat, c / b, 0.01, 30)[0, 0]
    half = diffusion.bridge_covariance(flat, c, 0.01, 30, batch_size=b, population=population)[0, 0]
    assert half / replaced == pytest.approx(0.5 * population / (population - 1), rel=1e-9)


@pytest.mark.parametrize(("steps", "b"), [(3, 1), (4, 1), (2, 2)])
def test_samples_with_hessians_of_their_own(steps: int, b: int) -> None:
    """Breaks without the term of the covariance, of the mean, or of the correlation between the two noises."""
    noise = RNG.normal(size=(N, D, D))
    hessians = HESSIAN + 0.5 * (noise + noise.transpose(0, 2, 1))
    mean, covariance = moments(with_replacement(steps, b), lambda batches: sgd(batches, hessians))
    found = diffusion.multiplicative_covariance(hessians, GRADIENTS, LR, steps, batch_size=b)
    assert np.allclose(mean, found[0], atol=1e-12)
    assert np.allclose(covariance, found[1], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_and_weight_decay_are_torchs(nesterov: bool) -> None:
    steps, settings = 4, {"momentum": 0.8, "weight_decay": 0.05, "nesterov": nesterov}

    def walk(batches: Batches) -> np.ndarray:
        theta = torch.zeros(D, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([theta], lr=LR, **settings)  # type: ignore[arg-type]
        for (n,) in batches:
            theta.grad = torch.from_numpy(HESSIAN @ theta.detach().numpy() + GRADIENTS[n])
            optimizer.step()
        return theta.detach().numpy().copy()

    _, covariance = moments(with_replacement(steps, 1), walk)
    found = diffusion.momentum_covariance(HESSIAN, PER_SAMPLE, LR, steps, **settings)  # type: ignore[arg-type]
    assert np.allclose(covariance, found, rtol=1e-10, atol=1e-14)


def test_limits() -> None:
    """Flat: linear diffusion; long: the stationary covariance; small steps: the continuous process."""
    from descentlab.theory.quadratic import stationary_covariance

    late = diffusion.finite_time_covariance(HESSIAN, PER_SAMPLE, LR, 2000)
    assert np.allclose(late, stationary_covariance(HESSIAN, PER_SAMPLE, LR), rtol=1e-10)
    values, vectors = np.linalg.eigh(HESSIAN)
    ratio = np.diag(vectors.T @ late @ vectors) / np.diag(
        vectors.T @ diffusion.continuous_covariance(HESSIAN, PER_SAMPLE, LR, 10**6) @ vectors
    )
    assert np.allclose(ratio, 1 / (1 - LR * values / 2), rtol=1e-10)
    flat = np.diag([0.0, 1e-9])
    exact = LR**2 * 1000 * PER_SAMPLE
    assert np.allclose(diffusion.finite_time_covariance(flat, PER_SAMPLE, LR, 1000), exact, rtol=1e-6)
    assert np.allclose(diffusion.continuous_covariance(flat, PER_SAMPLE, LR, 1000), exact, rtol=1e-6)
    small = 1e-4
    one = diffusion.finite_time_covariance(HESSIAN, PER_SAMPLE, small, 20000)
    assert np.allclose(one, diffusion.continuous_covariance(HESSIAN, PER_SAMPLE, small, 20000), rtol=2e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_stability_boundary(momentum: float) -> None:
    """The spectral radius of one heavy-ball step is below 1 at .99 of the limit and above at 1.01."""
    for share, stable in ((0.99, True), (1.01, False)):
        lr = share * diffusion.momentum_limit(3.0, momentum)
        step = np.array([[1 - lr * 3.0, -lr * momentum], [3.0, momentum]])
        assert (np.abs(np.linalg.eigvals(step)).max() < 1) == stable


def test_finite_variance_under_multiplicative_noise() -> None:
    """V' = ((1 - lr lambda)^2 + lr^2 Gamma) V + …: finite exactly where the factor is below 1."""
    for gamma in np.linspace(0.0, 20.0, 41):
        factor = (1 - LR * 2.0) ** 2 + LR**2 * gamma
        if abs(factor - 1) > 1e-9:
            assert diffusion.variance_is_finite(LR, 2.0, float(gamma)) == (factor < 1)


def test_a_right_prediction_scores_at_the_floor() -> None:
    """Gaussian clouds of a known covariance: error, correlation, spectrum where they have to be, and not if wrong."""
    rng, d, runs = np.random.default_rng(0), 40, 2000
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    scales = np.logspace(-8, 0, d)
    predicted = basis * scales @ basis.T
    cloud = rng.normal(size=(runs, d)) * np.sqrt(scales) @ basis.T
    measured = np.cov(cloud.T)
    own = np.diag(basis.T @ measured @ basis)
    floor = diffusion.monte_carlo_floor(runs)
    assert diffusion.relative_error(own, scales) == pytest.approx(floor, rel=0.4)
    assert diffusion.log_correlation(own, scales) > 0.9999
    low, high = diffusion.marchenko_pastur(d, runs)
    spectrum = diffusion.whitened_spectrum(measured, predicted, range(d))
    assert np.mean((spectrum < 0.97 * low) | (spectrum > 1.03 * high)) == 0
    assert diffusion.relative_error(1.5 * own, scales) > 5 * floor
