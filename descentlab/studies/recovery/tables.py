"""Tables of the recovery report."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from ...analysis.outcomes import clustered_rate, outcome_rates
from ...analysis.paired import Estimate
from ...analysis.recovery import Recovery, mean_of
from ...analysis.results import ResultsLike
from ...report import Column, SummaryItem, TableBlock
from ...store.table import planned_for
from ..common import bounded, item, plain_item, scaled
from .overview import head_to_head


def own(recovery: Recovery, condition: str) -> pl.DataFrame:
    """The measures of one condition, by replicate and fault."""
    return recovery.measures.filter(pl.col("condition") == condition).sort("replicate", "fault")


def rate_of(rows: pl.DataFrame, flags: pl.Expr) -> Estimate:
    """Share of rows for which ``flags`` holds, with an interval clustered by replicate."""
    return clustered_rate(rows.select(flags.alias("flag"))["flag"].to_list(), rows["replicate"].to_list())


def steps_text(values: Sequence[int | None], watched: int) -> str:
    """Median of steps to recover; a run that never did counts as longer than was watched."""
    filled = sorted(math.inf if value is None else float(value) for value in values)
    middle = filled[(len(filled) - 1) // 2], filled[len(filled) // 2]
    median = sum(middle) / 2
    return f"> {watched}" if math.isinf(median) else f"{median:g}"


def condition_summary(recovery: Recovery) -> dict[str, SummaryItem]:
    """summary.json entries of every condition: ``recovery/<condition>/<measure>``; accuracies are 0..1, losses nats."""
    out: dict[str, SummaryItem] = {}
    for name in recovery.order:
        rows = own(recovery, name)
        if rows.is_empty():
            continue
        key = f"recovery/{name}"
        for column in (
            "excess_test_loss",
            "excess_test_accuracy",
            "final_test_loss",
            "final_test_accuracy",
            "twin_test_loss",
            "twin_test_accuracy",
        ):
            out[f"{key}/{column}"] = _within(column, item(mean_of(rows, column)))
        for column in ("pre_hit_test_loss", "pre_hit_test_accuracy"):
            if rows[column].drop_nulls().len():
                out[f"{key}/{column}"] = _within(column, item(mean_of(rows, column)))
        n = len(rows)
        out[f"{key}/failure_rate"] = item(rate_of(rows, pl.col("failed")))
        out[f"{key}/masked_rate"] = item(rate_of(rows, pl.col("excess_test_loss") == 0))
        out[f"{key}/recovered_rate"] = item(rate_of(rows, pl.col("recovery_steps").is_not_null()))
        for label, rate in outcome_rates(rows["outcome"].to_list(), rows["replicate"].to_list()).items():
            out[f"{key}/outcome/{label}"] = item(rate)
        median = float(np.median(rows["excess_test_loss"].to_numpy()))
        out[f"{key}/median_excess_test_loss"] = plain_item(median, n, "median over cases")
    return out


def _within(column: str, entry: SummaryItem) -> SummaryItem:
    return bounded(entry) if column.endswith("accuracy") and not column.startswith("excess") else entry


def condition_table(recovery: Recovery, summary: Mapping[str, SummaryItem]) -> TableBlock:
    """One row per optimizer: the primary measure, failures, accuracy, and how fast training loss came back."""
    columns = [
        Column("optimizer"),
        Column("n", "d", "cases"),
        Column(
            "excess test loss (nats)",
            "+.4f",
            "over the twin at the end of recovery, failures included; mean and 95 % interval",
        ),
        Column("median", "+.4f", "median excess test loss"),
        Column("failure rate (%)", ".0f", "share of faulted runs that failed, 95 % Wilson interval"),
        Column("excess test accuracy (points)", "+.2f", "over the twin"),
        Column("final test accuracy (%)", ".1f", "with the fault"),
        Column("twin's (%)", ".1f", "final test accuracy without the fault"),
        Column(
            "pre-hit test loss (nats)",
            ".3f",
            "last evaluation before the hit; cases hit before the first evaluation are left out",
        ),
        Column("exactly masked", "", "cases whose final test loss equals the twin's to the bit"),
        Column("steps to recover", "", "median; training loss within 0.05 nats of the twin's on 5 consecutive batches"),
    ]
    rows: list[list[Any]] = []
    for name in recovery.order:
        part = own(recovery, name)
        if part.is_empty():
            rows.append([name, 0, *[None] * (len(columns) - 2)])
            continue
        key = f"recovery/{name}"
        rows.append(
            [
                name,
                len(part),
                summary[f"{key}/excess_test_loss"],
                summary[f"{key}/median_excess_test_loss"],
                scaled(summary[f"{key}/failure_rate"], 100.0),
                scaled(summary[f"{key}/excess_test_accuracy"], 100.0),
                scaled(summary[f"{key}/final_test_accuracy"], 100.0),
                100 * (summary[f"{key}/twin_test_accuracy"].value or 0.0),
                summary[f"{key}/pre_hit_test_loss"].value if f"{key}/pre_hit_test_loss" in summary else None,
                f"{int((part['excess_test_loss'] == 0).sum())} of {len(part)}",
                steps_text(part["recovery_steps"].to_list(), max(part["steps_watched"].to_list())),
            ]
        )
    method = next(iter(summary.values())).method
    return TableBlock(columns, rows, f"Mean over cases with {method}; failure rate with 95 % Wilson interval.")


def failure_table(recovery: Recovery, results: ResultsLike) -> TableBlock:
    """Every failed run, twins included, with where it was hit and when it failed."""
    runs = {str(run["id"]): run for run in results.runs}
    lines = planned_for(results.runs, results.campaign)
    rows = []
    for score in recovery.scores.failures():
        run, case = runs[score.run], lines[score.run]
        after = None if score.failed_step is None else score.failed_step - int(case["step"])
        value = case.get("rule", {}).get("value")
        rows.append(
            [
                recovery.labels[int(run["cell"])],
                int(run["replicate"]),
                run["role"],
                case.get("fault", ""),
                case.get("layer", ""),
                value,
                int(case["step"]),
                score.failed_step,
                after,
                score.reason,
                score.run,
            ]
        )
    columns = [
        Column("optimizer"),
        Column("case", "d"),
        Column("role"),
        Column("fault"),
        Column("layer"),
        Column("value", ".3g"),
        Column("hit step", "d"),
        Column("failed at step", "d"),
        Column("steps after the hit", "+d"),
        Column("reason"),
        Column("run"),
    ]
    twins = sum(row[2] == "twin" for row in rows)
    caption = (
        f"Twins among them: {twins}; no fault touched those, so look at their settings or machine." if twins else ""
    )
    return TableBlock(columns, rows, caption)


def realised(hits: Sequence[Mapping[str, Any]], optimizers: int) -> str:
    """Whether every optimizer met a case's fault, at the same elements by the same rule."""
    hits = [hit for hit in hits if hit.get("applied", True)]
    if not hits:
        return "not hit"
    met = len({str(hit["run"]) for hit in hits})
    places = {
        json.dumps([hit.get(name) for name in ("step", "site", "layer", "rule", "index")], sort_keys=True)
        for hit in hits
    }
    return f"{met} of {optimizers}, {'same elements' if len(places) == 1 else 'DIFFERENT elements'}"


