"""Statistics against scipy, brute force, hand examples and published numbers; measures against planted effects."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy import stats
from synthetic import FakeResults, crossed_results, recovery_results

from descentlab.analysis.contrasts import (
    HIGHER,
    IDENTICAL,
    LOWER,
    MIXED,
    NOISE,
    UNTESTED,
    Contrast,
    analyse,
    wins_ties_losses,
)  # fmt: skip
from descentlab.analysis.failures import PENDING, excess_losses, final_scores
from descentlab.analysis.paired import (
    detectable,
    estimate,
    holm,
    paired_test,
    power,
    pratt_p,
    replicate_means,
    sign_flip_p,
    wilson,
)  # fmt: skip
from descentlab.analysis.recovery import aligned, analyse_recovery, steps_to_recover
from descentlab.analysis.results import cell_settings, condition_labels, last_attempts, planned_pairs

RNG = np.random.default_rng(5)
TEN = RNG.normal(0.3, 1, 10)


def test_interval_under_twenty_is_students_t_as_scipy_has_it() -> None:
    found = estimate(TEN)
    reference = stats.ttest_1samp(TEN, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert found.n == 10 and "paired t" in found.method
    assert found.dz == pytest.approx(TEN.mean() / TEN.std(ddof=1))


def test_interval_from_twenty_is_a_bootstrap_and_repeats_to_the_bit() -> None:
    skewed = RNG.lognormal(0, 1, 30)
    first, second = estimate(skewed), estimate(skewed)
    assert first == second and "BCa" in first.method
    spread = skewed.std(ddof=1) / math.sqrt(30)
    assert first.low is not None and first.high is not None
    assert 1.4 * spread < first.high - first.low < 6 * spread
    assert first.high - first.value > first.value - first.low  # follows the skew, which a t interval cannot


@pytest.mark.parametrize(("n", "rounds", "resamples"), [(8, 1500, 0), (25, 250, 499)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(n: int, rounds: int, resamples: int) -> None:
    """The mutant 'normal quantile instead of t' covers 90.5 % at n = 8 and fails here."""
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(rounds):
        found = estimate(rng.normal(1.0, 2.0, n), resamples=resamples or 999)
        assert found.low is not None and found.high is not None
        covered += found.low <= 1.0 <= found.high
    error = 3.3 * math.sqrt(0.95 * 0.05 / rounds)
    slack = 0.0 if n < 20 else 0.02  # a bootstrap of 25 points is known to cover a little less
    assert 0.95 - error - slack <= covered / rounds <= 0.95 + error


def test_one_replicate_has_no_interval_and_non_finite_values_are_refused() -> None:
    assert estimate([0.5]).low is None
    assert paired_test([0.5]).p is None
    with pytest.raises(ValueError, match="finite"):
        estimate([0.1, math.nan])


def test_values_of_one_replicate_count_once() -> None:
    assert replicate_means([1, 3, 10], ["a", "a", "b"]).tolist() == [2, 10]


def brute_force_pratt(d: np.ndarray) -> float:
    """All sign patterns of the non-zero differences, ranks taken with the zeros in."""
    ranks = stats.rankdata(np.abs(d))[d != 0]
    observed = ranks[d[d != 0] > 0].sum()
    sums = np.array(
        [
            sum(r for r, s in zip(ranks, signs, strict=True) if s)
            for signs in itertools.product((0, 1), repeat=len(ranks))
        ]
    )
    return min(1.0, 2 * min((sums <= observed + 1e-9).mean(), (sums >= observed - 1e-9).mean()))


@pytest.mark.parametrize("seed", range(6))
def test_pratt_equals_brute_force_with_zeros_and_ties(seed: int) -> None:
    d = np.random.default_rng(seed).integers(-3, 5, 10).astype(float)
    d[0] = 0.0
    assert pratt_p(d) == pytest.approx(brute_force_pratt(d))


def test_pratt_without_zeros_or_ties_is_scipys_exact_wilcoxon() -> None:
    assert pratt_p(TEN) == pytest.approx(stats.wilcoxon(TEN, method="exact").pvalue)


def test_the_test_is_chosen_by_the_data_and_says_so() -> None:
    assert paired_test(TEN).method == "paired t"
    assert paired_test(TEN).p == pytest.approx(stats.ttest_1samp(TEN, 0).pvalue)
    assert "Pratt" in paired_test([0.0, *TEN]).method
    many = RNG.normal(0.4, 1, 40)
    assert "sign-flip" in paired_test(many).method
    assert sign_flip_p(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def test_a_test_that_cannot_reach_its_level_is_not_run_and_says_so() -> None:
    """Four non-zero differences beside a zero: the smallest p is 2/16, whatever they are."""
    answer = paired_test([0.0, 1.0, 2.0, 3.0, 4.0], level=0.05)
    assert answer.p is None and "0.12" in answer.note
    assert paired_test([0.0, 1, 2, 3, 4, 5, 6], level=0.05).p == pytest.approx(2 / 64)
    assert paired_test([0.0, 1, 2, 3, 4, 5, 6], level=0.05 / 6).p is None


def test_holm_by_hand() -> None:
    """Holm (1979) by hand: sorted .01 .03 .04 times 3 2 1, then made monotone."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])


