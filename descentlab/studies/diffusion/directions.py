"""Which moments and which directions of a cloud are looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def look_times(steps: int, looks: int, epoch: int, more: Sequence[int]) -> list[int]:
    """Numbers of updates after which the cloud is looked at, rising: half of ``looks`` even in time, half in its
    logarithm, half an epoch and the end, and ``more``."""
    even = np.linspace(1, steps, max(2, looks // 2))
    ratios = np.geomspace(1, steps, max(2, looks - looks // 2))
    first = [t for t in (*snapshot_times(steps, epoch, more), epoch) if 0 < t <= steps]
    return sorted({*even.round().astype(int).tolist(), *ratios.round().astype(int).tolist(), *first})


def snapshot_times(steps: int, epoch: int, more: Sequence[int]) -> list[int]:
    """Numbers of updates after which all weights are kept: half an epoch, the end, and ``more``."""
    half = max(1, epoch // 2)
    return sorted({min(half, steps), steps, *(t for t in more if 0 < t <= steps)})


def chosen_directions(eigenvalues: np.ndarray, count: int) -> np.ndarray:
    """Indices of ``count`` of the rising ``eigenvalues``: a third each from the top, evenly from all, from the
    bottom; sharpest first."""
    n = len(eigenvalues)
    count = min(count, n)
    third = max(1, count // 3)
    top, bottom = range(n - third, n), range(min(third, max(0, count - third)))
    between = np.linspace(len(bottom), n - third - 1, count - third - len(bottom) + 2)[1:-1].round().astype(int)
    return np.array(sorted({*top, *bottom, *between.tolist()}, reverse=True))


GROUPS = 20  # of runs, left out in turn


def group_variances(coordinates: np.ndarray) -> np.ndarray:
    """``[G, D]``: the variances along every direction when one of G groups of the runs ``[n, D]`` is left out, from
    which a jackknife gives the standard error of anything made of variances; empty for fewer than two runs a group."""
    n = len(coordinates)
    if n < 2 * GROUPS:
        return np.empty((0, coordinates.shape[1]))
    group = np.arange(n) * GROUPS // n
    return np.stack([coordinates[group != g].var(axis=0, ddof=1) for g in range(GROUPS)])


def without_pull(curvature: Mapping[str, np.ndarray], gamma: float) -> Mapping[str, np.ndarray]:
    """``hessian`` ``[D, D]`` and ``eigenvalues`` ``[D]`` without a pull of strength gamma."""
    if not gamma:
        return curvature
    h = curvature["hessian"]
    return {**curvature, "hessian": h - gamma * np.eye(len(h)), "eigenvalues": curvature["eigenvalues"] - gamma}
