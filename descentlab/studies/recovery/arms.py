"""What recovery arms noticed, what they cost and what they saved, in one study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ...analysis.contrasts import Contrast, ContrastResult, analyse
from ...analysis.paired import Estimate, estimate
from ...analysis.recovery import Recovery, mean_of
from ...analysis.results import ResultsLike, last_attempts
from ...report import Column, Paragraph, Section, SummaryItem, TableBlock
from ..common import bounded, contrast_item, contrast_table, item, plain_item
from . import tables
from .overview import paired_differences

NONE = "none"


@dataclass(frozen=True)
class ArmRecord:
    """What happened to the cases of one condition: ``cases`` has one row per faulted run with ``latency`` (steps from
    the hit to the first alarm, null = never) and ``extra_steps``; alarms and steps of the twins are totals."""

    cases: pl.DataFrame
    false_alarms: int
    fault_free_steps: int

    @property
    def per_thousand(self) -> float:
        """Alarms per 1,000 steps without a fault."""
        return 1000 * self.false_alarms / max(1, self.fault_free_steps)


def arm_names(recovery: Recovery, results: ResultsLike) -> dict[str, str]:
    """Condition -> name of its arm."""
    common = results.spec.get("arm")
    everywhere = str(common.get("name", NONE)) if isinstance(common, dict) else NONE
    return {recovery.labels[cell]: str(settings.get("arm") or everywhere) for cell, settings in recovery.cells.items()}


def alarms_of(results: ResultsLike) -> pl.DataFrame:
    """The first alarm of every run and step, and the steps that were taken back: run, step, rewound."""
    frame = results.frame
    if "alarm" not in frame.columns:
        return pl.DataFrame(schema={"run": pl.String, "step": pl.Int64, "rewound": pl.Int64})
    return (
        frame.filter(pl.col("alarm").is_not_null())
        .group_by("run", "step")
        .agg(pl.col("rewound").cast(pl.Int64).sum())
        .sort("run", "step")
    )


def record_of(recovery: Recovery, results: ResultsLike, alarms: pl.DataFrame, condition: str) -> ArmRecord:
    """Alarms after the hit are detections unless the twin has one on the same step; those of twins are false."""
    rows = tables.own(recovery, condition)
    by_run = {str(key[0]): part for key, part in alarms.partition_by("run", as_dict=True).items()}
    steps_of = dict(last_attempts(results.frame).group_by("run").len().iter_rows())
    records, twins = [], set()
    for run, twin, hit, replicate in rows.select("run", "twin", "hit_step", "replicate").iter_rows():
        own, other = by_run.get(run, alarms.clear()), by_run.get(twin, alarms.clear())
        found = own.filter((pl.col("step") >= hit) & ~pl.col("step").is_in(other["step"].to_list()))
        latency = None if found.is_empty() else int(found["step"][0]) - hit
        records.append({"replicate": replicate, "latency": latency, "extra_steps": int(own["rewound"].sum())})
        twins.add(twin)
    cases = pl.DataFrame(records, schema={"replicate": pl.Int64, "latency": pl.Int64, "extra_steps": pl.Int64})
    false = sum(len(by_run[twin]) for twin in twins if twin in by_run)
    return ArmRecord(cases, false, sum(int(steps_of.get(twin, 0)) for twin in twins))


def rivals(recovery: Recovery, names: dict[str, str]) -> list[tuple[str, str]]:
    """(condition with an arm, the same condition without one), where both are in the study."""

    def rest(cell: int) -> dict[str, Any]:
        return {k: str(v) for k, v in recovery.cells[cell].items() if k.split(".")[0] != "arm"}

    pairs = []
    for cell in recovery.cells:
        for other in recovery.cells:
            a, b = recovery.labels[cell], recovery.labels[other]
            if names[a] != NONE and names[b] == NONE and rest(cell) == rest(other):
                pairs.append((a, b))
    return pairs


def _contrasts(recovery: Recovery, names: dict[str, str]) -> tuple[list[ContrastResult], list[Estimate]]:
    planned, beside = [], []
    for a, b in rivals(recovery, names):
        loss = paired_differences(recovery, a, b, "excess_test_loss")
        if len(loss):
            planned.append(Contrast(f"{a} \u2212 {b}", loss))
            beside.append(estimate(paired_differences(recovery, a, b, "excess_test_accuracy")))
    return analyse(planned), beside


def _detected(record: ArmRecord) -> Estimate:
    return tables.rate_of(record.cases, pl.col("latency").is_not_null())


def _latency(record: ArmRecord) -> float | None:
    found = record.cases["latency"].drop_nulls().to_numpy()
    return float(np.median(found)) if len(found) else None


def _table(recovery: Recovery, names: dict[str, str], records: dict[str, ArmRecord]) -> TableBlock:
    columns = [
        Column("condition"),
        Column("arm"),
        Column("n", "d", "faulted runs"),
        Column("noticed (share)", ".2f", "faulted runs with an alarm at or after the hit"),
        Column("latency (steps)", "g", "median steps from the hit to the first alarm; 0 = in the same update"),
        Column("false alarms per 1,000 steps", ".2f", "alarms of the fault-free twins"),
        Column("extra steps", ".2f", "steps made again, mean per faulted run"),
        Column("excess test loss (nats)", "+.4f"),
        Column("test accuracy", ".4f", "of the faulted runs at the end"),
        Column("failed"),
    ]
    rows = []
    for name, record in records.items():
        own = tables.own(recovery, name)
        watching = names[name] != NONE
        rows.append(
            [
                name,
                names[name],
                len(own),
                item(_detected(record)) if watching else None,
                _latency(record),
                record.per_thousand if watching else None,
                float(record.cases["extra_steps"].to_numpy().mean()) if watching else None,
                item(mean_of(own, "excess_test_loss")),
                bounded(item(mean_of(own, "final_test_accuracy"))),
                f"{int(own['failed'].sum())} of {len(own)}",
            ]
        )
    caption = (
        "An alarm at or after the hit counts as notice unless the twin has one on the same step. For arms without a "
        "check (clip) every gradient they changed counts as an alarm. 95 % intervals over replicates."
    )
    return TableBlock(columns, rows, caption)


def arm_report(recovery: Recovery, results: ResultsLike) -> tuple[list[Section], dict[str, SummaryItem]]:
    """The section on recovery arms and its numbers for summary.json; both empty when no cell has an arm."""
    names = arm_names(recovery, results)
    if set(names.values()) == {NONE}:
        return [], {}
    alarms = alarms_of(results)
    shown = [name for name in recovery.order if not tables.own(recovery, name).is_empty()]
    records = {name: record_of(recovery, results, alarms, name) for name in shown}
    summary: dict[str, SummaryItem] = {}
    for name, record in records.items():
        if names[name] == NONE:
            continue
        n, key = len(record.cases), f"recovery/{name}"
        extra = float(record.cases["extra_steps"].to_numpy().mean())
        steps = f"{record.false_alarms} alarms in {record.fault_free_steps} steps of the twins"
        summary[f"{key}/detection_rate"] = item(_detected(record))
        summary[f"{key}/detection_latency_steps"] = plain_item(_latency(record), n, "median over noticed cases")
        summary[f"{key}/false_alarms_per_1000_steps"] = plain_item(record.per_thousand, n, steps)
        summary[f"{key}/extra_steps"] = plain_item(extra, n, "mean per faulted run")
    blocks: list[Any] = [_table(recovery, names, records)]
    tested, beside = _contrasts(recovery, names)
    for result in tested:
        a, b = result.name.split(" \u2212 ")
        summary[f"recovery/{a}-vs-{b}/excess_test_loss"] = contrast_item(result)
    if tested:
        caption = (
            "With the arm minus without it, paired by replicate (negative: the arm leaves less excess test loss); "
            "corrected for the comparisons in this table."
        )
        blocks.append(contrast_table(tested, "difference (nats)", beside, "difference in accuracy (points)", caption))
    else:
        blocks.append(Paragraph("Nothing to compare the arms with: add none to the list of arms."))
    return [Section("Recovery arms", blocks)], summary