def test_power_is_the_textbooks() -> None:
    """G*Power 3: paired t, two-sided 0.05: d_z 0.5 and n 34 give 0.808; d_z 0.8 and n 15 give 0.821."""
    assert power(0.5, 34) == pytest.approx(0.808, abs=5e-4)
    assert power(0.8, 15) == pytest.approx(0.821, abs=5e-4)
    smallest = detectable(2.0, 34)
    assert smallest is not None and power(smallest / 2.0, 34) == pytest.approx(0.8)
    for effect, n, alpha in ((0.3, 5, 0.05), (2.0, 4, 0.01), (1.0, 12, 0.05)):
        critical, shift = stats.t.isf(alpha / 2, n - 1), effect * math.sqrt(n)
        known = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
        assert power(effect, n, alpha) == pytest.approx(known, rel=1e-6)
    for n in (2, 3, 5, 12):  # scipy's noncentral t answers NaN for some of these
        effect = detectable(1.0, n, 0.05 / 6)
        assert effect is not None and math.isfinite(effect)
    assert detectable(0.0, 10) is None


def test_wilson_by_formula() -> None:
    z, p, n = stats.norm.ppf(0.975), 0.1, 10
    centre, half = (p + z * z / 20) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / 400) / (1 + z * z / n)
    found = wilson(1, 10)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))
    assert wilson(0, 10).high > 0.2  # no failure in ten is no proof of none


def test_verdicts() -> None:
    base = np.random.default_rng(0).normal(0, 0.1, 12)
    planned = {
        HIGHER: base + 1,
        LOWER: base - 1,
        NOISE: base,
        IDENTICAL: np.zeros(12),
        UNTESTED: np.array([0.0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]),
        MIXED: np.array([0.0, *(-0.1 - 0.01 * np.arange(10)), 100.0]),
    }
    found = analyse([Contrast(name, values) for name, values in planned.items()])
    for result in found:
        assert result.verdict == (NOISE if result.name == MIXED else result.name)
    alone = analyse([Contrast("a few large ones", np.array([0.0, *(-0.1 - 0.01 * np.arange(18)), 100.0]))])
    assert alone[0].verdict == MIXED  # 18 of 20 below zero, the mean far above


def test_an_untestable_contrast_stays_in_the_family() -> None:
    d = np.random.default_rng(1).normal(0.8, 1, 10)
    single = analyse([Contrast("a", d)])[0]
    family = analyse([Contrast("a", d), Contrast("b", np.zeros(10))])[0]
    assert single.p_holm is not None and family.p_holm == pytest.approx(min(1.0, 2 * single.p_holm))


