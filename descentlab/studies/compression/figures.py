"""Figures of the compression report: from measures to pictures, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from ...core.ring import all_gather_s, all_reduce_s
from ...report import SummaryItem
from ...report.figures import COLOURS, DOUBLE, Look, legend_columns, looks, new_figure, panel_title, styled
from .measures import PARTS, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .prediction import Predicted

Curve = tuple[np.ndarray, np.ndarray]


def _legend(figure: Figure, ax: Axes, width: float = DOUBLE) -> None:
    handles, names = ax.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=legend_columns(names, width))


def tradeoff(
    time: Mapping[str, Curve], sent: Mapping[str, Curve], ends: Mapping[str, Mapping[str, SummaryItem]]
) -> Figure:
    """Test accuracy while training against seconds and against bytes; the end of every method with its interval."""
    look = looks(list(ends))
    with styled():
        figure = new_figure(DOUBLE, 2.9)
        axes = figure.subplots(1, 2, sharey=True)
        panels = ((time, "time_s", "seconds", 1.0), (sent, "bytes_sent", "megabytes sent, all workers", 1e6))
        for i, (ax, (curves, key, says, unit)) in enumerate(zip(axes, panels, strict=True)):
            for method, (x, y) in curves.items():
                _path(ax, method, look[method], x / unit, 100 * y, ends[method])
            values = np.concatenate([x for x, _ in curves.values()]) / unit
            if values.min() > 0 and values.max() > 20 * values.min():
                ax.set_xscale("log")
            ax.set_xlabel(says)
            panel_title(ax, i, f"accuracy against {'time' if key == 'time_s' else 'bytes'}")
        axes[0].set_ylabel("test accuracy (%)")
        _legend(figure, axes[0])
    return figure


def _path(ax: Axes, method: str, look: Look, x: np.ndarray, y: np.ndarray, end: Mapping[str, SummaryItem]) -> None:
    ax.plot(x, y, color=look.colour, linestyle=look.line, linewidth=1.0, label=method)
    last = end["accuracy"]
    if last.low is not None and last.high is not None:
        ax.plot([x[-1]] * 2, [100 * last.low, 100 * last.high], color=look.colour, marker="_", markersize=4)
    ax.plot([x[-1]], [y[-1]], color=look.colour, marker=look.marker, markersize=4.5)


def ranks(
    rank: Mapping[str, Curve],
    change: Mapping[str, Curve],
    norm: Mapping[str, Curve],
    threshold: float | None,
    methods: Sequence[str],
) -> Figure:
    """Mean rank per epoch, and how much the gradient changed: what the policy saw, or the epoch means of the norm.
    ``methods``: of the whole report, so that each looks the same everywhere."""
    look = looks(list(methods))
    with styled():
        figure = new_figure(DOUBLE, 2.6)
        axes = figure.subplots(1, 2)
        for method, (epoch, value) in rank.items():
            axes[0].step(
                epoch, value, where="mid", color=look[method].colour, linestyle=look[method].line, label=method
            )
        axes[0].set_ylabel("rank (mean over matrices)")
        panel_title(axes[0], 0, "rank")
        shown = change or {m: (e[1:], _relative(v)) for m, (e, v) in norm.items() if m in rank and len(v) > 1}
        for method, (epoch, value) in shown.items():
            mark = "." if len(epoch) == 1 else None  # a line needs two points
            axes[1].plot(epoch, value, color=look[method].colour, linestyle=look[method].line, marker=mark)
        if change and threshold is not None:
            axes[1].axhline(threshold, color="black", linewidth=0.7, linestyle=":")
            axes[1].text(1.0, threshold, "threshold ", transform=axes[1].get_yaxis_transform(), ha="right", va="bottom")
        axes[1].set_ylabel("relative change")
        panel_title(axes[1], 1, "gradient change, as the policy saw it" if change else "gradient change between epochs")
        for ax in axes:
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_ylim(bottom=0)
        _legend(figure, axes[0])
    return figure


def _relative(values: np.ndarray) -> np.ndarray:
    return np.abs(np.diff(values)) / np.maximum(values[:-1], 1e-300)


def breakdown(runs: Sequence[Run]) -> Figure:
    """Milliseconds of an update by part, a bar per method; the mean over replicates."""
    methods = list(dict.fromkeys(run.method for run in runs))
    with styled():
        figure = new_figure(DOUBLE, 0.9 + 0.24 * len(methods))
        ax = figure.add_subplot()
        left = np.zeros(len(methods))
        for (key, says), colour in zip(PARTS.items(), COLOURS, strict=False):
            means = [np.mean([run.parts[key] for run in runs if run.method == method]) for method in methods]
            width = 1e3 * np.array(means)
            if width.any():
                ax.barh(range(len(methods)), width, left=left, color=colour, label=says, height=0.7)
            left += width
        for y, total in enumerate(left):
            ax.text(total, y, f" {total:.3g}", va="center", fontsize=7)
        ax.set_yticks(range(len(methods)), methods)
        ax.invert_yaxis()
        ax.set_xlabel("milliseconds of an update")
        ax.margins(x=0.08)
        _legend(figure, ax)
    return figure


def update_s(run: Run, bandwidth_mbps: float, latency_s: float, busy_s: float | None = None) -> float:
    """Seconds of an update of this run over another link, nothing overlapped. ``busy_s``: of what is no sending; None:
    as in the run's parts."""
    collective_s = all_gather_s if run.gathers else all_reduce_s
    payload, messages = run.bytes_sent / run.workers / run.steps, run.messages / run.steps
    busy = busy_s if busy_s is not None else sum(v for key, v in run.parts.items() if key != "collective_s")
    wire = collective_s(payload, run.workers, bandwidth_mbps, 0.0)
    return busy + wire + messages * collective_s(0.0, run.workers, 0.0, latency_s)


