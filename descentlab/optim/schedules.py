"""Learning-rate schedules: the rate of an update, from the base rate and the number of optimizer steps already made.

``t`` counts optimizer steps, not micro-batches and not epochs: a member that skips an update stays where it is.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction

Schedule = Callable[[float, int], float]  # (base lr, optimizer step from 0) -> lr


def constant(lr: float, step: int) -> float:
    """lr."""
    return lr


def linear(end: float, steps: int) -> Schedule:
    """lr + (end - lr) * min(step / steps, 1)."""

    def at(lr: float, step: int) -> float:
        return lr + (end - lr) * min(step / steps, 1.0)

    return at


def poly(power: float) -> Schedule:
    """lr * (1 + t)^-power."""
    return lambda lr, step: lr * (1 + step) ** -power


def _power(factor: float, count: int) -> float:
    try:
        return factor**count
    except OverflowError:  # a growing rate; the run then diverges and says so
        return math.inf


def multistep(milestones: Sequence[int], factor: float) -> Schedule:
    """lr * factor^k with k the number of ``milestones`` (ascending optimizer steps) that are at most t."""
    drops = list(milestones)
    return lambda lr, step: lr * _power(factor, bisect_right(drops, step))


def every(steps: int, factor: float) -> Schedule:
    """lr * factor^floor(t / steps)."""
    return lambda lr, step: lr * _power(factor, step // steps)


def parts_milestones(parts: Sequence[float], steps: int) -> list[int]:
    """The first optimizer step of every part but the first, when ``steps`` is cut into parts of these proportions.

    Part k begins at the smallest t with t / steps >= (parts[0] + … + parts[k - 1]) / sum(parts). Exact in the decimals
    as written: 0.1 is a tenth.
    """
    exact = [Fraction(repr(part)) for part in parts]
    return [math.ceil(steps * begun / sum(exact)) for begun in itertools.accumulate(exact[:-1])]


def exponential(factor: float) -> Schedule:
    """lr * factor^t."""
    return lambda lr, step: lr * _power(factor, step)


def cosine(end: float, steps: int) -> Schedule:
    """end + (lr - end) * (1 + cos(pi * min(t / steps, 1))) / 2."""
    return lambda lr, step: end + (lr - end) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def warmed(schedule: Schedule, steps: int) -> Schedule:
    """schedule(lr, t) * min(1, (t + 1) / steps); the schedule itself when ``steps`` is 0."""
    if steps == 0:
        return schedule
    return lambda lr, step: schedule(lr, step) * min(1.0, (step + 1) / steps)