def test_wins_ties_losses() -> None:
    inf = math.inf
    assert wins_ties_losses([1, 2, 3, inf, inf], [2, 2, 1, 5, inf]) == (1, 2, 2)
    with pytest.raises(ValueError, match="NaN"):
        wins_ties_losses([math.nan], [0.0])


def groups_of(results: FakeResults) -> list[list[str]]:
    ids = [run["id"] for run in results.runs]
    return [ids[i : i + 2] for i in range(0, len(ids), 2)]


def test_a_failure_is_charged_and_never_dropped() -> None:
    results = recovery_results(diverge=(("sgd", 4),))
    scores = final_scores(results, groups_of(results), classes=10)
    failed = scores["sgd-4-fault"]
    finite = [s.test_loss for s in scores.by_run.values() if not s.failed]
    assert failed.failed and failed.test_accuracy == pytest.approx(0.1)
    assert failed.test_loss == pytest.approx(max(math.log(10), *finite))
    assert len(scores.by_run) == 80 and [s.run for s in scores.failures()] == ["sgd-4-fault"]


def test_a_failure_is_charged_the_worst_loss_where_that_is_more_than_chance() -> None:
    results = recovery_results()
    worse = pl.when((pl.col("run") == "adam-1-fault") & pl.col("test_loss").is_not_null()).then(50.0)
    results.frame = results.frame.with_columns(worse.otherwise(pl.col("test_loss")).alias("test_loss"))
    assert final_scores(results, groups_of(results), 10)["sgd-4-fault"].test_loss == 50.0


@pytest.mark.parametrize("column", ["test_loss", "train_loss", "nonfinite_params"])
def test_a_run_called_done_that_ends_non_finite_is_a_failure(column: str) -> None:
    results = recovery_results(diverge=())
    last = (pl.col("run") == "adam-3-fault") & (pl.col("step") == pl.col("step").max().over("run"))
    bad = 7 if column == "nonfinite_params" else math.nan
    results.frame = results.frame.with_columns(pl.when(last).then(bad).otherwise(pl.col(column)).alias(column))
    assert final_scores(results, groups_of(results), 10)["adam-3-fault"].failed


def test_a_failure_ranks_last_even_beside_a_poor_twin() -> None:
    """Without the floor the failure's excess would be 3 - 2 = 1, better than the survivor's 2.5."""
    results = recovery_results()
    score = final_scores(results, groups_of(results), 10)["sgd-4-fault"]
    failed, survivor = replace(score, test_loss=3.0), replace(score, state="done", test_loss=3.0)
    poor, good = replace(survivor, test_loss=2.0), replace(survivor, test_loss=0.5)
    assert excess_losses([failed, survivor], [poor, good]) == [2.5, 2.5]


def test_a_failed_twin_does_not_credit_the_fault() -> None:
    """A crashed control must not make the faulted run look better than no fault."""
    results = recovery_results(diverge=())
    for line in results.status:
        if line["run"] == "adam-3-twin":
            line.update(status="failed", message="out of memory")
    recovery = analyse_recovery(results, 10)
    row = recovery.measures.filter((pl.col("condition") == "adam") & (pl.col("replicate") == 3)).row(0, named=True)
    assert row["twin_failed"] and not row["failed"] and row["rank_score"] == math.inf
    assert row["excess_test_loss"] == recovery.measures["excess_test_loss"].max()
    assert row["excess_test_accuracy"] == recovery.measures["excess_test_accuracy"].min()


def test_unfinished_runs_are_in_no_statistic_and_counted() -> None:
    results = recovery_results(diverge=())
    results.status = [s for s in results.status if s["run"] != "adam-0-fault"]
    recovery = analyse_recovery(results, 10)
    assert [s.state for s in recovery.scores.pending()] == [PENDING]
    assert len(recovery.measures.filter(pl.col("condition") == "adam")) == 9


def test_masked_faults_give_exactly_zero() -> None:
    recovery = analyse_recovery(recovery_results(masked=(2,)), 10)
    masked = recovery.measures.filter(pl.col("replicate") == 2)
    assert masked["excess_test_loss"].to_list() == [0.0] * 4
    assert masked["area"].to_list() == [0.0] * 4 and masked["recovery_steps"].to_list() == [1] * 4


