"""Figures of the asynchrony study: functions from frames and outcomes to matplotlib figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ...report.figures import (
    COLOURS,
    DOUBLE,
    GREY,
    SINGLE,
    Look,
    legend_columns,
    looks,
    new_figure,
    panel_title,
    plain_log_ticks,
    styled,
)
from .outcomes import Cell, Outcomes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

XS = {
    "step": "server update",
    "virtual_s": "virtual time (s)",
    "wall_s": "wall time (s)",
    "bytes_sent": "sent to the server (MB)",
}
SCALE = {"bytes_sent": 1e-6}
YS = {"test_accuracy": "test accuracy (%)", "test_loss": "test loss (nats)"}


def _median(frame: pl.DataFrame, cell: int, x: str, y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, median, quartiles) over replicates at each evaluated step; values that are not finite count as the worst."""
    worst = -np.inf if "accuracy" in y else np.inf
    value = pl.when(pl.col(y).is_finite()).then(pl.col(y)).otherwise(worst)
    part = (
        frame.filter(pl.col("cell") == cell, pl.col(y).is_not_null())
        .group_by("step")
        .agg(
            pl.col(x).mean().alias("at"),
            value.median().alias("middle"),
            value.quantile(0.25).alias("low"),
            value.quantile(0.75).alias("high"),
        )
        .sort("step")
    )
    at, *rest = (part[name].to_numpy() for name in ("at", "middle", "low", "high"))
    middle, low, high = (np.where(np.isfinite(v), v, np.nan) for v in rest)
    return at, middle, low, high