def when_it_pays(runs: Sequence[Run], bandwidth_mbps: float, latency_ms: float) -> Figure:
    """Seconds of an update against the link's bandwidth and against its latency, a line per method."""
    methods = list(dict.fromkeys(run.method for run in runs))
    first = {method: next(run for run in runs if run.method == method) for method in methods}
    look = looks(methods)
    rates, delays = np.geomspace(1, 1e4, 60), np.linspace(0, 50, 40)
    panels: tuple[tuple[np.ndarray, str, Callable[[Run, float], float]], ...] = (
        (rates, "Mbit/s", lambda run, x: update_s(run, x, latency_ms / 1e3)),
        (delays, "latency of a hop (ms)", lambda run, x: update_s(run, bandwidth_mbps, x / 1e3)),
    )
    with styled():
        figure = new_figure(DOUBLE, 2.7)
        axes = figure.subplots(1, 2)
        for i, (ax, (xs, says, seconds)) in enumerate(zip(axes, panels, strict=True)):
            for method, run in first.items():
                ys = [1e3 * seconds(run, float(x)) for x in xs]
                ax.plot(xs, ys, color=look[method].colour, linestyle=look[method].line, label=method)
            ax.set_yscale("log")
            ax.set_xlabel(says)
            at = f"{latency_ms:g} ms" if i == 0 else f"{bandwidth_mbps:g} Mbit/s" if bandwidth_mbps else "no limit"
            panel_title(ax, i, f"against {'bandwidth' if i == 0 else 'latency'}, at {at}")
        axes[0].set_xscale("log")
        axes[0].set_ylabel("milliseconds of an update")
        _legend(figure, axes[0])
    return figure


def prediction(predicted: Sequence[Predicted]) -> Figure:
    """Measured against predicted milliseconds of an update: a colour per method, a marker per link."""
    methods = list(dict.fromkeys(one.method.partition(",")[0] for one in predicted))
    rates = sorted({one.bandwidth_mbps for one in predicted}, reverse=True)
    look, marks = looks(methods), dict(zip(rates, cycle("os^Dv<>p*"), strict=False))
    fill = {method: "full" if i < len(COLOURS) else "none" for i, method in enumerate(methods)}  # colours come again
    with styled():
        figure = new_figure(DOUBLE, 3.6)
        ax = figure.add_subplot()
        for one in predicted:
            ax.plot(
                1e3 * one.predicted_s,
                1e3 * one.measured_s,
                linestyle="none",
                marker=marks[one.bandwidth_mbps],
                color=look[one.method.partition(",")[0]].colour,
                fillstyle=fill[one.method.partition(",")[0]],
                markersize=4.5,
            )
        values = [1e3 * v for one in predicted for v in (one.predicted_s, one.measured_s)]
        ends = [0.8 * min(values), 1.25 * max(values)]
        ax.plot(ends, ends, color="black", linewidth=0.7, linestyle=":")
        ax.set(xscale="log", yscale="log", aspect="equal", xlim=ends, ylim=ends)
        ax.set_xlabel("predicted (ms of an update)")
        ax.set_ylabel("measured (ms of an update)")
        for method in methods:
            ax.plot(
                [], [], linestyle="none", marker="o", color=look[method].colour, label=method, fillstyle=fill[method]
            )
        for rate, mark in marks.items():
            ax.plot([], [], linestyle="none", marker=mark, color="grey", label=f"{rate:g} Mbit/s")
        _legend(figure, ax)
    return figure
