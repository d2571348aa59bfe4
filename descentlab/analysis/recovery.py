"""Measures of one hit and its aftermath, each faulted run beside its twin on the same batches.

Per-step values are measured on the batch of that step *before* its update. So the hit step shows the faulty forward
pass, the step after it shows the first damage to the weights, and test values follow the update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from ..store.table import planned_for
from .failures import PENDING, Score, Scores, excess_accuracies, excess_losses, final_scores
from .outcomes import NOT_APPLICABLE, PUBLISHED, Curve, Outcome, Thresholds, classify
from .paired import Estimate, estimate, replicate_means
from .pollution import pollution
from .results import ResultsLike, cell_settings, condition_labels, last_attempts

PER_STEP = (
    *("train_loss", "train_accuracy", "slot_max", "bn_var_max", "update_norm"),
    *("nonfinite_params", "test_loss", "test_accuracy"),
)
KEY = ("condition", "fault", "replicate")  # names one faulted run: a case of a fault type under an optimizer
TOLERANCE_NATS = 0.05  # a recovered run's training loss is within this of its twin's ...
STREAK = 5  # ... on so many consecutive batches


@dataclass(frozen=True)
class Recovery:
    """Everything the recovery report reads.

    A *condition* is an optimizer with whatever else varies except the fault, whose type (and settings that vary) is
    the column ``fault``; in a grid over faults a replicate stands in several rows of one condition, so statistics
    are clustered by replicate (:func:`mean_of`). ``measures``: one row per (condition, fault, replicate) that ended on
    both sides. ``steps``: one row per such run and step with every per-step observable and its ``…_twin``.
    ``order``: condition names in cell order; ``cells``: one cell of each condition with its settings; ``labels``:
    cell to condition; ``optimizers``: condition to the optimizer's settings.
    """

    order: list[str]
    cells: dict[int, dict[str, Any]]
    labels: dict[int, str]
    scores: Scores
    measures: pl.DataFrame
    steps: pl.DataFrame
    classes: int
    faults: list[str] = field(default_factory=list)
    optimizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    thresholds: Thresholds = PUBLISHED


def mean_of(rows: pl.DataFrame, column: str) -> Estimate:
    """Mean with its interval, one value per replicate (its mean over fault types); nulls do not count."""
    known = rows.select("replicate", column).drop_nulls().sort("replicate")
    return estimate(replicate_means(known[column].to_list(), known["replicate"].to_list()))


def _split(cells: Mapping[int, dict[str, Any]], planned: Mapping[int, str]) -> tuple[dict[int, dict], dict[int, str]]:
    """Settings of every cell without its fault, and a short name of the fault; ``planned``: cell -> its type."""
    rest = {c: {k: v for k, v in s.items() if k.split(".")[0] != "fault"} for c, s in cells.items()}
    kinds = {
        c: {"optimizer": s.get("fault") or planned.get(c, ""), **{k: v for k, v in s.items() if k.startswith("fault.")}}
        for c, s in cells.items()
    }
    return rest, condition_labels(kinds)


def _pairs(results: ResultsLike) -> list[tuple[int, int, str, str]]:
    """(cell, replicate, faulted run, twin) for every planned pair."""
    by_role = {(int(run["cell"]), int(run["replicate"]), run["role"]): str(run["id"]) for run in results.runs}
    return [
        (cell, replicate, run, by_role[cell, replicate, "twin"])
        for (cell, replicate, role), run in sorted(by_role.items())
        if role == "fault"
    ]


def paired_steps(frame: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Join faulted rows and twin rows by step; ``pairs`` has run, twin, condition, fault, replicate, hit_step.

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


def series_of(part: pl.DataFrame) -> dict[str, np.ndarray]:
    """Every recorded observable of one run of :func:`paired_steps` and its twin's as float64, null as NaN."""
    names = [name for name in PER_STEP if name in part.columns]
    return {
        name: part[name].cast(pl.Float64).fill_null(math.nan).to_numpy()
        for base in names
        for name in (base, f"{base}_twin")
    }


def curve_of(part: pl.DataFrame, series: Mapping[str, np.ndarray], suffix: str = "") -> Curve:
    """One side of a pair from the hit on, over the steps that side has recorded."""
    at = part["relative_step"].to_numpy()
    kept = (at >= 0) & part[f"train_loss{suffix}"].is_not_null().to_numpy()
    missing = np.full(len(at), math.nan)
    loss, accuracy, test_loss, test_accuracy = (
        series.get(f"{name}{suffix}", missing)[kept]
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    )
    bad = np.nan_to_num(series.get(f"nonfinite_params{suffix}", missing)[kept])
    return Curve(at[kept], loss, accuracy, test_loss, test_accuracy, bad)


