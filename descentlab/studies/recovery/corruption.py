"""Corruption by layer after the hit, where ``observe.extra=[corruption]`` recorded it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ...analysis.outcomes import clustered_rate
from ...analysis.recovery import Recovery
from ...analysis.results import ResultsLike, last_attempts
from ...core.corrupt import CORRUPT, CORRUPT_BEYOND, CORRUPT_SHARE
from ...report import Column, FigureBlock, Section, TableBlock
from ...report.figures import DOUBLE, legend_columns, looks, new_figure, panel_title, styled
from ..common import item

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("weights", "gradient")
BARS = 24  # tensors of the figure at most, the most corrupt ones


def corrupt_shares(recovery: Recovery, results: ResultsLike) -> pl.DataFrame:
    """One row per faulted run, kind and tensor: largest corrupt share from the hit on; empty where not recorded.

    A share that is null because the run ended is that of its last row.
    """
    columns = [name for name in results.frame.columns if name.startswith(CORRUPT)]
    if not columns:
        return pl.DataFrame()
    own = recovery.measures.select("condition", "replicate", "fault", "run", "hit_step")
    rows = last_attempts(results.frame).select("run", "step", *columns).join(own, on="run")
    worst = (
        rows.filter(pl.col("step") >= pl.col("hit_step"))
        .group_by("condition", "replicate", "fault", "run", maintain_order=True)
        .agg(pl.col(columns).max())
    )
    long = worst.unpivot(columns, index=["condition", "replicate", "fault", "run"], value_name="share")
    parts = pl.col("variable").str.strip_prefix(CORRUPT).str.splitn("/", 2)
    return long.drop_nulls("share").with_columns(
        parts.struct.field("field_0").alias("kind"), parts.struct.field("field_1").alias("tensor")
    )


def corruption_figure(recovery: Recovery, shares: pl.DataFrame) -> Figure:
    """Mean share per tensor, gradients (backward) beside weights, a colour per condition."""
    means = shares.group_by("kind", "tensor", "condition", maintain_order=True).agg(pl.col("share").mean())
    order = list(dict.fromkeys(shares["tensor"].to_list()))
    if len(order) > BARS:
        worst = dict(means.group_by("tensor").agg(pl.col("share").max()).iter_rows())
        kept = sorted(order, key=lambda name: -worst[name])[:BARS]
        order = [name for name in order if name in kept]
    look, names = looks(recovery.order), recovery.order
    high = 0.8 / max(1, len(names))
    with styled():
        columns = legend_columns(names, DOUBLE)
        figure = new_figure(DOUBLE, 0.9 + len(order) * max(0.2, 0.09 * len(names)) + 0.17 * -(-len(names) // columns))
        axes = figure.subplots(1, 2, sharey=True)
        for index, (ax, kind) in enumerate(zip(axes, KINDS, strict=True)):
            for place, name in enumerate(names):
                part = dict(
                    means.filter((pl.col("kind") == kind) & (pl.col("condition") == name))
                    .select("tensor", "share")
                    .iter_rows()
                )
                values = 100 * np.array([part.get(tensor, 0.0) for tensor in order])
                at = np.arange(len(order)) + (place - (len(names) - 1) / 2) * high
                ax.barh(at, values, high, color=look[name].colour, label=name)
            ax.axvline(100 * CORRUPT_SHARE, color="black", linewidth=0.7, linestyle=(0, (2, 2)))
            ax.set_xlim(0, 100)
            ax.set_xlabel("largest corrupt share after the hit (%)")
            panel_title(ax, index, kind)
        axes[0].set_yticks(range(len(order)), order)
        axes[0].set_ylim(len(order) - 0.4, -0.6)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def corruption_section(recovery: Recovery, results: ResultsLike, brief: bool) -> list[Section]:
    """Table and bars; nothing where the observable was not recorded."""
    shares = corrupt_shares(recovery, results)
    if shares.is_empty():
        return []
    rows: list[list[Any]] = []
    parts = shares.partition_by("condition", "tensor", as_dict=True)
    tensors = list(dict.fromkeys(shares["tensor"].to_list()))
    for condition, tensor in ((c, t) for c in recovery.order for t in tensors if (c, t) in parts):
        part = parts[condition, tensor]
        found = {kind: part.filter(pl.col("kind") == kind) for kind in KINDS}
        weights = found["weights"]
        over = clustered_rate((weights["share"] > CORRUPT_SHARE).to_list(), weights["replicate"].to_list())
        mean = [100 * float(found[kind]["share"].mean()) if len(found[kind]) else None for kind in KINDS]  # type: ignore[arg-type]
        rows.append([condition, tensor, len(weights), *mean, item(over, 100.0)])
    columns = [
        Column("optimizer"),
        Column("tensor"),
        Column("n", "d", "faulted runs"),
        Column("weights (%)", ".3g", "largest corrupt share from the hit on, mean over runs"),
        Column("gradient (%)", ".3g", "largest corrupt share from the hit on, mean over runs"),
        Column("runs over the threshold (%)", ".0f", f"weights: more than {100 * CORRUPT_SHARE:g} % corrupt"),
    ]
    caption = (
        f"Corrupt: NaN, infinite or beyond {CORRUPT_BEYOND:g} in absolute value. Intervals 95 %, clustered by "
        "replicate; not tested."
    )
    blocks: list[Any] = [TableBlock(columns, rows, caption)]
    if not brief:
        text = (
            f"Mean over n = {recovery.measures['replicate'].n_unique()} cases of the largest corrupt share from the "
            f"hit on, by tensor; dashed: {100 * CORRUPT_SHARE:g} %. The {BARS} most corrupt tensors at most."
        )
        alt = "Bars of the corrupt share of weights and gradients by tensor"
        blocks.append(FigureBlock("corruption", corruption_figure(recovery, shares), text, alt))
    return [Section("Corruption by layer", blocks)]