def test_measures_by_hand() -> None:
    """One case read straight from the frame; breaks when the hit index slips by one."""
    results = recovery_results()
    row = (
        analyse_recovery(results, 10)
        .measures.filter((pl.col("condition") == "adam") & (pl.col("replicate") == 1))
        .row(0, named=True)
    )
    hit = results.campaign[1]["step"]
    fault, twin = (
        results.frame.filter(pl.col("run") == f"adam-1-{role}")["train_loss"].to_numpy() for role in ("fault", "twin")
    )
    assert row["pre_hit_loss"] == fault[hit - 1] == twin[hit - 1]
    assert row["hit_loss"] == fault[hit] and row["post_hit_loss"] == fault[hit + 1]
    assert row["excess_at_hit"] == pytest.approx(fault[hit] - twin[hit]) and row["excess_at_hit"] > 0.1
    assert row["peak_excess"] == pytest.approx(np.max(fault[hit:] - twin[hit:]))
    assert row["area"] == pytest.approx(np.trapezoid(fault[hit:] - twin[hit:]))
    tests = results.frame.filter((pl.col("run") == "adam-1-fault") & pl.col("test_loss").is_not_null())
    assert row["final_test_loss"] == tests["test_loss"][-1] and row["final_step"] == tests["step"][-1] == hit + 100
    assert row["pre_hit_test_loss"] == tests.filter(pl.col("step") < hit)["test_loss"][-1]


def test_steps_to_recover_need_a_streak_and_may_be_never() -> None:
    at = np.arange(-2, 9)
    excess = np.array([0, 0, 9, 0.01, 1, 0.01, 0.02, 0, 0, 0, 0])
    assert steps_to_recover(at, excess) == 3  # the single good batch at step 1 does not count
    assert steps_to_recover(at, np.full(11, 0.2)) is None
    assert steps_to_recover(at, np.full(11, np.nan)) is None


def test_trajectories_are_aligned_at_each_cases_own_hit_and_keep_failed_runs() -> None:
    recovery = analyse_recovery(recovery_results(), 10)
    steps = np.arange(-10, 101)
    gap = aligned(recovery, "adam", "train_loss", steps) - aligned(recovery, "adam", "train_loss_twin", steps)
    before, at = gap[:, steps < 0], gap[:, steps == 0]
    assert np.nanmax(np.abs(before)) == 0.0 and (np.delete(at, 2) > 0.05).all()  # case 2 is masked
    failed = aligned(recovery, "sgd", "train_accuracy", steps, failed_value=0.1)[4]
    assert (failed[steps >= 10] == 0.1).all() and failed[steps == 0] > 0.1


def test_conditions_are_named_by_what_tells_them_apart() -> None:
    cells = {
        0: {"optimizer": "sgd", "optimizer.lr": 0.1, "batch_size": 64},
        1: {"optimizer": "sgd", "optimizer.lr": 0.1, "batch_size": 32},
        2: {"optimizer": "adam", "optimizer.lr": 0.01, "batch_size": 64},
    }
    assert condition_labels(cells) == {0: "sgd,batch_size=64", 1: "sgd,batch_size=32", 2: "adam"}
    assert planned_pairs(cells) == [(0, 2)]  # not sgd at 32 against adam at 64


def test_only_the_last_attempt_of_a_step_counts() -> None:
    frame = pl.DataFrame({"run": ["a"] * 3, "step": [0, 1, 1], "attempt": [0, 1, 0], "train_loss": [1.0, 2.0, 9.0]})
    assert last_attempts(frame)["train_loss"].to_list() == [1.0, 2.0]


def test_an_observable_is_not_mistaken_for_a_setting() -> None:
    results = crossed_results(replicates=2)
    results.frame = results.frame.with_columns(pl.int_range(pl.len()).alias("some_new_observable"))
    assert "some_new_observable" not in cell_settings(results.frame)[0]