def hit_measures(part: pl.DataFrame) -> dict[str, Any]:
    """Measures of one faulted run from its rows of :func:`paired_steps`; undefined or non-finite ones are None.

    Loss in nats, accuracy 0..1; ``area`` is the sum of excess training loss over the steps after the hit
    (trapezoid, nat steps); ``peak_excess`` the largest one from the hit on.
    """
    at, series = part["relative_step"].to_numpy(), series_of(part)
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


def _pre_hit_test(at: np.ndarray, series: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Test loss and accuracy at the last evaluation before the hit; None where there was none."""
    found: dict[str, float | None] = {}
    for name in ("test_loss", "test_accuracy"):
        values = series.get(name, np.full(len(at), math.nan))
        seen = np.flatnonzero((at < 0) & np.isfinite(values))
        found[f"pre_hit_{name}"] = float(values[seen[-1]]) if len(seen) else None
    return found


def analyse_recovery(results: ResultsLike, classes: int, thresholds: Thresholds = PUBLISHED) -> Recovery:
    """Pair every faulted run with its twin, score both at their last common evaluated step, measure and label it."""
    cells = cell_settings(results.frame)
    lines = planned_for(results.runs, results.campaign)
    named = {
        int(run["cell"]): str(lines[str(run["id"])].get("fault", "")) for run in results.runs if run["id"] in lines
    }
    rest, faults = _split(cells, named)
    labels = condition_labels(rest)
    pairs = [pair for pair in _pairs(results) if pair[0] in labels]
    scores = final_scores(results, [[run, twin] for _, _, run, twin in pairs], classes)
    pairs = [p for p in pairs if PENDING not in (scores[p[2]].state, scores[p[3]].state)]
    records = [_planned(labels[p[0]], faults[p[0]], p, lines[p[2]]) for p in pairs if p[2] in lines]
    order = list(dict.fromkeys(labels[cell] for cell in cells))
    firsts = [next(c for c in cells if labels[c] == name) for name in order]
    whole: dict[str, Any] = {
        "order": order,
        "cells": {cell: rest[cell] for cell in firsts},
        "faults": list(dict.fromkeys(faults[cell] for cell in cells)),
        "optimizers": _optimizer_settings(results, labels, rest),
    }
    empty = pl.DataFrame()
    if not records:
        return Recovery(labels=labels, scores=scores, measures=empty, steps=empty, classes=classes, **whole)
    keys = ("run", "twin", *KEY, "hit_step")
    steps = paired_steps(results.frame, pl.DataFrame([{key: row[key] for key in keys} for row in records]))
    parts = steps.partition_by(KEY, as_dict=True)
    sides = [scores[row["run"]] for row in records], [scores[row["twin"]] for row in records]
    realised = _realised_values(results)
    handed = {run["id"] for run in results.runs if run.get("settings", {}).get("protocol", "scratch") != "scratch"}
    for row, loss, accuracy in zip(records, excess_losses(*sides), excess_accuracies(*sides), strict=True):
        part = parts[tuple(row[key] for key in KEY)]
        series = series_of(part)
        row.update(hit_measures(part))
        row.update(_pre_hit_test(part["relative_step"].to_numpy(), series))
        own = whole["optimizers"][row["condition"]]
        row.update(pollution(part["relative_step"].to_numpy(), series, own, row["spike"]))
        if row["run"] in handed:  # its memory at the hit is another optimizer's
            row.update(slot_predicted=None, frozen_predicted=None)
        row.update(_final(scores[row["run"]], scores[row["twin"]], loss, accuracy))
        row.update(_label(part, series, scores[row["run"]], scores[row["twin"]], thresholds, classes))
        row["magnitude"] = _magnitude(row["value"], realised.get(row["run"]))
    measures = pl.DataFrame(records, infer_schema_length=None)
    return Recovery(
        labels=labels, scores=scores, measures=measures, steps=steps, classes=classes, thresholds=thresholds, **whole
    )


def _planned(condition: str, fault: str, pair: tuple[int, int, str, str], line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "condition": condition,
        "fault": fault,
        "replicate": pair[1],
        "run": pair[2],
        "twin": pair[3],
        "hit_step": int(line["step"]),
        "epoch": int(line.get("epoch", 0)),
        "site": str(line.get("site", "")),
        "layer": str(line.get("layer", "")),
        "value": _fault_value(line),
        "spike": _spike(line),
    }


def _spike(line: Mapping[str, Any]) -> float | None:
    """Factor on the whole gradient of one step, where that is what the fault was."""
    once = str(line.get("site", "")).startswith("gradient/") and line.get("duration", 1) == 1 and not line.get("index")
    return _fault_value(line) if once and line.get("rule", {}).get("kind") == "mul" else None


def _optimizer_settings(
    results: ResultsLike, labels: Mapping[int, str], cells: Mapping[int, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Condition -> settings of its optimizer, its name at least."""
    found = {labels[cell]: {"name": settings["optimizer"]} for cell, settings in cells.items()}
    for run in results.runs:
        own = (run.get("settings") or {}).get("optimizer")
        if isinstance(own, Mapping) and int(run["cell"]) in labels:
            found[labels[int(run["cell"])]] = dict(own)
    return found


def _realised_values(results: ResultsLike) -> dict[str, float]:
    """Run -> the largest absolute value its fault wrote."""
    largest: dict[str, float] = {}
    for hit in results.hits:
        new = [math.inf if v is None else abs(float(v)) for v in hit.get("new") or ()]
        values = [math.inf if math.isnan(v) else v for v in new]
        if values:
            largest[str(hit["run"])] = max(largest.get(str(hit["run"]), 0.0), *values)
    return largest


def _magnitude(planned: float, realised: float | None) -> int | None:
    """Decade of the fault's value (floor of log10): as planned, else as written; None for 0, NaN or infinity."""
    size = abs(planned) if math.isfinite(planned) else realised
    return math.floor(math.log10(size)) if size and math.isfinite(size) else None


def _label(
    part: pl.DataFrame, series: Mapping[str, np.ndarray], fault: Score, twin: Score, rule: Thresholds, classes: int
) -> dict[str, Any]:
    crashed = next((s.reason for s in (fault, twin) if s.failed and s.reason.startswith("failed:")), None)
    if crashed is not None:
        found = Outcome(NOT_APPLICABLE, crashed)
    else:
        found = classify(curve_of(part, series), curve_of(part, series, "_twin"), rule, 1 / classes)
    return {
        "outcome": found.label,
        "outcome_note": found.note,
        "first_drop": found.first_drop,
        "final_drop": found.final_drop,
        "test_drop": found.test_drop,
    }


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


def step_grid(recovery: Recovery, before: int) -> np.ndarray:
    """Steps from the hit that figures draw: from ``before`` steps before it to the end, as far apart as rows are.

    That is ``observe.every`` steps; cases hit between two rows are drawn up to so many steps too early.
    """
    rows = recovery.steps.filter(pl.col("train_loss_twin").is_not_null()).sort(*KEY, "step")
    gaps = rows.select(pl.col("step").diff().over(KEY)).to_series().drop_nulls()
    width = max(1, int(gaps.mode().min())) if len(gaps) else 1  # type: ignore[arg-type]
    last = int(recovery.measures["steps_watched"].max())  # type: ignore[arg-type]
    return np.arange(-width * (before // width), last + 1, width)


def aligned(
    recovery: Recovery, condition: str, column: str, steps: np.ndarray, failed_value: float = math.nan
) -> np.ndarray:
    """Values of ``column``, shape [cases, len(steps)], at steps relative to the hit of each case; NaN = not recorded.

    ``steps`` as :func:`step_grid` gives them, equally far apart: a row stands for the grid step at or before it.
    From the first step after the hit of a failed run on whose value or training loss is non-finite or missing,
    ``failed_value`` stands in, so that a mean over cases is never one over survivors.
    """
    chosen = recovery.measures.filter(pl.col("condition") == condition)
    parts = recovery.steps.filter(pl.col("condition") == condition).partition_by("fault", "replicate", as_dict=True)
    flag = "twin_failed" if column.endswith("_twin") else "failed"
    width = int(steps[1] - steps[0]) if len(steps) > 1 else 1
    out = np.full((len(chosen), len(steps)), math.nan)
    for index, row in enumerate(chosen.iter_rows(named=True)):
        part = parts[row["fault"], row["replicate"]].filter(pl.col(column).is_not_null())
        at = (part["relative_step"].to_numpy() - int(steps[0])) // width
        inside = (at >= 0) & (at < len(steps))
        out[index] = _column_at(column, part, at, inside, steps)
        if row[flag]:
            loss = _column_at("train_loss_twin" if column.endswith("_twin") else "train_loss", part, at, inside, steps)
            bad = np.flatnonzero(~(np.isfinite(out[index]) & np.isfinite(loss)) & (steps >= 0))
            out[index, bad[0] if len(bad) else len(steps) :] = failed_value
    return out


def _column_at(column: str, part: pl.DataFrame, at: np.ndarray, inside: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """A column on the grid ``steps``: row i of ``part`` at place ``at[i]`` where it is ``inside``, NaN elsewhere."""
    out = np.full(len(steps), math.nan)
    out[at[inside]] = part[column].cast(pl.Float64).fill_null(math.nan).to_numpy()[inside]
    return out
