"""Figures of the recovery study: functions from measures to a matplotlib Figure. Steps are counted from the hit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from ...analysis.pollution import BN_MOMENTUM, moving_average, smoothing
from ...analysis.recovery import Recovery, aligned, step_grid
from ...report.figures import (
    DOUBLE,
    GREY,
    Look,
    failed_mark,
    legend_columns,
    looks,
    name_ticks,
    new_figure,
    panel_title,
    plain_log_ticks,
    signed,
    signed_scale,
    styled,
)
from ...theory.slots import slot_curve, update_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTH = 9  # steps of the centred moving average


def smoothed(values: np.ndarray, width: int = SMOOTH) -> np.ndarray:
    """Centred moving average, shorter at the ends, NaN where a value is NaN."""
    half = width // 2
    padded = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.nan if np.isnan(values[i]) else np.nanmean(part) for i, part in enumerate(padded)])


def _hit_line(ax: Axes, at: float) -> None:
    ax.axvline(at, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)


def _case_lines(ax: Axes, part: pl.DataFrame, column: str, look: Look, name: str) -> None:
    """Per-batch values lightly, moving averages (before the hit and after it, never across) on top."""
    step, values = part["step"].to_numpy(), part[column].cast(pl.Float64).fill_null(np.nan).to_numpy()
    ax.plot(step, values, color=look.colour, alpha=0.25, linewidth=0.6)
    after = part["relative_step"].to_numpy() > 0
    before = part["relative_step"].to_numpy() < 0
    for number, side in enumerate((before, after)):
        label = name if number else "_nolegend_"
        ax.plot(step[side], smoothed(values[side]), color=look.colour, linestyle=look.line, label=label)
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) and finite[-1] < len(values) - 1:  # the run ended early
        ax.plot(step[finite[-1]], values[finite[-1]], "x", color="black", markersize=6, zorder=5)


def _final_bars(ax: Axes, chosen: pl.DataFrame, look: dict[str, Look], names: list[str]) -> None:
    place = np.arange(len(names))
    twin, fault = chosen["twin_test_accuracy"].to_numpy(), chosen["final_test_accuracy"].to_numpy()
    ax.bar(place - 0.2, twin, 0.36, color="white", edgecolor=GREY, hatch="////", linewidth=0.6, label="twin (no fault)")
    ax.bar(place + 0.2, fault, 0.36, color=[look[n].colour for n in names], label="with the fault")
    for i in range(len(names)):
        ax.annotate(
            signed(100 * (fault[i] - twin[i]), "+.1f"),
            (i, max(twin[i], fault[i])),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
        )
    ax.set_ylim(0, 1.12)
    ax.set_yticks(np.arange(0, 1.01, 0.2))
    ax.set_ylabel("final test accuracy")
    name_ticks(ax, names)


def _excess_bars(ax: Axes, chosen: pl.DataFrame, look: dict[str, Look], names: list[str]) -> None:
    excess = chosen["excess_test_loss"].to_numpy()
    ax.bar(np.arange(len(names)), excess, 0.6, color=[look[n].colour for n in names])
    signed_scale(ax, excess)
    ax.axhline(0, color="black", linewidth=0.6)
    for i, value in enumerate(excess):
        text = signed(value, "+.2g") + ("\nfailed" if chosen["failed"][i] else "")
        ax.annotate(
            text,
            (i, value),
            xytext=(0, 2 if value >= 0 else -2),
            textcoords="offset points",
            ha="center",
            va="bottom" if value >= 0 else "top",
            fontsize=7,
        )
    low, high = ax.get_ylim()
    if ax.get_yscale() == "linear":
        room = 0.15 * (high - low)
        ax.set_ylim(low - room * bool((excess < 0).any()), high + room)
    else:
        ax.set_ylim(low * (4 if (excess < 0).any() else 1), high * 6)
    ax.set_ylabel("excess test loss (nats)")
    name_ticks(ax, names)


def comparison(recovery: Recovery, fault: str, case: int) -> Figure:
    """Four panels on one case: training accuracy, training loss, final test accuracy, excess test loss."""
    one = (pl.col("replicate") == case) & (pl.col("fault") == fault)
    chosen = recovery.measures.filter(one)
    names = [name for name in recovery.order if name in chosen["condition"].to_list()]
    chosen = pl.concat([chosen.filter(pl.col("condition") == name) for name in names])
    hit, look = int(chosen["hit_step"][0]), looks(recovery.order)
    with styled():
        figure = new_figure(DOUBLE, 4.9)
        axes = figure.subplots(2, 2)
        for index, (column, label) in enumerate(
            (("train_accuracy", "training accuracy"), ("train_loss", "training loss (nats)"))
        ):
            ax = axes[0, index]
            for name in names:
                part = recovery.steps.filter(one & (pl.col("condition") == name))
                _case_lines(ax, part, column, look[name], name)
            _hit_line(ax, hit)
            ax.set_xlabel(f"step (hit at step {hit}, dashed)")
            ax.set_ylabel(label)
            panel_title(ax, index, f"{label.split(' (')[0]} per batch")
        axes[0, 0].set_ylim(0, 1.03)
        axes[0, 1].set_yscale("log")
        plain_log_ticks(axes[0, 1])
        _final_bars(axes[1, 0], chosen, look, names)
        panel_title(axes[1, 0], 2, "final test accuracy, change in points")
        _excess_bars(axes[1, 1], chosen, look, names)
        panel_title(axes[1, 1], 3, "test loss over the twin")
        handles = [*axes[0, 0].get_legend_handles_labels()[0], axes[1, 0].containers[0]]
        if chosen["failed"].any():
            handles.append(failed_mark())
        columns = legend_columns([str(handle.get_label()) for handle in handles], DOUBLE)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


Band = tuple[np.ndarray, np.ndarray, np.ndarray]  # centre, low, high over steps


def _draw_band(ax: Axes, x: np.ndarray, band: Band, look: Look, label: str = "_nolegend_") -> None:
    centre, low, high = band
    ax.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0)
    ax.plot(x, centre, color=look.colour, linestyle=look.line, label=label)


def mean_band(values: np.ndarray) -> Band:
    """Mean and 95 % t interval over cases of values [cases, steps], where at least half of the cases (2) contribute."""
    from scipy import special

    n = np.isfinite(values).sum(axis=0)
    enough = (n >= 2) & (2 * n >= len(values))
    shown = np.where(enough, values, 0.0)
    shown = np.where(enough & ~np.isfinite(values), np.nan, shown)
    centre, spread = np.nanmean(shown, axis=0), np.nanstd(shown, axis=0) * np.sqrt(n / np.maximum(1, n - 1))
    half = special.stdtrit(np.maximum(1, n - 1), 0.975) * spread / np.sqrt(np.maximum(1, n))
    hide = np.where(enough, 0.0, np.nan)
    return centre + hide, centre - half + hide, centre + half + hide


def median_band(values: np.ndarray) -> Band:
    """Median and quartiles over cases of values [cases, steps] (infinities count), where half the cases are."""
    n = (~np.isnan(values)).sum(axis=0)
    out = np.full((3, values.shape[1]), np.nan)
    for j in np.flatnonzero((n >= 1) & (2 * n >= len(values))):
        column = values[~np.isnan(values[:, j]), j]
        out[:, j] = np.quantile(column, [0.5, 0.25, 0.75], method="nearest")
    return out[0], out[1], out[2]


def zoom(recovery: Recovery, before: int = 10) -> Figure:
    """Per optimizer, loss (median, quartiles) and accuracy (mean, 95 % t) around the hit: fault against twin."""
    steps = step_grid(recovery, before)
    names, charge, chance = recovery.order, recovery.scores.failure_loss, recovery.scores.chance
    look, across = looks(names), min(4, len(names))
    grey = Look(GREY, (0, (3, 1.5)), "o")
    deep = -(-len(names) // across)
    with styled():
        figure = new_figure(DOUBLE, 3.4 * deep + 0.3)
        axes = figure.subplots(2 * deep, across, squeeze=False, sharex=True)
        for ax in axes.flat:
            ax.set_visible(False)
        for index, name in enumerate(names):
            for row, (column, failed, band) in enumerate(
                (("train_loss", charge, median_band), ("train_accuracy", chance, mean_band))
            ):
                ax = axes[2 * (index // across) + row, index % across]
                ax.set_visible(True)
                cut = 1.0 if row else np.inf
                for suffix, line in (("_twin", grey), ("", Look(look[name].colour, "-", "o"))):
                    centre, low, high = band(aligned(recovery, name, f"{column}{suffix}", steps, failed))
                    _draw_band(ax, steps, (centre, np.clip(low, 0, cut), np.clip(high, 0, cut)), line)
                _hit_line(ax, 0)
                ax.tick_params(labelleft=index % across == 0, labelbottom=True)
            panel_title(axes[2 * (index // across), index % across], index, name)
        _share(axes, deep, across, len(names))
        for index in range(max(0, len(names) - across), len(names)):  # the lowest panel of each column
            axes[2 * (index // across) + 1, index % across].set_xlabel("step after the hit")
        figure.legend(*_black_legend(), loc="outside lower center", ncols=2)
    return figure


def _black_legend() -> tuple[list, list[str]]:
    from matplotlib.lines import Line2D

    return (
        [Line2D([], [], color="black", linestyle="-"), Line2D([], [], color=GREY, linestyle=(0, (3, 1.5)))],
        ["with the fault (optimizer's colour)", "twin: same run without the fault"],
    )


def _share(axes: np.ndarray, deep: int, across: int, count: int) -> None:
    """One y range per row kind, and labels on the left only."""
    for row, label in enumerate(("training loss (nats)", "training accuracy")):
        used = [axes[2 * (i // across) + row, i % across] for i in range(count)]
        if row == 0:
            for ax in used:
                ax.set_yscale("log")
            low, high = min(ax.get_ylim()[0] for ax in used), max(ax.get_ylim()[1] for ax in used)
        else:
            low, high = 0.0, 1.03
        for ax in used:
            ax.set_ylim(low, high)
            if row == 0:
                plain_log_ticks(ax)
        for block in range(deep):
            axes[2 * block + row, 0].set_ylabel(label)


def state_ratios(recovery: Recovery, column: str, steps: np.ndarray) -> dict[str, np.ndarray]:
    """Fault over twin of a state measure per condition, shape [cases, steps]; inf where the fault made it so."""
    ratios = {}
    for name in recovery.order:
        fault = aligned(recovery, name, column, steps, np.inf)
        twin = aligned(recovery, name, f"{column}_twin", steps)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = fault / twin
        lost = np.isnan(fault) & np.isfinite(twin) & (steps >= 0) & np.isnan(fault).any(axis=1)[:, None]
        ratios[name] = np.where(lost, np.inf, ratio)
    return ratios


def _update_ratios(recovery: Recovery, steps: np.ndarray) -> dict[str, np.ndarray]:
    """Size of the update over the twin's per condition, [cases, steps]: moving average after the hit, none before."""
    out = {}
    for name, ratio in state_ratios(recovery, "update_norm", steps).items():
        later = np.where(np.isfinite(ratio[:, steps > 0]), ratio[:, steps > 0], np.nan)
        width = smoothing(later.shape[1])
        out[name] = np.full(ratio.shape, np.nan)
        out[name][:, steps > 0] = [moving_average(one, width) for one in later]
    return out