def not_applicable(hits: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence per optimizer and reason for events that could not happen, such as one in a slot it does not keep."""
    met: dict[tuple[str, str], set[str]] = {}
    for hit in hits:
        if not hit.get("applied", True):
            met.setdefault((str(hit["optimizer"]), str(hit["reason"])), set()).add(str(hit["run"]))
    return [
        f"{optimizer}: the event could not happen in {len(runs)} runs ({reason}); they count as unharmed."
        for (optimizer, reason), runs in sorted(met.items())
    ]


def case_table(recovery: Recovery, results: ResultsLike) -> TableBlock:
    """The campaign: what was planned for each case, whether it happened, and the damage averaged over optimizers."""
    lines = planned_for(results.runs, results.campaign)
    faulted = {str(run["id"]): id(lines[str(run["id"])]) for run in results.runs
               if run["role"] == "fault" and str(run["id"]) in lines}  # fmt: skip
    hits: dict[int, list[Mapping[str, Any]]] = {}
    for hit in results.hits:
        hits.setdefault(faulted.get(str(hit["run"]), 0), []).append(hit)
    planned = dict.fromkeys(faulted.values(), 0) | Counter(faulted.values())
    rows = []
    for case in results.campaign:
        runs = [run for run, line in faulted.items() if line == id(case)]
        part = recovery.measures.filter(pl.col("run").is_in(runs))
        mean = float(np.mean(part["excess_test_loss"].to_numpy())) if len(part) else None
        rows.append(
            [
                int(case["replicate"]),
                case.get("fault", ""),
                int(case["step"]),
                int(case["epoch"]),
                case.get("site", ""),
                case.get("layer", ""),
                case.get("rule", {}).get("value"),
                len(case.get("index") or ()),
                realised(hits.get(id(case), []), planned.get(id(case), 0)),
                f"{int(part['failed'].sum())} of {len(part)}",
                mean,
            ]
        )
    columns = [
        Column("case", "d"),
        Column("fault"),
        Column("hit step", "d"),
        Column("epoch", "d"),
        Column("site"),
        Column("layer"),
        Column("value", ".3g"),
        Column("elements", "d"),
        Column("hit in optimizers"),
        Column("failed"),
        Column("mean excess test loss (nats)", "+.4f"),
    ]
    return TableBlock(
        columns,
        rows,
        "One planned fault per case, met by every optimizer; its position and value are in campaign.jsonl.",
    )


def pair_table(recovery: Recovery) -> TableBlock:
    """Every case of every optimizer."""
    names = [
        ("condition", "optimizer", ""),
        ("replicate", "case", "d"),
        ("fault", "fault", ""),
        ("outcome", "outcome", ""),
        ("outcome_note", "", ""),
        ("failed", "failed", ""),
        ("pre_hit_loss", "loss before the hit", ".3f"),
        ("hit_loss", "loss at the hit", ".3g"),
        ("post_hit_loss", "loss one step later", ".3g"),
        ("excess_at_hit", "excess at the hit", "+.3g"),
        ("peak_excess", "peak excess", "+.3g"),
        ("area", "area (nat steps)", "+.3g"),
        ("recovery_steps", "steps to recover", "d"),
        ("final_test_loss", "final test loss", ".4f"),
        ("twin_test_loss", "twin's", ".4f"),
        ("excess_test_loss", "excess test loss", "+.4f"),
        ("excess_test_accuracy", "excess test accuracy", "+.4f"),
        ("polluted", "polluted state", ""),
        ("slot_ratio", "slot / twin's", ".3g"),
        ("bn_ratio", "variance / twin's", ".3g"),
        ("run", "run", ""),
    ]
    rows = recovery.measures.select([name for name, _, _ in names]).rows()
    caption = (
        "Losses in nats on the batch of that step at the weights before its update, excess over the twin on the "
        "same batch; test values at the end of recovery. A dash: not recorded, not finite or, for steps to "
        "recover, never."
    )
    return TableBlock([Column(title, spec) for _, title, spec in names], rows, caption)


def head_table(recovery: Recovery) -> TableBlock:
    """Wins, ties and losses of the row against the column."""
    table = head_to_head(recovery)
    rows = [[a, *(None if a == b else "{}/{}/{}".format(*table[a, b]) for b in recovery.order)] for a in recovery.order]
    caption = (
        "Cases in which the row's excess test loss is lower / equal / higher than the column's. Equal means to the "
        "bit (both masked) or both failed; a failed run loses to one that finished."
    )
    return TableBlock([Column(""), *(Column(name) for name in recovery.order)], rows, caption)
