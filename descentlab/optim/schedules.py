"""Learning-rate schedules: a factor on the base rate as a function of the number of updates already made."""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[float, int], float]  # (base lr, optimizer step from 0) -> lr


def constant(lr: float, step: int) -> float:
    """lr."""
    return lr


def linear(end: float, steps: int) -> Schedule:
    """lr + (end - lr) * min(step / steps, 1)."""

    def at(lr: float, step: int) -> float:
        return lr + (end - lr) * min(step / steps, 1.0)

    return at
