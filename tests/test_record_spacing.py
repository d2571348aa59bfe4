"""Reports of runs that recorded every few steps, of runs that failed, and how long updates stay frozen."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import polars as pl
from synthetic import recovery_results

from descentlab.analysis.pollution import frozen_steps, moving_average, pollution, smoothing
from descentlab.analysis.recovery import aligned, analyse_recovery, step_grid
from descentlab.analysis.results import condition_labels, value_text
from descentlab.report.exports.v3_measures import gather, outcome_labels
from descentlab.report.figures import broken, legend_columns
from descentlab.studies.recovery.figures import zoom
from descentlab.theory.slots import adam_update, steps_until_normal, update_curve, update_steps


def test_figures_of_a_run_that_recorded_every_fifth_step() -> None:
    """Hits fall between rows, differently in every case. Once no step had half of the cases: all was empty."""
    whole = recovery_results(cases=4, optimizers=("sgd", "adam"), diverge=())
    thin = dataclasses.replace(whole, frame=whole.frame.filter(pl.col("step") % 5 == 0))
    recovery = analyse_recovery(thin, 10)
    steps = step_grid(recovery, 10)
    assert steps[0] == -10 and set(np.diff(steps)) == {5} and 0 in steps
    rows = aligned(recovery, "adam", "train_loss", steps)
    assert np.isfinite(rows).mean() > 0.95
    dense = analyse_recovery(whole, 10)
    full = aligned(dense, "adam", "train_loss", step_grid(dense, 10))
    for case, (hit, row) in enumerate(zip(dense.measures.filter(condition="adam")["hit_step"], rows, strict=True)):
        for step, value in zip(steps, row, strict=True):
            if math.isfinite(value):  # the recorded step at or after the grid's
                assert value == full[case, step + 10 + (-(hit + step)) % 5]
    assert all(np.isfinite(line.get_ydata()).sum() > 15 for ax in zoom(recovery).axes for line in ax.lines[:2])


def test_a_failed_run_counts_at_chance_whatever_its_accuracy_column_says() -> None:
    """A network of NaN weights still has an accuracy, that of guessing one class: it is not the run's."""
    results = recovery_results()
    lost = (pl.col("run") == "sgd-4-fault") & pl.col("train_loss").is_nan()
    assert results.frame.filter(lost).height
    results.frame = results.frame.with_columns(
        pl.when(lost).then(0.02).otherwise(pl.col("train_accuracy")).alias("train_accuracy")
    )
    recovery = analyse_recovery(results, 10)
    steps = step_grid(recovery, 10)
    failed = aligned(recovery, "sgd", "train_accuracy", steps, failed_value=0.1)[4]
    assert (failed[steps >= 10] == 0.1).all()


def test_frozen_updates_are_timed_as_predicted() -> None:
    """A spike of 1,000 in Adam with beta2 = 0.99, constant gradient, noise of 30 % on every update: theory's number."""
    at, adam = np.arange(2001), {"name": "adam", "betas": (0.9, 0.99)}
    size = adam_update(at, 1.0, 1000.0, betas=(0.9, 0.99))
    noise = np.random.default_rng(0).uniform(0.7, 1.3, len(at))
    predicted = steps_until_normal("adam", 1000, beta2=0.99)
    found = frozen_steps(at, size * noise)
    assert found is not None and abs(found - predicted) < 0.05 * predicted
    assert update_steps(adam, 1000) == predicted
    np.testing.assert_array_equal(update_curve(adam, 1000.0, at), size)
    assert frozen_steps(at, noise) == 0 and frozen_steps(at, 0.1 * noise) is None
    assert update_steps({"name": "sgd", "momentum": 0.9}, 1000) == 0 and update_steps({"name": "lion"}, 1000) is None
    measured = pollution(at, {"update_norm": size, "update_norm_twin": np.ones(len(at))}, adam, 1000.0)
    assert measured["frozen_predicted"] == predicted and measured["slot_predicted"] is None


def test_a_moving_average_by_hand() -> None:
    np.testing.assert_allclose(moving_average(np.array([1.0, np.inf, 4.0, 7.0]), 3), [1.0, 2.5, 5.5, 5.5])
    assert np.isnan(moving_average(np.array([np.nan]), 3)).all()
    assert [smoothing(n) for n in (1, 100, 9500)] == [1, 5, 41]


def test_names_are_short_and_break_after_commas() -> None:
    cells = {
        i: {"optimizer": "sgd", "model.batch_norm": norm, "fault.value": value, "optimizer.lr": 0.1, "arm.lr": lr}
        for i, (norm, value, lr) in enumerate([(True, 1e12, 0.1), (False, 1e12, 0.1), (True, 1e-7, 0.01)])
    }
    labels = condition_labels(cells)
    assert labels[0] == "sgd,batch_norm=true,value=1e12,arm.lr=0.1"  # lr alone could be the optimizer's
    assert labels[2] == "sgd,batch_norm=true,value=1e-7,arm.lr=0.01"
    assert value_text(0.1 + 0.2) == "0.30000000000000004" and value_text(None) == "None"
    assert broken("(a) sgd,batch_norm=true", 12) == "(a) sgd,\nbatch_norm=true" and broken("adam", 2) == "adam"
    assert legend_columns(["adam"] * 4, 7.0) == 4 and legend_columns(["x" * 40] * 4, 7.0) == 2


def test_the_export_has_the_labels_of_the_report() -> None:
    results = recovery_results()
    labels = outcome_labels(results)
    measures = analyse_recovery(results, 10).measures
    assert {run: found["outcome"] for run, found in labels.items()} == dict(measures.select("run", "outcome").rows())
    one = gather(results).experiments[4].outcomes["sgd"].result()
    assert one["outcome"].endswith("InfNan") and one["polluted_state"] and "outcome_note" in one
