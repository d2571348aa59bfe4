"""What became of a faulted run, as one word: automatic labels with published thresholds, each run beside its twin.

The definitions, the shortest horizon every label needs and what they leave open are in docs/outcomes.md. Names follow
He et al. (ISCA 2023, doi 10.1145/3579371.3589105); the thresholds are ours. Accuracy is a share, 0..1, measured per
batch; steps are counted from the hit.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from .paired import Estimate, wilson

MASKED, RECOVERED = "Masked", "Recovered"
IMMEDIATE, SHORT_TERM, LATE = "ImmediateInfNan", "ShortTermInfNan", "LateInfNan"
SLOW, SHARP_SLOW, SHARP, LOW_TEST = "SlowDegrade", "SharpSlowDegrade", "SharpDegrade", "LowTestAccuracy"
TOO_SHORT, NOT_APPLICABLE = "TooShort", "NotApplicable"
LABELS = (
    *(MASKED, RECOVERED, LOW_TEST, SLOW, SHARP_SLOW, SHARP),
    *(IMMEDIATE, SHORT_TERM, LATE, TOO_SHORT, NOT_APPLICABLE),
)


@dataclass(frozen=True)
class Thresholds:
    """Where one outcome ends and the next begins; accuracies 0..1, lengths in steps after the hit.

    - ``tolerance`` 0.02: masked means within about 2 % of the fault-free twin, as published.
    - ``sharp_drop`` 0.1 over the first ``sharp_window`` 2 steps: a sharp drop is there at once. The published slow
      degradation (0.566, then 0.563, 0.459, 0.313, 0.263, 0.188, 0.182) loses 0.055 in two steps and is not sharp.
    - ``plateau`` 0.05: after a sharp drop, the faulted run's own accuracy moves by no more than this between its
      first ``level_window`` 10 steps and its last window (a plateau at the lower level), else it goes on falling or
      slowly recovers. Ten batches of 64 leave a standard error of at most 0.02 on a level.
    - ``final_window`` 20: the end of the run is the mean over its last 20 steps, so that one batch decides nothing.
    - ``immediate`` 1: non-finite in the faulty or the next iteration, as published. ``short_term`` 10: "a few
      iterations later"; beyond it the label is LateInfNan, which the published list does not have.
    - ``horizon`` 50: a slow degradation needs this many steps to show, so nothing is called masked before.
    """

    tolerance: float = 0.02
    sharp_drop: float = 0.1
    sharp_window: int = 2
    level_window: int = 10
    plateau: float = 0.05
    final_window: int = 20
    immediate: int = 1
    short_term: int = 10
    horizon: int = 50

    @property
    def sharp_horizon(self) -> int:
        """Steps after which a sharp drop that has not healed can be told from one that goes on: both windows."""
        return self.level_window + self.final_window


PUBLISHED = Thresholds()


@dataclass(frozen=True)
class Outcome:
    """One label of ``LABELS`` with what it was read from; drops are twin minus fault, None where not measured."""

    label: str
    note: str = ""
    first_drop: float | None = None
    final_drop: float | None = None
    test_drop: float | None = None
    non_finite_step: int | None = None


@dataclass(frozen=True)
class Curve:
    """One run from the hit on: arrays of equal length, ``step`` from 0 (the hit) rising.

    ``test_accuracy`` is NaN where it was not evaluated. ``bad_weights`` counts non-finite weights after the update.
    """

    step: np.ndarray
    train_loss: np.ndarray
    train_accuracy: np.ndarray
    test_loss: np.ndarray
    test_accuracy: np.ndarray
    bad_weights: np.ndarray


def first_non_finite(run: Curve) -> int | None:
    """The first iteration whose training loss is non-finite, or that starts from non-finite weights."""
    loss = run.step[~np.isfinite(run.train_loss)]
    weights = run.step[run.bad_weights > 0] + 1
    found = [int(part[0]) for part in (loss, weights) if len(part)]
    return min(found, default=None)


def classify(fault: Curve, twin: Curve, rule: Thresholds = PUBLISHED, chance: float = 0.1) -> Outcome:
    """The outcome of ``fault`` beside its ``twin``; see docs/outcomes.md for every definition.

    ``chance``: accuracy a run with a non-finite test loss is charged. Order: non-finite, no measure, too short, then
    the sizes of the drops.
    """
    if first_non_finite(twin) is not None:
        return Outcome(NOT_APPLICABLE, "the twin, which no fault touched, is non-finite itself")
    bad = first_non_finite(fault)
    if bad is not None:
        label = IMMEDIATE if bad <= rule.immediate else SHORT_TERM if bad <= rule.short_term else LATE
        return Outcome(label, f"non-finite from step {bad} after the hit", non_finite_step=bad)
    watched = int(min(fault.step.max(initial=0), twin.step.max(initial=0)))
    drops = _paired(fault, twin)
    if not np.isfinite(drops).any():
        return Outcome(NOT_APPLICABLE, "no training accuracy is recorded")
    first = _mean(drops[1 : rule.sharp_window + 1])
    final = _mean(drops[max(1, watched + 1 - rule.final_window) : watched + 1])
    test = _test_drop(fault, twin, max(1, watched + 1 - rule.final_window), chance)
    found = Outcome("", "", first, final, test)
    if watched < rule.sharp_horizon:
        return _with(found, TOO_SHORT, f"{watched} steps after the hit; a label needs {rule.sharp_horizon} or more")
    if first is None or final is None:
        return _with(found, TOO_SHORT, f"no training accuracy in the first {rule.sharp_window} or the last steps")
    sharp = first > rule.sharp_drop
    if sharp and final > rule.tolerance:
        return _after_sharp_drop(fault, found, watched, rule)
    if watched < rule.horizon:
        note = f"no lasting sharp drop in {watched} steps; {rule.horizon} are needed to rule a slow one out"
        return _with(found, TOO_SHORT, note)
    if final > rule.tolerance:
        return _with(found, SLOW, "")
    if test is None:
        return _with(found, NOT_APPLICABLE, "no test accuracy in the final window")
    if test > rule.tolerance:
        return _with(found, LOW_TEST, "")
    worst = max(first, _largest_window(drops[1:], rule.level_window))
    if worst > rule.sharp_drop:
        return _with(found, RECOVERED, f"down by {100 * worst:.0f} points for a time, back since")
    return _with(found, MASKED, "")


def _with(found: Outcome, label: str, note: str) -> Outcome:
    return Outcome(label, note, found.first_drop, found.final_drop, found.test_drop)


def _after_sharp_drop(fault: Curve, found: Outcome, watched: int, rule: Thresholds) -> Outcome:
    """SharpDegrade or SharpSlowDegrade, by how the faulted run's own accuracy moved since the drop."""
    own = _dense(fault)
    low = _mean(own[1 : rule.level_window + 1])
    end = _mean(own[max(1, watched + 1 - rule.final_window) : watched + 1])
    assert low is not None and end is not None  # the drops of the same windows exist
    if abs(end - low) <= rule.plateau:
        return _with(found, SHARP, "")
    return _with(found, SHARP_SLOW, "further decay" if end < low else "slow recovery")


