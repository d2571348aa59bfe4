"""The covariance of a cloud of SGD runs around a point, predicted in every direction with no fitted constant.

Setting: all runs start at theta0 with gradient g (zero at a critical point), Hessian H and covariance C of
single-sample gradients (divided by N). One step is d' = (1 - lr H) d - lr g - lr noise for d = theta - theta0; the
noise of a batch of B has mean 0 and covariance C / B (with replacement). Everything is exact on a quadratic whose
samples share one Hessian; :func:`multiplicative_covariance` drops that condition. H and C need not commute: with
H = U diag(lambda) U^T every pair (i, j) of directions of U^T V U obeys a recursion of its own with factors
a_i = 1 - lr lambda_i.

:func:`descentlab.theory.quadratic.stationary_covariance` is the limit of many steps where the curvature is positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _in_eigenbasis(hessian: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(eigenvalues, eigenvectors in columns, noise between the eigenvectors)."""
    values, vectors = np.linalg.eigh(hessian)
    return values, vectors, vectors.T @ noise @ vectors


def _geometric(ratio: np.ndarray, terms: int) -> np.ndarray:
    """sum of ratio^s over s = 0 … terms - 1, accurate where the ratio is close to 1."""
    gap = ratio - 1.0
    near = np.abs(gap) * max(terms, 1) < 1e-4
    safe = np.where(near, 1.0, gap)
    series = terms * (1 + gap * (terms - 1) / 2 * (1 + gap * (terms - 2) / 3))  # the next term is below 1e-12
    return np.where(near, series, (ratio**terms - 1.0) / safe)


def mean_displacement(hessian: np.ndarray, gradient: np.ndarray, lr: float, steps: int) -> np.ndarray:
    """Mean of theta - theta0 ``[D]`` after ``steps`` updates: -lr sum_s (1 - lr H)^s g; also that of gradient descent.

    On a loss that is no quadratic it lacks the term -lr/2 D^3 L [V] per step, third derivatives times the covariance.
    """
    values, vectors = np.linalg.eigh(hessian)
    return vectors @ (-lr * _geometric(1.0 - lr * values, steps) * (vectors.T @ gradient))


def finite_time_covariance(hessian: np.ndarray, noise: np.ndarray, lr: float, steps: int) -> np.ndarray:
    """Covariance ``[D, D]`` after ``steps`` updates: V' = (1 - lr H) V (1 - lr H) + lr^2 S, V = 0 at the start.

    ``noise``: S, the covariance of one batch's gradient, C / B with replacement. In the eigenbasis
    V_ij = lr^2 S_ij (1 - (a_i a_j)^t) / (1 - a_i a_j): linear diffusion lr^2 S_ii t where the curvature vanishes,
    lr S_ii / (lambda_i (2 - lr lambda_i)) where it is large.
    """
    values, vectors, inside = _in_eigenbasis(hessian, noise)
    a = 1.0 - lr * values
    return vectors @ (lr**2 * inside * _geometric(np.outer(a, a), steps)) @ vectors.T


def continuous_covariance(hessian: np.ndarray, noise: np.ndarray, lr: float, steps: int) -> np.ndarray:
    """The same for the Ornstein-Uhlenbeck process d theta = -H theta dt + sqrt(lr S) dW at time t = lr ``steps``.

    V_ij = lr S_ij (1 - exp(-(lambda_i + lambda_j) t)) / (lambda_i + lambda_j). It lacks the term lr H V H of the
    discrete recursion: too small by 1 - lr lambda / 2 where stationary.
    """
    values, vectors, inside = _in_eigenbasis(hessian, noise)
    rate, t = np.add.outer(values, values), lr * steps
    flat = np.abs(rate) * t < 1e-9
    growth = np.where(flat, t, -np.expm1(-rate * t) / np.where(flat, 1.0, rate))
    return vectors @ (lr * inside * growth) @ vectors.T


