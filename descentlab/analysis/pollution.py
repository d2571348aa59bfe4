"""Which state a fault polluted, by how much, and when that fades: measured beside the twin, predicted by theory.

Ratios are of the faulted run to its twin at the same step; the hit step's are after its update. A ratio that is not a
number because the fault made the state non-finite counts as infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..theory.slots import WITHIN, slot_steps, update_steps, variance_steps

POLLUTED = 10.0  # a state is called polluted from this ratio to the twin on; batch noise alone stays far below
BN_MOMENTUM = 0.1  # torch's default, which every shipped model uses
FROZEN = 0.5  # updates are called frozen when right after the hit they are below this share of the twin's
STATES = {"slot_max": "optimizer slot", "bn_var_max": "BatchNorm variance", "update_norm": "weights"}


def ratio(fault: np.ndarray, twin: np.ndarray) -> np.ndarray:
    """fault / twin elementwise; infinite where only the fault's side is not finite, NaN where the twin has nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        out = fault / twin
    return np.where(~np.isfinite(fault) & np.isfinite(twin), np.inf, out)


def last_abnormal(at: np.ndarray, ratios: np.ndarray) -> int | None:
    """Steps after the hit until the ratio is within 10 % of 1 for good; 0 at once, None not within what was watched.

    The same count as ``theory.slots.steps_until_normal``: the last step k that is off by more than 10 %.
    """
    later = np.flatnonzero((at >= 1) & ~(np.abs(ratios - 1) <= WITHIN))
    if not len(later):
        return 0
    return None if at[later[-1]] == at.max() else int(at[later[-1]])


def smoothing(rows: int) -> int:
    """Rows of the centred moving average over sizes of updates: a twentieth of what was watched, odd, at most 41."""
    return max(1, min(41, rows // 20)) | 1


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average of those that are finite, shorter at the ends; NaN where there is none."""
    half, known = width // 2, np.isfinite(values)
    total, count = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(known, values, 0.0), known))
    low = np.maximum(0, np.arange(len(values)) - half)
    high = np.minimum(len(values), np.arange(len(values)) + half + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def frozen_steps(at: np.ndarray, ratios: np.ndarray) -> int | None:
    """Steps after the hit until updates are back at 90 % of the twin's; 0 if never frozen, None if not back.

    Read from the moving average over :func:`smoothing` rows; frozen means below ``FROZEN`` right after the hit.
    """
    known = (at >= 1) & np.isfinite(ratios)
    if not known.any():
        return 0
    steps, level = at[known], moving_average(ratios[known], smoothing(int(known.sum())))
    if level[0] >= FROZEN:
        return 0
    back = np.flatnonzero(level >= 1 - WITHIN)
    return int(steps[back[0]]) - 1 if len(back) else None


def pollution(
    at: np.ndarray, series: Mapping[str, np.ndarray], optimizer: Mapping[str, Any], spike: float | None = None
) -> dict[str, Any]:
    """What one hit did to slots, BatchNorm variance and weights.

    ``at``: steps from the hit; ``series``: every column of ``STATES`` and its ``…_twin`` that was recorded, NaN where
    missing. ``optimizer``: its settings. Keys: ``polluted`` (names joined by " + ", or "none"), and for slot and
    BatchNorm ``…_ratio`` at the hit, ``…_steps`` measured and ``…_predicted`` until within 10 % (None: not within the
    horizon, or nothing known; see ``theory.slots``), ``update_ratio``, ``frozen_steps`` (:func:`frozen_steps`) and,
    where the fault was a factor ``spike`` on one gradient, ``frozen_predicted``.
    """
    out: dict[str, Any] = {}
    names = []
    for column, key in (("slot_max", "slot"), ("bn_var_max", "bn"), ("update_norm", "update")):
        fault, twin = series.get(column), series.get(f"{column}_twin")
        found = None
        if fault is not None and twin is not None and np.isfinite(twin[at == 0]).any():
            ratios = ratio(fault, twin)
            found = float(ratios[at == 0][0])
            if math.isnan(found):
                found = None  # 0 / 0: neither side has anything there
            if key != "update":
                out[f"{key}_steps"] = last_abnormal(at, ratios)
                normal = float(twin[at == 0][0])
                out[f"{key}_predicted"] = _predicted(key, found, normal, optimizer)
            else:
                out["frozen_steps"] = frozen_steps(at, ratios)
                out["frozen_predicted"] = None if spike is None else update_steps(optimizer, abs(spike))
        out[f"{key}_ratio"] = found
        if found is not None and found >= POLLUTED:
            names.append(STATES[column])
    missing = dict.fromkeys(f"{key}_{what}" for key in ("slot", "bn", "frozen") for what in ("steps", "predicted"))
    return {**missing, **out, "polluted": " + ".join(names) or "none"}


def _predicted(key: str, found: float | None, normal: float, optimizer: Mapping[str, Any]) -> float | None:
    if found is None:
        return None
    return slot_steps(optimizer, found, normal) if key == "slot" else variance_steps(found, BN_MOMENTUM)


def censored_median(steps: Sequence[int | float | None], watched: int) -> tuple[float, bool]:
    """Median of step counts in which None is longer than ``watched``; (value, whether it is only a lower bound)."""
    filled = sorted(math.inf if s is None else float(s) for s in steps)
    middle = (filled[(len(filled) - 1) // 2] + filled[len(filled) // 2]) / 2
    return (float(watched), True) if math.isinf(middle) else (middle, False)