def predicted_curves(recovery: Recovery, condition: str, column: str, steps: np.ndarray) -> np.ndarray | None:
    """Predicted ratio to the twin, median over runs, at ``steps`` (NaN before the hit); None where nothing is known."""
    own = recovery.steps.filter((pl.col("condition") == condition) & (pl.col("relative_step") == 0))
    settings, later = recovery.optimizers[condition], steps[steps >= 0]
    curves: list[np.ndarray | None] = []
    if column == "update_norm":
        spikes = recovery.measures.filter(pl.col("condition") == condition)["spike"].drop_nulls().to_list()
        curves = [update_curve(settings, abs(spike), later) for spike in spikes]
    else:
        for hit, normal in own.select(column, f"{column}_twin").cast(pl.Float64).fill_null(np.nan).iter_rows():
            if not (normal > 0 and np.isfinite(hit)):
                curves.append(np.full(len(later), np.inf if normal > 0 else np.nan))
            elif column == "bn_var_max":
                curves.append(1 + (hit / normal - 1) * (1 - BN_MOMENTUM) ** later)
            else:
                found = slot_curve(settings, hit, normal, later)
                curves.append(np.ones(len(later)) if found is None else found)
    known = [c for c in curves if c is not None and not np.isnan(c).all()]
    if not known or not (np.median(known, axis=0)[0] > 1.0 + 1e-9):
        return None
    out = np.full(len(steps), np.nan)
    out[steps >= 0] = np.quantile(known, 0.5, axis=0, method="nearest")
    return out


