"""Planned contrasts: what is compared, the outcome with Holm's correction, and the word a reader gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .paired import Estimate, Test, detectable, estimate, holm, paired_test

LOWER, HIGHER, NOISE, IDENTICAL, UNTESTED = "lower", "higher", "within noise", "identical", "not tested"
MIXED = "mixed"  # significant by ranks, while the mean points the other way (a few large differences)


@dataclass(frozen=True)
class Contrast:
    """A comparison named before the data: ``differences`` holds one number per replicate, in ``unit``."""

    name: str
    differences: Sequence[float] | np.ndarray
    unit: str = "nats"


@dataclass(frozen=True)
class ContrastResult:
    """A contrast with its estimate; ``p_holm`` is None when not tested, ``detectable`` in the contrast's unit."""

    name: str
    unit: str
    estimate: Estimate
    test: Test
    p_holm: float | None
    detectable: float | None
    verdict: str  # LOWER | HIGHER (than 0) | MIXED | NOISE | IDENTICAL | UNTESTED


def _verdict(result: Estimate, test: Test, p_holm: float | None, alpha: float, identical: bool) -> str:
    if identical:
        return IDENTICAL
    if p_holm is None:
        return UNTESTED
    if p_holm >= alpha:
        return NOISE
    if test.direction * result.value <= 0:
        return MIXED
    return LOWER if result.value < 0 else HIGHER


def analyse(contrasts: Sequence[Contrast], alpha: float = 0.05) -> list[ContrastResult]:
    """Estimate and test a whole planned family, family-wise level ``alpha`` by Holm.

    A contrast whose test cannot reach ``alpha / len(contrasts)``, the level the smallest p must meet, is not
    tested; it stays in the family (as p = 1), so leaving it out buys the others nothing. The detectable difference
    is for 80 % power at that same level.
    """
    level = alpha / max(1, len(contrasts))
    estimates = [estimate(contrast.differences) for contrast in contrasts]
    tests = [paired_test(contrast.differences, level) for contrast in contrasts]
    adjusted = holm([1.0 if test.p is None else test.p for test in tests])
    results = []
    for contrast, found, test, p in zip(contrasts, estimates, tests, adjusted, strict=True):
        p_holm = None if test.p is None else float(p)
        identical = not np.asarray(contrast.differences).any()
        smallest = detectable(found.sd, found.n, level)
        verdict = _verdict(found, test, p_holm, alpha, identical)
        results.append(ContrastResult(contrast.name, contrast.unit, found, test, p_holm, smallest, verdict))
    return results


def wins_ties_losses(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> tuple[int, int, int]:
    """How often ``first`` is below, equal to, above ``second``, pair by pair; +inf marks a failure (last rank)."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("ranks: expected numbers or +inf for a failure, got NaN")
    return int((a < b).sum()), int((a == b).sum()), int((a > b).sum())
