"""Outcome labels on made-up trajectories that define each of them, their boundaries, and the coverage of the rates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from descentlab.analysis import outcomes as o
from descentlab.analysis.outcomes import Curve, Thresholds, classify, clustered_rate
from descentlab.analysis.paired import wilson

HORIZON = 100
RULE = Thresholds()


def curve(accuracy: np.ndarray, test: float | np.ndarray | None = None, every: int = 10) -> Curve:
    """A finite run from the hit on; test accuracy as training accuracy less 0.02, or as given, every ten steps."""
    step = np.arange(len(accuracy))
    seen = (step % every == 0) | (step == step[-1])
    tested = np.broadcast_to(accuracy - 0.02 if test is None else np.asarray(test, dtype=float), step.shape)
    loss = 2.3 * (1 - accuracy) + 0.05
    return Curve(
        step, loss, accuracy, np.where(seen, loss, np.nan), np.where(seen, tested, np.nan), np.zeros(len(step))
    )


def drop(size: float, fade: float = math.inf, delay: int = 0, horizon: int = HORIZON) -> np.ndarray:
    """Twin at 0.9; the run ``size`` below it from the step after the hit (+ delay), healing over ``fade`` steps."""
    since = np.arange(horizon + 1) - 1 - delay
    return 0.9 - np.where(since >= 0, size * np.exp(-np.maximum(since, 0) / fade), 0.0)


TWIN = curve(drop(0.0))


def non_finite(step: int, weights: bool = False) -> Curve:
    run = curve(drop(0.0))
    loss, bad = run.train_loss.copy(), run.bad_weights.copy()
    if weights:
        bad[step:] = 7
    else:
        loss[step:] = math.nan
    return replace(run, train_loss=loss, bad_weights=bad)


def falling(size: float, over: int, start: float = 0.9, horizon: int = HORIZON) -> np.ndarray:
    return start - size * np.clip(np.arange(horizon + 1) / over, 0, 1)


CASES = {
    "nothing happened": (drop(0.0), None, o.MASKED),
    "one bad batch": (np.where(np.arange(HORIZON + 1) == 1, 0.75, 0.9), None, o.MASKED),
    "sharp, healed": (drop(0.5, fade=5), None, o.RECOVERED),
    "slow, healed": (drop(0.0) - 0.3 * np.exp(-(((np.arange(HORIZON + 1) - 30) / 12) ** 2)), None, o.RECOVERED),
    "training normal, test broken": (drop(0.0), 0.1, o.LOW_TEST),
    "falls over many steps": (falling(0.6, 60), None, o.SLOW),
    "frozen while the twin learns": (np.full(HORIZON + 1, 0.3), None, o.SLOW),
    "drops and stays": (drop(0.4), None, o.SHARP),
    "drops and goes on falling": (drop(0.3) - falling(0.3, 80, 0.0) * -1, None, o.SHARP_SLOW),
    "drops and recovers slowly": (drop(0.6, fade=60), None, o.SHARP_SLOW),
}


@pytest.mark.parametrize("name", CASES)
def test_each_outcome_on_the_trajectory_that_defines_it(name: str) -> None:
    accuracy, test, label = CASES[name]
    twin = TWIN
    if name.startswith("frozen"):
        twin = curve(0.3 + 0.6 * (1 - np.exp(-np.arange(HORIZON + 1) / 20)))
    found = classify(curve(accuracy, test), twin)
    assert found.label == label
    assert found.final_drop is not None and found.test_drop is not None and found.non_finite_step is None


@pytest.mark.parametrize(
    ("step", "weights", "label"),
    [
        (0, False, o.IMMEDIATE), (1, False, o.IMMEDIATE), (2, False, o.SHORT_TERM), (10, False, o.SHORT_TERM),
        (11, False, o.LATE), (0, True, o.IMMEDIATE), (1, True, o.SHORT_TERM), (9, True, o.SHORT_TERM),
        (10, True, o.LATE),
    ],
)  # fmt: skip
def test_non_finite_runs_by_when(step: int, weights: bool, label: str) -> None:
    """Non-finite weights after update k are met by iteration k + 1; counted as k the fifth and eighth rows fail."""
    found = classify(non_finite(step, weights), TWIN)
    assert found.label == label and found.non_finite_step == step + weights


def test_thresholds_are_where_they_are_published() -> None:
    """A hair on either side of every boundary."""
    for size, label in ((0.0199, o.MASKED), (0.0201, o.SLOW)):
        assert classify(curve(drop(size)), TWIN).label == label
    for size, label in ((0.0999, o.SLOW), (0.1001, o.SHARP)):
        assert classify(curve(drop(size)), TWIN).label == label
    for gap, label in ((0.0199, o.MASKED), (0.0201, o.LOW_TEST)):
        assert classify(curve(drop(0.0), 0.88 - gap), TWIN).label == label
    for change, label in ((0.0499, o.SHARP), (0.0501, o.SHARP_SLOW)):
        moved = np.where(np.arange(HORIZON + 1) > 50, 0.4 + change, 0.4)
        moved[0] = 0.9
        assert classify(curve(moved), TWIN).label == label
    at = np.arange(HORIZON + 1)
    for size, label in ((0.0999, o.MASKED), (0.1001, o.RECOVERED)):
        assert classify(curve(drop(0.0) - size * ((at > 20) & (at <= 30))), TWIN).label == label


def test_a_label_needs_its_horizon_and_says_so() -> None:
    """A run watched for too few steps is never called masked; infinities are seen at once."""
    for steps, label in ((29, o.TOO_SHORT), (30, o.SHARP)):
        found = classify(curve(drop(0.5, horizon=steps)), curve(drop(0.0, horizon=steps)))
        assert found.label == label and (f"{steps} steps" in found.note) == (label == o.TOO_SHORT)
    for accuracy, label in ((0.0, o.MASKED), (0.05, o.SLOW)):
        for steps in (49, 50):
            found = classify(curve(drop(accuracy, horizon=steps)), curve(drop(0.0, horizon=steps)))
            assert found.label == (label if steps == 50 else o.TOO_SHORT)
            assert steps == 50 or "50 are needed" in found.note
    short = curve(drop(0.0, horizon=3))
    assert classify(replace(short, train_loss=np.array([1, np.inf, 1, 1])), short).label == o.IMMEDIATE


def test_a_broken_test_loss_is_a_low_test_accuracy_not_a_missing_one() -> None:
    """BatchNorm variance of infinity: training is normal, the test loss is not a number."""
    run = curve(drop(0.0))
    test = np.where(np.isnan(run.test_accuracy), np.nan, 0.9)  # whatever arg max of NaN gives
    found = classify(replace(run, test_loss=np.full(HORIZON + 1, np.nan), test_accuracy=test), TWIN)
    assert found.label == o.LOW_TEST and found.test_drop == pytest.approx(0.78)


def test_what_cannot_be_judged_is_not_applicable() -> None:
    assert "twin" in classify(TWIN, non_finite(40)).note
    missing = replace(TWIN, train_accuracy=np.full(HORIZON + 1, np.nan))
    assert classify(missing, missing).label == o.NOT_APPLICABLE
    untested = replace(TWIN, test_accuracy=np.full(HORIZON + 1, np.nan), test_loss=np.full(HORIZON + 1, np.nan))
    assert classify(untested, untested).label == o.NOT_APPLICABLE


def test_rows_may_be_sparse() -> None:
    """observe.every = 7: windows average what is there."""
    runs = curve(drop(0.4), every=1), curve(drop(0.0), every=1)
    sparse = [Curve(*(part[::7] for part in vars(run).values())) for run in runs]
    assert classify(*sparse).label == o.TOO_SHORT  # no row in the first two steps: sharp or not cannot be told
    one = [Curve(*(part[1::7] for part in vars(run).values())) for run in runs]
    assert classify(*one).label == o.SHARP


def test_the_published_slow_degradation_is_slow_and_the_masked_one_masked() -> None:
    """Reference curves of ISCA 2023: 0.566, 0.563, 0.459 … 0.182, at the end 0.439 where a healthy run has 0.894."""
    start = [0.566, 0.563, 0.459, 0.313, 0.263, 0.188, 0.182]
    accuracy = np.concatenate([start, np.linspace(0.182, 0.439, HORIZON + 1 - len(start))])
    healthy = np.linspace(0.566, 0.894, HORIZON + 1)
    assert classify(curve(accuracy), curve(healthy)).label == o.SLOW
    assert classify(curve(healthy - np.linspace(0, 0.006, HORIZON + 1)), curve(healthy)).label == o.MASKED


def test_rates_of_one_run_per_replicate_are_wilsons() -> None:
    assert clustered_rate([True, False, False], [0, 1, 2]) == wilson(1, 3)


def test_runs_of_one_replicate_do_not_count_as_many() -> None:
    """Ten copies of every replicate carry what one does; the naive interval would be 10 ** 0.5 narrower."""
    once, replicates = [True, True, False, True, False, False, True, False], list(range(8))
    copied = clustered_rate(once * 10, replicates * 10)
    low, high = o.wilson_of(0.5, 8 * 7 / 8, 2.3646)
    assert (copied.low, copied.high) == pytest.approx((low, high), abs=1e-4)
    assert "clustered by replicate (8" in copied.method and copied.n == 80
    none = clustered_rate([False] * 30, list(range(3)) * 10)
    assert none.high == pytest.approx(wilson(0, 3).high) and none.low == 0


@pytest.mark.parametrize(("clusters", "size", "a", "b"), [(10, 18, 1.0, 3.0), (10, 6, 0.4, 1.6), (40, 4, 1.0, 4.0)])
def test_clustered_intervals_cover_the_truth_where_naive_and_bootstrap_ones_do_not(
    clusters: int, size: int, a: float, b: float
) -> None:
    """1,000 campaigns with a rate per replicate drawn from a beta law: coverage 0.93 to 0.99 where 0.95 is said."""
    rng, rounds = np.random.default_rng(1), 1000
    covered = {"clustered": 0, "naive": 0, "bootstrap": 0}
    replicates = np.repeat(np.arange(clusters), size).tolist()
    for _ in range(rounds):
        hits = rng.random((clusters, size)) < rng.beta(a, b, clusters)[:, None]
        resampled = hits.mean(1)[rng.integers(0, clusters, (200, clusters))].mean(1)
        found, naive = clustered_rate(hits.ravel().tolist(), replicates), wilson(int(hits.sum()), hits.size)
        limits = {
            "clustered": (found.low, found.high),
            "naive": (naive.low, naive.high),
            "bootstrap": np.quantile(resampled, [0.025, 0.975]),
        }
        for name, (low, high) in limits.items():
            covered[name] += low <= a / (a + b) <= high  # type: ignore[operator]
    share = {name: count / rounds for name, count in covered.items()}
    assert 0.93 <= share["clustered"] <= 0.99 and share["naive"] < 0.9
    assert share["bootstrap"] < 0.9 or clusters > 10


def test_rates_of_all_labels_add_up_to_one() -> None:
    labels = [o.MASKED, o.SLOW, o.NOT_APPLICABLE, o.TOO_SHORT, o.MASKED]
    rates = o.outcome_rates(labels, range(5))
    assert tuple(rates) == o.LABELS and sum(rate.value for rate in rates.values()) == pytest.approx(1)
    assert rates[o.MASKED].value == 0.4 and rates[o.SHARP].high is not None