STATES = {
    "slot_max": "largest optimizer slot",
    "bn_var_max": "largest BatchNorm variance",
    "update_norm": "size of the updates",
}


def _state_panel(ax: Axes, recovery: Recovery, column: str, steps: np.ndarray, look: dict[str, Look]) -> bool:
    """Median ratio to the twin, quartiles, and what theory predicts; False where it predicts nothing."""
    made = _update_ratios(recovery, steps) if column == "update_norm" else state_ratios(recovery, column, steps)
    ratios = {n: r for n, r in made.items() if np.isfinite(r).any()}  # an optimizer without slots has none
    top = max([10.0, *(10 * float(np.nanmax(r, where=np.isfinite(r), initial=1.0)) for r in ratios.values())])
    if column == "update_norm":
        top = min(top, 1e4)  # the update of the fault itself is in no average; further ones can still overflow
    curves = {}
    for name, ratio in ratios.items():
        centre, low, high = median_band(np.minimum(ratio, 10 * top))  # non-finite: above the axis
        _draw_band(ax, steps, (centre, low, high), look[name], label=name)
        predicted = predicted_curves(recovery, name, column, steps)
        if predicted is not None:
            curves[name] = predicted
            first = int(column == "update_norm")  # the spike itself is no part of the moving average
            place = np.flatnonzero(steps >= first)[:: max(1, len(steps) // 14)]
            ax.plot(steps[place], np.minimum(predicted, 10 * top)[place], "x", color=look[name].colour, ms=3.5)
    ax.set_yscale("log")
    drawn = [r[np.isfinite(r) & (r > 0)] for r in (*ratios.values(), *curves.values())]
    ax.set_ylim(max(min([0.5, *(0.5 * float(d.min()) for d in drawn if len(d))]), 1e-6), top)
    plain_log_ticks(ax)
    ax.axhline(1, color=GREY, linewidth=0.7, linestyle=":")
    _hit_line(ax, 0)
    ax.set_xlabel("step after the hit")
    return bool(curves)


def state(recovery: Recovery) -> Figure:
    """Largest slot, BatchNorm variance and updates over the twin's after the hit; crosses: the predicted decay."""
    from matplotlib.lines import Line2D

    steps, look, predicted = step_grid(recovery, 5), looks(recovery.order), False
    shown = [c for c in STATES if c in recovery.steps.columns and recovery.steps[c].is_not_null().any()]
    with styled():
        figure = new_figure(DOUBLE, 2.6 + 0.16 * (-(-len(recovery.order) // 4) - 1))
        axes = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
        for index, (ax, column) in enumerate(zip(axes, shown, strict=False)):
            predicted |= _state_panel(ax, recovery, column, steps, look)
            panel_title(ax, index, STATES[column])
        axes[0].set_ylabel("ratio to the twin")
        handles = {n: h for ax in axes for h, n in zip(*ax.get_legend_handles_labels(), strict=True)}
        if predicted:
            mark = Line2D([], [], color="black", linestyle="none", marker="x", markersize=3.5)
            handles["predicted (optimizer's colour)"] = mark
        if handles:
            columns = legend_columns(list(handles), DOUBLE)
            figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
    return figure


__all__ = ["comparison", "mean_band", "median_band", "smoothed", "state", "state_ratios", "zoom"]
