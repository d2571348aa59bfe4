"""A grid of panels drawn from a table: one line per value of a key, with bands over replicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy import stats

from .figures import Look, looks, new_figure, panel_title, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (2.6, 2.1)  # inches
MOST = 8  # panels or lines to a side


@dataclass(frozen=True)
class Layout:
    """Which columns of the table go where; None: one row, column or line for all."""

    y: str
    x: str = "step"
    rows: str | None = None
    columns: str | None = None
    hue: str | None = None
    log: bool = False


def values_of(frame: pl.DataFrame, key: str | None) -> list[Any]:
    """The values of a key in order; [None] without one."""
    return [None] if key is None else frame[key].drop_nulls().unique().sort().to_list()


def draw(frame: pl.DataFrame, layout: Layout) -> Figure:
    """Means over runs with 95 % t-intervals; a run that has ended with a value that is not finite leaves no mean."""
    down, across, lines = (values_of(frame, key) for key in (layout.rows, layout.columns, layout.hue))
    styles = looks([str(value) for value in lines])
    with styled():
        figure = new_figure(PANEL[0] * len(across), PANEL[1] * len(down))
        axes = figure.subplots(len(down), len(across), sharex=True, sharey=True, squeeze=False)
        for i, row in enumerate(down):
            for j, column in enumerate(across):
                ax = axes[i, j]
                part = _where(_where(frame, layout.rows, row), layout.columns, column)
                for value in lines:
                    chosen = _where(part, layout.hue, value)
                    _line(ax, chosen, layout, styles[str(value)], "" if value is None else f"{layout.hue} = {value}")
                panel_title(ax, i * len(across) + j, _title(layout, row, column, part["run"].n_unique()))
                if layout.log:
                    ax.set_yscale("log")
                if i == len(down) - 1:
                    ax.set_xlabel(layout.x)
                if j == 0:
                    ax.set_ylabel(layout.y)
        if layout.hue is not None:
            axes[0, 0].legend(fontsize=6)
    return figure


def _title(layout: Layout, row: Any, column: Any, runs: int) -> str:
    parts = [f"{key} = {value}" for key, value in ((layout.rows, row), (layout.columns, column)) if key is not None]
    return ", ".join([*parts, f"{runs} runs"])


def _where(frame: pl.DataFrame, key: str | None, value: Any) -> pl.DataFrame:
    return frame if key is None else frame.filter(pl.col(key) == value)


def _line(ax: Axes, frame: pl.DataFrame, layout: Layout, look: Look, label: str) -> None:
    x, middle, low, high = band(frame, layout.x, layout.y)
    if len(x):
        ax.plot(x, middle, color=look.colour, linestyle=look.line, label=label or None, linewidth=1.2)
        ax.fill_between(x, low, high, color=look.colour, alpha=0.2, linewidth=0)


def band(frame: pl.DataFrame, x: str, y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, low, high) of ``y`` over the runs that have a row there; without an interval where one run has."""
    part = (
        frame.filter(pl.col(y).is_not_null())
        .group_by(x)
        .agg(
            pl.col(y).cast(pl.Float64).mean().alias("mean"),
            pl.col(y).cast(pl.Float64).std().alias("std"),
            pl.len().alias("n"),
        )
    )
    part = part.sort(x)
    n, mean = part["n"].to_numpy(), part["mean"].to_numpy()
    spread = part["std"].fill_null(0.0).to_numpy()
    half = np.where(n > 1, stats.t.ppf(0.975, np.maximum(n - 1, 1)) * spread / np.sqrt(n), 0.0)
    return part[x].to_numpy(), mean, mean - half, mean + half


def too_many(frame: pl.DataFrame, keys: Sequence[str | None]) -> str | None:
    """The first key with more values than a figure can show."""
    return next((key for key in keys if key is not None and len(values_of(frame, key)) > MOST), None)