def bridge_covariance(
    hessian: np.ndarray, per_sample: np.ndarray, lr: float, steps: int, *, batch_size: int, population: int
) -> np.ndarray:
    """The covariance without replacement: every epoch is a permutation of the ``population``, cut into batches.

    Batches of one epoch repel each other: Var = C / B (N - B) / (N - 1), Cov = -C / (N - 1); epochs are independent and
    start afresh after n = N // B batches (what is left over is dropped). In a flat direction and with N = n B the
    variance is lr^2 C / B k (n - k) / n N / (N - 1) after k batches: a bridge, zero at every end of an epoch.
    """
    values, vectors, inside = _in_eigenbasis(hessian, per_sample)
    a = 1.0 - lr * values
    growth = _bridge(a[:, None], a[None, :], steps, batch_size, population)
    return vectors @ (lr**2 * inside * growth) @ vectors.T


def _bridge(a: np.ndarray, b: np.ndarray, steps: int, batch_size: int, population: int) -> np.ndarray:
    """The sum over pairs of batches of a^(age of one) b^(age of the other) x their correlation; ``a``, ``b``
    broadcast."""
    own = (population - batch_size) / ((population - 1) * batch_size)
    between, pairs = -1.0 / (population - 1), a * b

    def part(k: int) -> np.ndarray:
        """What ``k`` batches of one epoch add, at their end."""
        return (own - between) * _geometric(pairs, k) + between * (_geometric(a, k) * _geometric(b, k))

    epoch = population // batch_size
    whole, k = divmod(steps, epoch)
    return part(epoch) * _geometric(pairs**epoch, whole) * pairs**k + part(k)


def finite_time_variances(curvature: np.ndarray, noise: np.ndarray, lr: float, steps: int) -> np.ndarray:
    """:func:`finite_time_covariance` along eigenvectors of the Hessian alone: from their eigenvalues ``[D]`` and the
    variances ``[D]`` of a batch's gradient along them."""
    a = 1.0 - lr * curvature
    return lr**2 * noise * _geometric(a * a, steps)


def bridge_variances(
    curvature: np.ndarray, per_sample: np.ndarray, lr: float, steps: int, *, batch_size: int, population: int
) -> np.ndarray:
    """:func:`bridge_covariance` along eigenvectors of the Hessian alone, all ``[D]``."""
    a = 1.0 - lr * curvature
    return lr**2 * per_sample * _bridge(a, a, steps, batch_size, population)


