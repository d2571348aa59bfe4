"""The six-panel summary of the recovery study."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from ...analysis.contrasts import wins_ties_losses
from ...analysis.paired import replicate_means
from ...analysis.recovery import Recovery, aligned, step_grid
from ...report.figures import (
    DOUBLE,
    GREY,
    Look,
    failed_mark,
    heat,
    legend_columns,
    looks,
    new_figure,
    panel_title,
    signed,
    signed_scale,
    strip,
    styled,
)
from .figures import mean_band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def by_condition(recovery: Recovery, column: str) -> dict[str, np.ndarray]:
    """Values of a measure per condition, shape [runs], by replicate and fault."""
    rows = recovery.measures.sort("replicate", "fault")
    return {name: rows.filter(pl.col("condition") == name)[column].to_numpy() for name in recovery.order}


def shared_cases(recovery: Recovery, first: str, second: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A measure of two conditions on the cases both finished, paired by fault and replicate."""
    both = _shared(recovery, first, second, column)
    return both[column].to_numpy(), both[f"{column}_second"].to_numpy()


def _shared(recovery: Recovery, first: str, second: str, column: str) -> pl.DataFrame:
    rows = recovery.measures.select("condition", "fault", "replicate", column)
    one, two = (rows.filter(pl.col("condition") == name) for name in (first, second))
    return one.join(two, on=["fault", "replicate"], suffix="_second").sort("replicate", "fault")


def paired_differences(recovery: Recovery, first: str, second: str, column: str) -> np.ndarray:
    """One difference per replicate, first minus second: the mean over the fault types both met in it."""
    both = _shared(recovery, first, second, column)
    difference = both[column].to_numpy() - both[f"{column}_second"].to_numpy()
    return replicate_means(difference, both["replicate"].to_list())


