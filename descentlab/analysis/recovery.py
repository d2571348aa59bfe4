"""Measures of one hit and its aftermath, each faulted run beside its twin on the same batches.

Per-step values are measured on the batch of that step *before* its update. So the hit step shows the faulty forward
pass, the step after it shows the first damage to the weights, and test values follow the update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from .failures import PENDING, Score, Scores, excess_accuracies, excess_losses, final_scores
from .results import ResultsLike, cell_settings, condition_labels, last_attempts

PER_STEP = ("train_loss", "train_accuracy", "slot_max", "bn_var_max")
TOLERANCE_NATS = 0.05  # a recovered run's training loss is within this of its twin's ...
STREAK = 5  # ... on so many consecutive batches


@dataclass(frozen=True)
class Recovery:
    """Everything the recovery report reads.

    ``measures``: one row per (condition, case) that finished on both sides. ``steps``: one row per (condition,
    case, step) with every per-step observable and its ``…_twin``. ``order``: condition names in cell order.
    """

    order: list[str]
    cells: dict[int, dict[str, Any]]
    labels: dict[int, str]
    scores: Scores
    measures: pl.DataFrame
    steps: pl.DataFrame
    classes: int


def _pairs(results: ResultsLike) -> list[tuple[int, int, str, str]]:
    """(cell, replicate, faulted run, twin) for every planned pair."""
    by_role = {(int(run["cell"]), int(run["replicate"]), run["role"]): str(run["id"]) for run in results.runs}
    return [
        (cell, replicate, run, by_role[cell, replicate, "twin"])
        for (cell, replicate, role), run in sorted(by_role.items())
        if role == "fault"
    ]


def paired_steps(frame: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Join faulted rows and twin rows by step; ``pairs`` has run, twin, condition, replicate, hit_step, layer, value.

    A step only one side reached keeps null on the other; ``relative_step`` is step - hit_step of that case.
    """
    rows = last_attempts(frame)
    columns = [name for name in PER_STEP if name in rows.columns]
    keys = [name for name in pairs.columns if name not in ("run", "twin")]
    fault = pairs.join(rows.select("run", "step", *columns), on="run").select(*keys, "step", *columns)
    twin = pairs.join(
        rows.select(pl.col("run").alias("twin"), "step", *(pl.col(c).alias(f"{c}_twin") for c in columns)), on="twin"
    ).select(*keys, "step", *(f"{c}_twin" for c in columns))
    joined = fault.join(twin, on=[*keys, "step"], how="full", coalesce=True, nulls_equal=True)
    return joined.with_columns((pl.col("step") - pl.col("hit_step")).alias("relative_step")).sort(*keys, "step")


def steps_to_recover(relative_step: np.ndarray, excess: np.ndarray) -> int | None:
    """First step after the hit that starts ``STREAK`` batches within ``TOLERANCE_NATS`` of the twin; None = never."""
    after = relative_step >= 1
    near = np.abs(excess[after]) <= TOLERANCE_NATS  # NaN compares false
    steps = relative_step[after]
    for index in range(len(near) - STREAK + 1):
        if near[index : index + STREAK].all():
            return int(steps[index])
    return None


def _at(steps: np.ndarray, values: np.ndarray, where: int) -> float | None:
    found = values[steps == where]
    return float(found[0]) if len(found) and math.isfinite(found[0]) else None


def hit_measures(part: pl.DataFrame) -> dict[str, Any]:
    """Measures of one faulted run from its rows of :func:`paired_steps`; undefined or non-finite ones are None.

    Loss in nats, accuracy 0..1; ``area`` is the sum of excess training loss over the steps after the hit
    (trapezoid, nat steps); ``peak_excess`` the largest one from the hit on.
    """
    at = part["relative_step"].to_numpy()
    series = {
        name: part[name].cast(pl.Float64).fill_null(math.nan).to_numpy()
        for name in ("train_loss", "train_loss_twin", "train_accuracy", "train_accuracy_twin")
    }
    excess = series["train_loss"] - series["train_loss_twin"]
    since = at >= 0
    whole = since.any() and np.isfinite(excess[since]).all()
    return {
        "pre_hit_loss": _at(at, series["train_loss"], -1),
        "pre_hit_accuracy": _at(at, series["train_accuracy"], -1),
        "hit_loss": _at(at, series["train_loss"], 0),
        "hit_accuracy": _at(at, series["train_accuracy"], 0),
        "post_hit_loss": _at(at, series["train_loss"], 1),
        "post_hit_accuracy": _at(at, series["train_accuracy"], 1),
        "excess_at_hit": _at(at, excess, 0),
        "excess_after_hit": _at(at, excess, 1),
        "peak_excess": float(excess[since].max()) if whole else None,
        "area": float(np.trapezoid(excess[since], at[since])) if whole else None,
        "recovery_steps": steps_to_recover(at, excess),
        "steps_watched": int(at.max()),
    }


