"""Stacked bars of outcomes: what became of the faulted runs, per optimizer and per fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from ...analysis import outcomes as o
from ...analysis.recovery import Recovery
from ...report.figures import DOUBLE, SINGLE, broken, legend_columns, new_figure, panel_title, styled
from .breakdowns import occurring

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# label -> face, hatch, colour of the number written in; Okabe and Ito, infinities in greys
LOOK: dict[str, tuple[str, str, str]] = {
    o.MASKED: ("#dfe7ec", "", "black"),
    o.RECOVERED: ("#56B4E9", "", "black"),
    o.LOW_TEST: ("#E69F00", "", "black"),
    o.SLOW: ("#0072B2", "", "white"),
    o.SHARP_SLOW: ("#CC79A7", "", "black"),
    o.SHARP: ("#D55E00", "", "black"),
    o.IMMEDIATE: ("#000000", "", "white"),
    o.SHORT_TERM: ("#4d4d4d", "", "white"),
    o.LATE: ("#8c8c8c", "", "black"),
    o.TOO_SHORT: ("#ffffff", "////", "black"),
    o.NOT_APPLICABLE: ("#ffffff", "xxxx", "black"),
}
ROOM = 0.055  # of the axis; a narrower segment has no number


def _stack(ax: Axes, rows: list[tuple[str, list[str]]], labels: list[str], named: bool = True) -> None:
    """One horizontal bar per (name, outcomes of its runs), 100 % long, counts written in; first row on top.

    ``named`` false: only the number of runs beside a bar, where a panel to the left has the names.
    """
    for place, (_, found) in enumerate(rows):
        left = 0.0
        for label in labels:
            share = found.count(label) / max(1, len(found))
            if not share:
                continue
            face, hatch, ink = LOOK[label]
            ax.barh(place, 100 * share, 0.72, 100 * left, color=face, hatch=hatch, edgecolor="#404040", linewidth=0.5)
            if share >= ROOM:
                middle = 100 * (left + share / 2)
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6} if hatch else None
                ax.text(
                    middle, place, str(found.count(label)), color=ink, ha="center", va="center", fontsize=7, bbox=box
                )
            left += share
    ticks = [f"{broken(name, 26)} (n={len(found)})" if named else f"n={len(found)}" for name, found in rows]
    ax.set_yticks(range(len(rows)), ticks)
    ax.set_ylim(len(rows) - 0.45, -0.55)
    ax.set_xlim(0, 100)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("share of faulted runs (%)")


def _legend(figure: Figure, labels: list[str], width: float) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=LOOK[n][0], hatch=LOOK[n][1], edgecolor="#404040", linewidth=0.5, label=n) for n in labels
    ]
    figure.legend(
        handles=patches,
        loc="outside lower left",
        ncols=legend_columns(labels, width),
        handlelength=1.3,
        columnspacing=1.0,
    )


def outcomes(recovery: Recovery) -> Figure:
    """One bar per condition, one column wide."""
    labels = occurring(recovery)
    rows = [
        (name, recovery.measures.filter(pl.col("condition") == name)["outcome"].to_list()) for name in recovery.order
    ]
    rows = [(name, found) for name, found in rows if found]
    with styled():
        lines = -(-len(labels) // legend_columns(labels, SINGLE))
        figure = new_figure(SINGLE, 0.75 + 0.24 * len(rows) + 0.17 * lines)
        _stack(figure.add_subplot(), rows, labels)
        _legend(figure, labels, SINGLE)
    return figure


def outcomes_by_fault(recovery: Recovery) -> Figure:
    """A panel per condition, a bar per fault type."""
    labels, names = occurring(recovery), recovery.order
    across = min(3 if max(map(len, recovery.faults)) < 20 else 2, len(names))
    deep = -(-len(names) // across)
    with styled():
        lines = -(-len(labels) // legend_columns(labels, DOUBLE))
        high = deep * (0.7 + 0.22 * len(recovery.faults)) + 0.2 + 0.17 * lines
        figure = new_figure(DOUBLE, high)
        axes = figure.subplots(deep, across, squeeze=False)
        for index, ax in enumerate(axes.flat):
            if index >= len(names):
                ax.set_visible(False)
                continue
            part = recovery.measures.filter(pl.col("condition") == names[index])
            found = {fault: part.filter(pl.col("fault") == fault)["outcome"].to_list() for fault in recovery.faults}
            _stack(ax, list(found.items()), labels, named=index % across == 0)
            panel_title(ax, index, names[index])
        _legend(figure, labels, DOUBLE)
    return figure