def multiplicative_covariance(
    hessians: np.ndarray, gradients: np.ndarray, lr: float, steps: int, *, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(mean ``[D]``, covariance ``[D, D]``) where every sample has a Hessian of its own; batches with replacement.

    ``hessians`` ``[N, D, D]`` and ``gradients`` ``[N, D]`` of the samples at theta0. With the deviations H~_n and g~_n
    from their means, one step is m' = m - lr (H m + g) and
    V' = (1 - lr H) V (1 - lr H) + lr^2 / B mean_n [H~_n V H~_n + (H~_n m + g~_n) (H~_n m + g~_n)^T].
    Exact for quadratic samples, correlations between Hessian and gradient noise included.
    """
    hessian, gradient = hessians.mean(0), gradients.mean(0)
    spread, push = hessians - hessian, gradients - gradient
    contraction = np.eye(len(hessian)) - lr * hessian
    mean, covariance = np.zeros(len(hessian)), np.zeros_like(hessian)
    for _ in range(steps):
        kick = spread @ mean + push
        noise = (np.einsum("nij,jk,nlk->il", spread, covariance, spread) + kick.T @ kick) / len(hessians)
        covariance = contraction @ covariance @ contraction.T + lr**2 / batch_size * noise
        mean = contraction @ mean - lr * gradient
    return mean, covariance


def momentum_covariance(
    hessian: np.ndarray,
    noise: np.ndarray,
    lr: float,
    steps: int,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> np.ndarray:
    """The covariance for torch's SGD with momentum, from an empty buffer: b' = mu b + q, d' = d - lr b'.

    ``weight_decay`` adds w theta to the gradient: the curvature becomes lambda + w (its pull at theta0 moves the mean
    only). ``nesterov``: d' = d - lr (q + mu b'). Per eigendirection (d, b) is a linear system of two numbers; each pair
    of directions carries a 2 x 2 block of covariances.
    """
    values, vectors, inside = _in_eigenbasis(hessian, noise)
    n, (step, push) = len(values), _heavy_ball(values + weight_decay, lr, momentum, nesterov)
    source = inside[:, :, None, None] * np.outer(push, push)
    held = np.zeros((n, n, 2, 2))
    for _ in range(steps):
        held = np.einsum("iab,ijbc,jdc->ijad", step, held, step) + source
    return vectors @ held[:, :, 0, 0] @ vectors.T


def momentum_variances(
    curvature: np.ndarray,
    noise: np.ndarray,
    lr: float,
    steps: int,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> np.ndarray:
    """:func:`momentum_covariance` along eigenvectors of the Hessian alone, all ``[D]``."""
    step, push = _heavy_ball(np.asarray(curvature) + weight_decay, lr, momentum, nesterov)
    source, held = noise[:, None, None] * np.outer(push, push), np.zeros((len(noise), 2, 2))
    for _ in range(steps):
        held = step @ held @ step.transpose(0, 2, 1) + source
    return held[:, 0, 0]


def _heavy_ball(curvature: np.ndarray, lr: float, momentum: float, nesterov: bool) -> tuple[np.ndarray, np.ndarray]:
    """(d, b) -> (d', b') per eigendirection ``[D, 2, 2]``, and what a gradient's noise adds to both ``[2]``."""
    gain = 1.0 + momentum if nesterov else 1.0
    carried = momentum**2 if nesterov else momentum
    step = np.zeros((len(curvature), 2, 2))
    step[:, 0, 0], step[:, 0, 1] = 1.0 - lr * gain * curvature, -lr * carried
    step[:, 1, 0], step[:, 1, 1] = curvature, momentum
    return step, np.array([-lr * gain, 1.0])


def momentum_limit(curvature: float, momentum: float = 0.0) -> float:
    """The learning rate above which SGD with heavy-ball momentum diverges: 2 (1 + mu) / lambda."""
    return 2.0 * (1.0 + momentum) / curvature


def variance_is_finite(lr: float, curvature: float, spread: float) -> bool:
    """Whether multiplicative noise leaves the variance finite: lr Gamma < lambda (2 - lr lambda).

    ``spread``: Gamma, the variance of a batch's curvature in that direction.
    """
    return lr * spread < curvature * (2.0 - lr * curvature)


def monte_carlo_floor(runs: int) -> float:
    """Relative error that a perfect prediction shows against the variances of ``runs`` runs: sqrt(2 / (runs - 1))."""
    return float(np.sqrt(2.0 / (runs - 1)))


def relative_error(measured: np.ndarray, predicted: np.ndarray) -> float:
    """sqrt(mean_i (V_i / Vhat_i - 1)^2) over directions ``[D]``; the predictions have to be positive."""
    return float(np.sqrt(np.mean((measured / predicted - 1.0) ** 2)))


def log_correlation(measured: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson correlation of the logarithms of measured and predicted variances ``[D]``."""
    return float(np.corrcoef(np.log(measured), np.log(predicted))[0, 1])


def marchenko_pastur(directions: int, runs: int) -> tuple[float, float]:
    """Edges of the spectrum of Vhat^-1/2 V Vhat^-1/2 if the prediction is right: (1 -+ sqrt(D / (runs - 1)))^2."""
    q = np.sqrt(directions / (runs - 1))
    return float(max(0.0, 1.0 - q) ** 2), float((1.0 + q) ** 2)


def whitened_spectrum(measured: np.ndarray, predicted: np.ndarray, live: Sequence[int] | np.ndarray) -> np.ndarray:
    """Eigenvalues of Vhat^-1/2 V Vhat^-1/2 on the ``live`` eigendirections of the prediction (ascending order)."""
    values, vectors = np.linalg.eigh(predicted)
    chosen = np.asarray(live)
    scaled = vectors[:, chosen] / np.sqrt(values[chosen])
    return np.linalg.eigvalsh(scaled.T @ measured @ scaled)
