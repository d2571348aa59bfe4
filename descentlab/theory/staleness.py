"""What stale gradients do to plain and heavy-ball SGD on a quadratic, how stale they are, and how long updates take."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import integrate, special


def stability_limit(tau: int) -> float:
    """The least eta lambda at which theta_(t+1) = theta_t - eta lambda theta_(t - tau) stops converging:
    2 sin(pi / (2 (2 tau + 1))); 2 without delay, about pi / (2 tau) for a long one.

    At the limit a root z = exp(i phi) of z^(tau+1) - z^tau + eta lambda has phi = pi / (2 tau + 1).
    """
    return 2 * math.sin(math.pi / (2 * (2 * tau + 1)))


def growth_rate(eta_lambda: float, tau: int, momentum: float = 0.0) -> float:
    """The factor by which theta_(t+1) = theta_t + m (theta_t - theta_(t-1)) - eta lambda theta_(t - tau) grows per
    update in the long run: the largest modulus of the roots of
    z^(tau+2) - (1 + m) z^(tau+1) + m z^tau + eta lambda z."""
    coefficients = np.zeros(tau + 3)
    coefficients[0], coefficients[1] = 1.0, -(1.0 + momentum)
    coefficients[2] += momentum
    coefficients[tau + 1] += eta_lambda
    return float(np.abs(np.roots(coefficients)).max())


def momentum_limit(tau: int, momentum: float) -> float:
    """The least eta lambda at which heavy-ball SGD with constant staleness stops converging, by bisection."""
    low, high = 0.0, 2 * (1 + momentum)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if growth_rate(middle, tau, momentum) < 1 - 1e-12 else (low, middle)
    return high


def implicit_momentum(workers: int) -> float:
    """1 - 1/W: with exponentially distributed times, the mean of asynchronous SGD on a quadratic moves like SGD with
    this momentum and 1/W of the rate (arXiv 1605.09774, theorem 3)."""
    return 1.0 - 1.0 / workers


def expected_staleness(workers: int, group: int = 1) -> float:
    """Mean number of updates between reading and applying when nobody waits for more than its own group.

    Between the read and the update of one worker's gradient every other gradient under way is applied once on average
    whatever the speeds: W gradients are under way, so W / K - 1 other updates of K gradients for equal speeds (exact
    in the mean for K = 1 at any speeds).
    """
    return workers / group - 1.0


def slowest_mean_s(means_s: Sequence[float], stds_s: Sequence[float]) -> float:
    """E max_w N(mean_w, std_w^2), the time of a barrier's round: the integral of 1 - prod_w Phi over t >= 0."""
    means, stds = np.asarray(means_s, float), np.asarray(stds_s, float)
    if not stds.any():
        return float(means.max())
    top = float((means + 12 * stds).max())

    def late(t: float) -> float:
        spread = np.where(stds > 0, stds, 1.0)
        done = np.where(stds > 0, special.ndtr((t - means) / spread), (t >= means).astype(float))
        return 1.0 - float(done.prod())

    marks = sorted({float(m) for m in means if 0 < m < top})
    return float(integrate.quad(late, 0.0, top, points=marks, limit=200)[0])


def barrier_update_s(means_s: Sequence[float], stds_s: Sequence[float], message_s: float = 0.0) -> float:
    """Seconds of one update of W gradients behind a barrier: the slowest worker, and a message each way."""
    return slowest_mean_s(means_s, stds_s) + 2 * message_s


def asynchronous_update_s(means_s: Sequence[float], message_s: float = 0.0) -> float:
    """Seconds between updates when nobody waits: worker w makes one every mean_w + two messages."""
    return 1.0 / sum(1.0 / (mean + 2 * message_s) for mean in means_s)


def efficiency(samples_per_s: float, alone_per_s: float, workers: int) -> float:
    """Samples per second over those of as many single processes."""
    return samples_per_s / (workers * alone_per_s)