def _dense(run: Curve) -> np.ndarray:
    """Training accuracy by step after the hit; NaN where no row was recorded."""
    out = np.full(int(run.step.max(initial=0)) + 1, math.nan)
    out[run.step] = run.train_accuracy
    return out


def _paired(fault: Curve, twin: Curve) -> np.ndarray:
    a, b = _dense(fault), _dense(twin)
    length = min(len(a), len(b))
    return b[:length] - a[:length]


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _largest_window(values: np.ndarray, width: int) -> float:
    """Largest mean over ``width`` consecutive steps, of those recorded."""
    means = (_mean(values[i : i + width]) for i in range(max(1, len(values) - width + 1)))
    return max((m for m in means if m is not None), default=-math.inf)


def _test_drop(fault: Curve, twin: Curve, since: int, chance: float) -> float | None:
    """Mean drop over the final window's evaluations, or at the last common one; a non-finite test loss is chance."""
    scores = {}
    for name, run in (("fault", fault), ("twin", twin)):
        seen = ~np.isnan(run.test_accuracy)
        accuracy = np.where(np.isfinite(run.test_loss), run.test_accuracy, chance)
        scores[name] = dict(zip(run.step[seen].tolist(), accuracy[seen].tolist(), strict=True))
    common = sorted(set(scores["fault"]) & set(scores["twin"]) - {0})
    if not common:
        return None
    late = [step for step in common if step >= since] or common[-1:]
    return float(np.mean([scores["twin"][s] - scores["fault"][s] for s in late]))


def clustered_rate(hits: Sequence[bool], replicates: Sequence[Hashable], level: float = 0.95) -> Estimate:
    """Share of ``hits`` among runs, with an interval that knows that runs of one replicate are not independent.

    One run per replicate: Wilson (1927). Several: Wilson at the effective number of runs p (1 - p) / variance, where
    the variance is between replicates (linearised ratio, Korn and Graubard 1998) and Student's t for its degrees of
    freedom replaces the normal quantile. Where all replicates agree, no variance can be seen: Wilson over
    replicates, as if each had one run. tests/test_outcomes.py measures the coverage, also that of a bootstrap over
    replicates, which covers too little at ten replicates.
    """
    if not len(hits):
        raise ValueError("hits: expected at least one run")
    groups: dict[Hashable, list[bool]] = {}
    for hit, replicate in zip(hits, replicates, strict=True):
        groups.setdefault(replicate, []).append(bool(hit))
    events, n, clusters = sum(map(bool, hits)), len(hits), len(groups)
    if n == clusters:
        return wilson(events, n, level)
    p = events / n
    shares = {sum(group) / len(group) for group in groups.values()}
    if clusters < 2 or (len(shares) == 1 and p in (0.0, 1.0)):
        found = wilson_of(p, clusters, float(special.ndtri(0.5 + level / 2)))
        return Estimate(p, n, *found, f"{100 * level:g} % Wilson interval over {clusters} replicates, all alike")
    spread = sum((sum(group) - p * len(group)) ** 2 for group in groups.values())
    variance = clusters / (clusters - 1) * spread / n**2
    effective = min(n, p * (1 - p) / variance) if variance > 0 else n
    quantile = float(special.stdtrit(clusters - 1, 0.5 + level / 2))
    method = f"{100 * level:g} % Wilson interval clustered by replicate ({clusters} replicates, t quantile)"
    return Estimate(p, n, *wilson_of(p, effective, quantile), method)


def wilson_of(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's limits for a share ``p`` of ``n`` (not necessarily whole) trials at quantile ``z``, within 0..1."""
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((centre + side * half) / (1 + z**2 / n) for side in (-1, 1))
    return max(0.0, min(p, low)), min(1.0, max(p, high))


def outcome_rates(
    labels: Sequence[str], replicates: Sequence[Hashable], names: Sequence[str] = LABELS
) -> Mapping[str, Estimate]:
    """Rate of every label in ``names``; over ``LABELS`` they add up to 1 because no run is left out."""
    return {name: clustered_rate([label == name for label in labels], replicates) for name in names}
