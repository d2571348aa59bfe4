"""Is the end of a descent a critical point, or does it go round one?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ALTERNATES = 0.05  # |theta_T - theta_(T-2)| / |theta_T - theta_(T-1)| below which a path goes to and fro
AT_REST = 1e-13  # a last step this small beside the weights is rounding


@dataclass(frozen=True)
class Orbit:
    """``ratio`` = |theta_T - theta_(T-2)| / |theta_T - theta_(T-1)|: 2 for a path that goes on, 0 for one of period 2;
    ``step`` = |theta_T - theta_(T-1)|."""

    step: float
    ratio: float
    period_two: bool


def period_two(path: np.ndarray) -> Orbit:
    """The last three points of a gradient descent, ``[3, D]``, judged.

    At lr lambda_max = 2 a quadratic's path alternates for ever; on a curved valley gradient descent ends there when its
    sharpness has grown to 2 / lr.
    """
    before, last, now = np.asarray(path, dtype=float)[-3:]
    step, double = float(np.linalg.norm(now - last)), float(np.linalg.norm(now - before))
    rest = step <= AT_REST * max(1.0, float(np.linalg.norm(now)))
    ratio = 2.0 if rest else double / step
    return Orbit(step, ratio, not rest and ratio < ALTERNATES)