def head_to_head(recovery: Recovery) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(row, column) -> wins, ties, losses of the row on excess test loss; a failed run loses to any other."""
    return {
        (a, b): wins_ties_losses(*shared_cases(recovery, a, b, "rank_score"))
        for a in recovery.order
        for b in recovery.order
        if a != b
    }


def _excess_panel(ax: Axes, recovery: Recovery, look: dict[str, Look]) -> None:
    groups = by_condition(recovery, "excess_test_loss")
    strip(ax, groups, by_condition(recovery, "pair_failed"), look)
    signed_scale(ax, np.concatenate(list(groups.values())))
    ax.axhline(0, color=GREY, linewidth=0.7, linestyle=":")
    ax.set_ylabel("excess test loss (nats)")


def _trajectory_panel(ax: Axes, recovery: Recovery, look: dict[str, Look]) -> None:
    steps = step_grid(recovery, 10)
    chance = recovery.scores.chance
    for name in recovery.order:
        fault = aligned(recovery, name, "train_accuracy", steps, chance)
        twin = aligned(recovery, name, "train_accuracy_twin", steps, chance)
        centre, low, high = mean_band(100 * (fault - twin))
        ax.fill_between(steps, low, high, color=look[name].colour, alpha=0.15, linewidth=0)
        ax.plot(steps, centre, color=look[name].colour, linestyle=look[name].line, label=name)
    ax.axvline(0, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)))
    ax.set_xlabel("step after the hit")
    ax.set_ylabel("excess training accuracy\n(points)")


def _wins_panel(ax: Axes, recovery: Recovery) -> None:
    names, table = recovery.order, head_to_head(recovery)
    rates = np.full((len(names), len(names)), np.nan)
    texts = [["" for _ in names] for _ in names]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if a == b or not sum(table[a, b]):
                continue
            wins, ties, losses = table[a, b]
            rates[i, j] = (wins + ties / 2) / (wins + ties + losses)
            texts[i][j] = f"{rates[i, j]:.2f}" if len(names) > 5 else f"{rates[i, j]:.2f}\n{wins}/{ties}/{losses}"
    heat(ax, rates, texts, names, names, colours="PuOr", limits=(0.0, 1.0))
    ax.set_xlabel("against")


def _accuracy_panel(ax: Axes, recovery: Recovery, look: dict[str, Look]) -> None:
    groups = {name: 100 * values for name, values in by_condition(recovery, "excess_test_accuracy").items()}
    strip(ax, groups, by_condition(recovery, "pair_failed"), look)
    signed_scale(ax, np.concatenate(list(groups.values())))
    ax.axhline(0, color=GREY, linewidth=0.7, linestyle=":")
    ax.set_ylabel("excess test accuracy (points)")


def _scatter_panel(ax: Axes, recovery: Recovery, look: dict[str, Look]) -> None:
    rows = recovery.measures.filter(pl.col("excess_at_hit").is_not_null())
    for name in recovery.order:
        own = rows.filter(pl.col("condition") == name)
        for failed, marker in ((False, look[name].marker), (True, "x")):
            part = own.filter(pl.col("failed") == failed)
            ax.scatter(
                part["excess_at_hit"],
                part["excess_test_loss"],
                s=14,
                marker=marker,
                alpha=0.85,
                color="black" if failed else look[name].colour,
                linewidths=1.1 if failed else 0,
            )
    signed_scale(ax, rows["excess_at_hit"].to_numpy(), "x")
    signed_scale(ax, rows["excess_test_loss"].to_numpy(), "y")
    ax.axhline(0, color=GREY, linewidth=0.7, linestyle=":")
    ax.set_xlabel("excess training loss at the hit step (nats)")
    ax.set_ylabel("excess test loss (nats)")


def _epoch_panel(ax: Axes, recovery: Recovery) -> None:
    epochs = sorted(set(recovery.measures["epoch"].to_list()))
    values = np.full((len(recovery.order), len(epochs)), np.nan)
    texts = [["" for _ in epochs] for _ in recovery.order]
    for i, name in enumerate(recovery.order):
        for j, epoch in enumerate(epochs):
            part = recovery.measures.filter((pl.col("condition") == name) & (pl.col("epoch") == epoch))[
                "excess_test_loss"
            ]
            if len(part):
                values[i, j] = part.mean()
                texts[i][j] = f"{signed(values[i, j], '+.2g')}\nn={len(part)}"
    largest = float(np.nanmax(np.abs(values))) or 1.0
    shown = np.arcsinh(values / (largest / 50)) / np.arcsinh(50.0)  # small and large effects both visible
    heat(ax, shown, texts, recovery.order, [str(e) for e in epochs], colours="RdBu_r", limits=(-1.0, 1.0))
    ax.set_xlabel("epoch of the hit")


def overview(recovery: Recovery) -> Figure:
    """Excess loss, aligned trajectories, win rates, excess accuracy, damage at the hit against the end, epochs."""
    look = looks(recovery.order)
    with styled():
        figure = new_figure(DOUBLE, 7.6 + 0.17 * (len(recovery.order) // 4))
        axes = figure.subplots(3, 2)
        _excess_panel(axes[0, 0], recovery, look)
        _trajectory_panel(axes[0, 1], recovery, look)
        _wins_panel(axes[1, 0], recovery)
        _accuracy_panel(axes[1, 1], recovery, look)
        _scatter_panel(axes[2, 0], recovery, look)
        _epoch_panel(axes[2, 1], recovery)
        titles = (
            "test loss over the twin",
            "training accuracy over the twin",
            "win rate of the row (wins/ties/losses)",
            "test accuracy over the twin",
            "damage at the hit and at the end",
            "mean excess test loss (nats)",
        )
        for index, (ax, title) in enumerate(zip(axes.flat, titles, strict=True)):
            panel_title(ax, index, title)
        handles, _ = axes[0, 1].get_legend_handles_labels()
        if recovery.measures["failed"].any():
            handles.append(failed_mark())
        names = [str(handle.get_label()) for handle in handles]
        figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns(names, DOUBLE))
    return figure
