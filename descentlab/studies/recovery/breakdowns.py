"""Breakdowns of a recovery study: the same cases grouped by layer, site, fault, magnitude, epoch or time of the hit.

Every one is made by the same two functions. They are exploratory: described with intervals, not tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl

from ...analysis import outcomes as o
from ...analysis.outcomes import LABELS, Thresholds, outcome_rates
from ...analysis.recovery import Recovery, mean_of
from ...report import Column, Section, TableBlock
from ..common import item, scaled
from .tables import rate_of

EARLY_EPOCH = 1  # a hit in epoch 0 or 1 is early, as in the published reports
UNSIZED = "none (0, non-finite or not written)"
# title of the column -> what its groups are made from
KEYS: dict[str, str] = {
    "fault": "fault",
    "site": "site",
    "layer": "layer",
    "magnitude of the value": "magnitude",
    "epoch": "epoch",
    "time of the hit": "time",
}


def _tagged(recovery: Recovery, key: str) -> pl.DataFrame:
    """The measures with a sortable ``group`` and its ``name``."""
    rows = recovery.measures
    if key == "time":
        early = pl.col("epoch") <= EARLY_EPOCH
        name = pl.when(early).then(pl.lit("early (epoch 0, 1)")).otherwise(pl.lit("late (epoch 2 on)"))
        return rows.with_columns(name.alias("group"), name.alias("name"))
    if key == "magnitude":
        decade = pl.col("magnitude").cast(pl.Int64)
        name = pl.format("1e{} to 1e{}", decade, decade + 1).fill_null(UNSIZED)
        return rows.with_columns(decade.fill_null(10**6).alias("group"), name.alias("name"))
    return rows.with_columns(pl.col(key).alias("group"), pl.col(key).cast(pl.String).alias("name"))


def groups(recovery: Recovery, key: str) -> Iterator[tuple[str, str, pl.DataFrame]]:
    """(group, condition, its rows), groups in order, conditions in the report's order; empty ones are left out."""
    tagged = _tagged(recovery, key)
    parts = tagged.partition_by("group", "condition", as_dict=True)
    names = dict(tagged.select("group", "name").unique().iter_rows())
    for group in sorted(names):
        for condition in recovery.order:
            if (group, condition) in parts:
                yield names[group], condition, parts[group, condition]


def varies(recovery: Recovery, key: str) -> bool:
    """Whether the cases fall into more than one group."""
    return _tagged(recovery, key)["group"].n_unique() > 1


def breakdown(recovery: Recovery, title: str) -> TableBlock:
    """Excess test loss and failures per group and condition."""
    rows: list[list[Any]] = []
    for group, condition, part in groups(recovery, KEYS[title]):
        losses = part["excess_test_loss"]
        rate = scaled(item(rate_of(part, pl.col("failed"))), 100.0)
        rows.append(
            [group, condition, len(part), item(mean_of(part, "excess_test_loss")), losses.min(), losses.max(), rate]
        )
    columns = [
        Column(title),
        Column("optimizer"),
        Column("n", "d", "faulted runs"),
        Column("excess test loss (nats)", "+.4f", "mean over replicates with its 95 % interval"),
        Column("best", "+.4f"),
        Column("worst", "+.4f"),
        Column("failure rate (%)", ".0f"),
    ]
    return TableBlock(columns, rows, f"By {title}, not tested.")


def occurring(recovery: Recovery) -> list[str]:
    """The outcomes that occur, in the order of ``LABELS``."""
    found = set(recovery.measures["outcome"].to_list())
    return [label for label in LABELS if label in found]


def _rate_cells(part: pl.DataFrame, labels: list[str]) -> list[Any]:
    rates = outcome_rates(part["outcome"].to_list(), part["replicate"].to_list(), labels)
    return [scaled(item(rates[label]), 100.0) for label in labels]


def _rate_columns(labels: list[str]) -> list[Column]:
    return [Column(f"{label} (%)", ".0f", "share of all faulted runs and its 95 % interval") for label in labels]


def outcome_table(recovery: Recovery) -> TableBlock:
    """Rates of every outcome that occurs, one row per condition."""
    labels, rows = occurring(recovery), []
    for condition in recovery.order:
        part = recovery.measures.filter(pl.col("condition") == condition)
        if len(part):
            rows.append([condition, len(part), part["replicate"].n_unique(), *_rate_cells(part, labels)])
    columns = [Column("optimizer"), Column("n", "d", "faulted runs"), Column("replicates", "d")]
    several = recovery.measures.select("condition", "replicate").is_duplicated().any()
    method = "clustered by replicate" if several else "by Wilson, one run per replicate"
    caption = f"95 % intervals {method}. Rates of one row add up to 100 %: no run is left out. Labels not shown: 0."
    return TableBlock([*columns, *_rate_columns(labels)], rows, caption)


def outcome_breakdown(recovery: Recovery, title: str) -> TableBlock:
    """Rates of the outcomes per group and condition."""
    labels = occurring(recovery)
    rows = [[g, c, len(part), *_rate_cells(part, labels)] for g, c, part in groups(recovery, KEYS[title])]
    columns = [Column(title), Column("optimizer"), Column("n", "d", "faulted runs"), *_rate_columns(labels)]
    return TableBlock(columns, rows, f"Outcomes by {title}, not tested.")


def breakdown_sections(recovery: Recovery) -> list[Section]:
    """One section per grouping in which the cases differ: losses, then outcomes."""
    return [
        Section(f"By {title}", [breakdown(recovery, title), outcome_breakdown(recovery, title)])
        for title, key in KEYS.items()
        if varies(recovery, key)
    ]


def definitions(rule: Thresholds) -> TableBlock:
    """What the labels mean with the thresholds used, and how many steps after the hit each needs."""
    points, drop = f"{100 * rule.tolerance:g} points", f"{100 * rule.sharp_drop:g} points"
    end, early, late = f"the last {rule.final_window} steps", rule.sharp_horizon, rule.horizon
    sharp = f"training accuracy more than {drop} below the twin's over the first {rule.sharp_window} steps and not back"
    rows: list[list[Any]] = [
        [o.MASKED, f"training and test accuracy within {points} of the twin's over {end}", late],
        [o.RECOVERED, f"the same, after a drop of more than {drop} on the way", late],
        [o.LOW_TEST, f"training accuracy within {points}, test accuracy not", late],
        [o.SLOW, f"training accuracy not within {points}, without a sharp drop", late],
        [o.SHARP_SLOW, f"{sharp}; then further decay or slow recovery", early],
        [o.SHARP, f"{sharp}; own accuracy then stays within {100 * rule.plateau:g} points of where it fell", early],
        [o.IMMEDIATE, f"non-finite at most {rule.immediate} step after the hit", 0],
        [o.SHORT_TERM, f"non-finite at most {rule.short_term} steps after the hit", rule.immediate + 1],
        [o.LATE, f"non-finite more than {rule.short_term} steps after the hit", rule.short_term + 1],
        [o.TOO_SHORT, "not watched for as many steps as its label would need", 0],
        [o.NOT_APPLICABLE, "the run or its twin crashed, the twin is non-finite, or no accuracy is measured", 0],
    ]
    columns = [Column("outcome"), Column("definition"), Column("steps needed", "d", "after the hit")]
    return TableBlock(columns, rows, "Accuracies per batch, beside the twin on the same batches; see docs/outcomes.md.")