def _pre_hit_test(frame: pl.DataFrame, run: str, hit_step: int) -> dict[str, float | None]:
    """Test loss and accuracy at the last evaluation before the hit; None where there was none."""
    names = ("test_loss", "test_accuracy")
    seen = frame.filter((pl.col("run") == run) & (pl.col("step") < hit_step)).select("step", *names)
    seen = seen.drop_nulls().sort("step")
    return {f"pre_hit_{name}": float(seen[name][-1]) if len(seen) else None for name in names}


def analyse_recovery(results: ResultsLike, classes: int) -> Recovery:
    """Pair every faulted run with its twin, score both at their last common evaluated step and measure the hit."""
    cells = cell_settings(results.frame)
    labels = condition_labels(cells)
    pairs = [pair for pair in _pairs(results) if pair[0] in labels]
    scores = final_scores(results, [[run, twin] for _, _, run, twin in pairs], classes)
    pairs = [p for p in pairs if PENDING not in (scores[p[2]].state, scores[p[3]].state)]
    hits = {int(case["replicate"]): case for case in results.campaign}
    records: list[dict[str, Any]] = [
        {
            "condition": labels[cell],
            "replicate": replicate,
            "run": run,
            "twin": twin,
            "hit_step": int(hits[replicate]["step"]),
            "epoch": int(hits[replicate]["epoch"]),
            "layer": str(hits[replicate]["layer"]),
            "value": float(_fault_value(hits[replicate])),
        }
        for cell, replicate, run, twin in pairs
    ]
    order = [labels[cell] for cell in cells]
    if not records:
        return Recovery(order, cells, labels, scores, pl.DataFrame(), pl.DataFrame(), classes)
    keys = ("run", "twin", "condition", "replicate", "hit_step")
    steps = paired_steps(results.frame, pl.DataFrame([{key: row[key] for key in keys} for row in records]))
    parts = steps.partition_by("condition", "replicate", as_dict=True)
    sides = [scores[row["run"]] for row in records], [scores[row["twin"]] for row in records]
    for row, loss, accuracy in zip(records, excess_losses(*sides), excess_accuracies(*sides), strict=True):
        row.update(hit_measures(parts[row["condition"], row["replicate"]]))
        row.update(_pre_hit_test(results.frame, row["run"], row["hit_step"]))
        row.update(_final(scores[row["run"]], scores[row["twin"]], loss, accuracy))
    return Recovery(order, cells, labels, scores, pl.DataFrame(records, infer_schema_length=None), steps, classes)


def _fault_value(case: Mapping[str, Any]) -> float:
    value = case.get("rule", {}).get("value")
    return math.nan if value is None else float(value)


def _final(fault: Score, twin: Score, loss: float, accuracy: float) -> dict[str, Any]:
    return {
        "failed": fault.failed,
        "twin_failed": twin.failed,
        "pair_failed": fault.failed or twin.failed,
        "final_step": fault.step,
        "final_test_loss": fault.test_loss,
        "final_test_accuracy": fault.test_accuracy,
        "twin_test_loss": twin.test_loss,
        "twin_test_accuracy": twin.test_accuracy,
        "excess_test_loss": loss,
        "excess_test_accuracy": accuracy,
        "rank_score": math.inf if fault.failed or twin.failed else loss,  # head-to-head: a failure ranks last
    }


def aligned(
    recovery: Recovery, condition: str, column: str, steps: np.ndarray, failed_value: float = math.nan
) -> np.ndarray:
    """Values of ``column``, shape [cases, len(steps)], at steps relative to the hit of each case; NaN = not recorded.

    From the first non-finite or missing value after the hit of a failed run on, ``failed_value`` stands in, so that
    a mean over cases is never one over survivors.
    """
    chosen = recovery.measures.filter(pl.col("condition") == condition)
    parts = recovery.steps.filter(pl.col("condition") == condition).partition_by("replicate", as_dict=True)
    flag = "twin_failed" if column.endswith("_twin") else "failed"
    out = np.full((len(chosen), len(steps)), math.nan)
    for index, row in enumerate(chosen.iter_rows(named=True)):
        part = parts[(row["replicate"],)].filter(pl.col("relative_step").is_in(steps.tolist()))
        at = np.searchsorted(steps, part["relative_step"].to_numpy())
        out[index, at] = part[column].cast(pl.Float64).fill_null(math.nan).to_numpy()
        if row[flag]:
            bad = np.flatnonzero(~np.isfinite(out[index]) & (steps >= 0))
            out[index, bad[0] if len(bad) else len(steps) :] = failed_value
    return out