def curves(frame: pl.DataFrame, cells: Sequence[Cell], look: Mapping[str, Look]) -> Figure:
    """Accuracy and loss against updates, virtual time, wall time and bytes: medians over replicates."""
    xs = {x: text for x, text in XS.items() if x in frame.columns}
    labels = [cell.name for cell in cells]
    columns = legend_columns(labels, DOUBLE)
    with styled():
        picture = new_figure(DOUBLE, 3.6 + 0.17 * -(-len(labels) // columns))
        axes = picture.subplots(len(YS), len(xs), sharex="col", sharey="row", squeeze=False)
        for i, (y, y_text) in enumerate(YS.items()):
            for j, (x, x_text) in enumerate(xs.items()):
                ax, factor = axes[i, j], 100.0 if "accuracy" in y else 1.0
                for cell in cells:
                    at, middle, low, high = _median(frame, cell.index, x, y)
                    if x != "step" and not at.any():
                        continue  # a single process sends nothing
                    style, at = look[cell.name], at * SCALE.get(x, 1.0)
                    ax.plot(at, factor * middle, color=style.colour, linestyle=style.line, label=cell.name)
                    ax.fill_between(at, factor * low, factor * high, color=style.colour, alpha=0.12, linewidth=0)
                if x != "step" and ax.lines:
                    _log_axis(ax)
                if i == len(YS) - 1:
                    ax.set_xlabel(x_text)
                if j == 0:
                    ax.set_ylabel(y_text)
                panel_title(ax, i * len(xs) + j, "")
        handles, names = axes[0, 0].get_legend_handles_labels()
        picture.legend(handles, names, loc="outside lower center", ncols=columns)
    return picture


def _log_axis(ax: Axes) -> None:
    """A logarithmic x axis with a few ticks, written out."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ax.set_xscale("log")
    low, high = ax.get_xlim()
    marks = (1, 2, 5) if high / low <= 12 else (1, 3) if high / low <= 200 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [mark * 10.0**power for power in powers for mark in marks if low <= mark * 10.0**power <= high]
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def validation(frame: pl.DataFrame, cells: Sequence[Cell]) -> Figure:
    """Loss on the training, validation and test set, with a mark where the validation loss is least."""
    columns = {"train_set_loss": ("training", 0), "validation_loss": ("validation", 1), "test_loss": ("test", 2)}
    shown = {column: of for column, of in columns.items() if column in frame.columns}
    across = min(3, len(cells))
    down = -(-len(cells) // across)
    with styled():
        picture = new_figure(DOUBLE, 0.5 + 1.45 * down)
        axes = picture.subplots(down, across, squeeze=False, sharex=True).ravel()
        for ax in axes[len(cells) :]:
            ax.set_visible(False)
        for i, (ax, cell) in enumerate(zip(axes, cells, strict=False)):
            for column, (label, c) in shown.items():
                at, middle, _, _ = _median(frame, cell.index, "step", column)
                ax.plot(at, middle, color=COLOURS[c], label=label, linewidth=1.1)
                if column == "validation_loss" and np.isfinite(middle).any():
                    best = int(np.nanargmin(middle))
                    ax.plot(at[best], middle[best], marker="v", color="black", markersize=5, linestyle="none")
                    ax.axvline(at[best], color=GREY, linewidth=0.6, linestyle=":")
            panel_title(ax, i, cell.name)
            if i + across >= len(cells):
                ax.set_xlabel("server update")
                ax.tick_params(labelbottom=True)
            if i % across == 0:
                ax.set_ylabel("loss (nats)")
        handles, names = axes[0].get_legend_handles_labels()
        picture.legend(handles, names, loc="outside lower center", ncols=3)
    return picture


def staleness(frame: pl.DataFrame, cells: Sequence[Cell], expected: Mapping[str, float]) -> Figure:
    """How many updates old the contributions were, as shares of all updates (logarithmic, for the tail); a line where
    theory has the mean."""
    down = -(-len(cells) // 3)
    with styled():
        picture = new_figure(DOUBLE, 0.3 + 1.5 * down)
        axes = picture.subplots(down, min(3, len(cells)), squeeze=False).ravel()
        for ax in axes[len(cells) :]:
            ax.set_visible(False)
        for i, (ax, cell) in enumerate(zip(axes, cells, strict=False)):
            seen = frame.filter(pl.col("cell") == cell.index)["staleness"].drop_nulls().to_numpy()
            if not len(seen):
                continue
            top = max(1, int(seen.max()))
            width = max(1, -(-top // 30))
            edges = np.arange(0, top + 2 * width, width) - 0.5
            share = np.histogram(seen, edges)[0] / len(seen)
            ax.bar(edges[:-1] + width / 2, 100 * share, width=0.9 * width, color=COLOURS[0], linewidth=0)
            ax.set_yscale("log")
            ax.set_ylim(50 / len(seen), 900)  # half a single update; room for the legend
            plain_log_ticks(ax)
            ax.axvline(seen.mean(), color="black", linewidth=0.9, label=f"mean {seen.mean():.2f}")
            if cell.name in expected:
                theory = expected[cell.name]
                ax.axvline(theory, color=COLOURS[1], linewidth=0.9, linestyle="--", label=f"expected {theory:.2f}")
            ax.legend(loc="upper right")
            ax.set_xlabel("staleness (versions)")
            panel_title(ax, i, cell.name)
        axes[0].set_ylabel("share of updates (%)")
    return picture


def timelines(tables: Mapping[str, tuple[int, Sequence[tuple[float, tuple[int, ...], float]]]]) -> Figure:
    """Who contributed when: for each cell a line per worker, a mark per update; ``tables``: name -> workers, ticks."""
    with styled():
        picture = new_figure(DOUBLE, 0.35 + sum(0.42 + 0.11 * w for w, _ in tables.values()))
        axes = picture.subplots(
            len(tables), 1, squeeze=False, height_ratios=[2 + w for w, _ in tables.values()]
        ).ravel()
        for i, (ax, (name, (workers, ticks))) in enumerate(zip(axes, tables.items(), strict=True)):
            for w in range(workers):
                at, colour = [time_s for time_s, chosen, _ in ticks if w in chosen], COLOURS[w % len(COLOURS)]
                ax.plot([0, *at], [w] * (len(at) + 1), color=colour, linewidth=2.2, alpha=0.35)
                ax.plot(at, [w] * len(at), marker="|", color=colour, markersize=6, linestyle="none")
            ax.set_xlim(0, _until(workers, ticks))
            ax.set_ylim(workers - 0.5, -0.5)
            ax.set_yticks(range(workers))
            ax.set_ylabel("worker")
            panel_title(ax, i, name)
        axes[-1].set_xlabel("virtual time (s)")
    return picture


def _until(workers: int, ticks: Sequence[tuple[float, tuple[int, ...], float]]) -> float:
    """What a panel of :func:`timelines` shows: six updates of a worker, and two of the slowest."""
    usual = ticks[min(len(ticks) - 1, 6 * workers // max(1, len(ticks[0][1])))][0]
    slowest = 0.0
    for worker in range(workers):
        own = [time_s for time_s, chosen, _ in ticks if worker in chosen][:2]
        slowest = max(slowest, own[-1] if own else 0.0)
    return max(usual, 1.05 * slowest) or 1.0


def class_counts(tables: Mapping[str, Sequence[Sequence[int]]]) -> Figure:
    """Samples of each class that each worker has, one panel per partition."""
    from matplotlib import colormaps

    with styled():
        picture = new_figure(DOUBLE, 2.1)
        axes = picture.subplots(1, len(tables), squeeze=False, sharey=True).ravel()
        for i, (ax, (name, table)) in enumerate(zip(axes, tables.items(), strict=True)):
            counts = np.array(table)
            bottom = np.zeros(len(counts))
            for label in range(counts.shape[1]):
                colour = colormaps["tab20"](label % 20)
                ax.bar(np.arange(len(counts)), counts[:, label], 0.8, bottom, color=colour, label=str(label))
                bottom += counts[:, label]
            ax.set_xticks(range(len(counts)))
            ax.set_xlabel("worker")
            panel_title(ax, i, name)
        axes[0].set_ylabel("training samples")
        handles, names = axes[0].get_legend_handles_labels()
        if len(names) <= 20:
            picture.legend(handles, names, loc="outside right center", title="class")
    return picture


def gaps(found: Outcomes) -> Figure:
    """Test minus training loss against momentum, one line per way of not waiting, one panel per partition."""
    cells = [cell for cell in found.cells if found.ended(cell)]
    panels = list(dict.fromkeys(cell.factors["partition"] for cell in cells if not cell.alone))
    panels = panels or list(dict.fromkeys(cell.factors["partition"] for cell in cells))
    kinds = list(dict.fromkeys(_kind(cell) for cell in cells))
    look = looks(kinds)
    with styled():
        picture = new_figure(SINGLE if len(panels) == 1 else DOUBLE, 2.5)
        axes = picture.subplots(1, len(panels), squeeze=False, sharey=True).ravel()
        for i, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
            for k, kind in enumerate(kinds):
                _gap_line(ax, found, [c for c in cells if _kind(c) == kind and _stands(c, panel)], look[kind], kind, k)
            ax.set_xlabel("momentum")
            ax.axhline(0, color=GREY, linewidth=0.6)
            panel_title(ax, i, panel)
        axes[0].set_ylabel("test \u2212 training loss (nats)")
        handles: dict[str, Any] = {}
        for ax in axes:
            handles.update(dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True)))
        picture.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2)
    return picture


def _kind(cell: Cell) -> str:
    if cell.alone:
        return "single process"
    if cell.settings["timeline"]["name"] == "barrier":
        return cell.factors["timeline"].split(",")[0]
    rule = cell.factors["staleness_rule"]
    return ", ".join(
        [cell.factors["timeline"].split(",")[0], cell.factors["delay"], *([rule] if rule != "none" else [])]
    )


def _stands(cell: Cell, panel: str) -> bool:
    return cell.alone or cell.factors["partition"] == panel


def _gap_line(ax: Axes, found: Outcomes, cells: Sequence[Cell], style: Look, label: str, k: int) -> None:
    """Points with the range over replicates, joined where there are several momenta."""
    points = []
    for cell in cells:
        values = found.gap(cell, found.ended(cell))
        momentum = float(cell.settings["optimizer"].get("momentum", 0.0) or cell.settings["worker_momentum"])
        points.append((momentum, float(np.median(values)), values))
    points.sort(key=lambda p: p[0])
    for momentum, _, values in points:
        x = momentum + 0.012 * (k - 1.5)
        ax.plot([x, x], [np.quantile(values, 0.25), np.quantile(values, 0.75)], color=style.colour, linewidth=1)
    ax.plot(
        [p[0] + 0.012 * (k - 1.5) for p in points],
        [p[1] for p in points],
        color=style.colour,
        linestyle=style.line,
        marker=style.marker,
        label=label,
        ms=4,
    )


def scaling(names: Sequence[str], rates: Sequence[float], efficiency: Sequence[float | None]) -> Figure:
    """Samples per virtual second, with the efficiency against as many single processes written beside."""
    with styled():
        picture = new_figure(DOUBLE, 0.6 + 0.2 * len(names))
        ax = picture.add_subplot()
        ax.barh(range(len(names)), rates, color=COLOURS[0], height=0.65, linewidth=0)
        for i, (rate, share) in enumerate(zip(rates, efficiency, strict=True)):
            text = "" if share is None else f" {100 * share:.0f} %"
            ax.text(rate, i, text, va="center", fontsize=7)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlabel("samples per virtual second")
    return picture


def efficiencies(lines: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Scaling efficiency (samples per second over those of as many single processes) against the number of workers."""
    look = looks(list(lines))
    with styled():
        picture = new_figure(SINGLE, 2.4)
        ax = picture.add_subplot()
        ax.axhline(100, color=GREY, linewidth=0.6)
        for name, points in lines.items():
            workers, shares = zip(*sorted(points), strict=True)
            style = look[name]
            heights = [100 * share for share in shares]
            ax.plot(workers, heights, color=style.colour, linestyle=style.line, marker=style.marker, ms=4, label=name)
        ax.set_xticks(sorted({workers for points in lines.values() for workers, _ in points}))
        ax.set_ylim(0, 110)
        ax.set_xlabel("workers")
        ax.set_ylabel("efficiency (%)")
        picture.legend(loc="outside lower center", ncols=legend_columns(list(lines), SINGLE))
    return picture
