"""What kind of process a cloud is: the figure, the table and the summary of ``statistics.npz``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from ...report import Column, SummaryItem, TableBlock, Verdict
from ...report.figures import COLOURS, DOUBLE, GREY, new_figure, panel_title, styled
from ...theory.intervals import holm
from ..common import plain_item

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arrays = Mapping[str, np.ndarray]
LEVEL = 0.05
CURVES = 4  # directions in the panel of memory


def _item(ends: np.ndarray, n: int, method: str) -> SummaryItem:
    value, low, high = (float(v) for v in ends)
    return SummaryItem(value, n, low, high, method)


def items(found: Arrays) -> dict[str, SummaryItem]:
    """Summary items by their last name; those that could not be measured are left out."""
    n, out = int(found["runs"]), {}
    over = "Student's t, one value per run, entries weighted by their precision"
    if "autocovariance_over_predicted" in found:
        text = f"autocovariance over that of the linear recursion; {over}"
        out["memory_over_predicted"] = _item(found["autocovariance_over_predicted"], n, text)
    if "current_over_predicted" in found:
        text = f"probability current over lr V_ij (lambda_i - lambda_j) / 2 of the linear recursion; {over}"
        out["current_over_predicted"] = _item(found["current_over_predicted"], n, text)
    if found.get("current_p", np.empty(0)).size:
        p = found["current_p"]
        text = f"planes of {len(p)} whose probability current is not zero at {LEVEL:g} after Holm"
        out["current_planes"] = plain_item(float((p < LEVEL).sum()), n, text)
    if len(found.get("temperature", ())):
        t, directions = found["temperature"][:, 0], len(found["temperature"])
        text = f"largest over smallest effective temperature of {directions} stationary directions; chi-square p "
        text += f"of one temperature for all {float(found['temperature_p']):.2g}"
        out["temperature_range"] = plain_item(float(t.max() / t.min()), n, text)
        if "temperature_predicted" in found:
            out["temperature_over_predicted"] = _temperature_factor(found, n)
    for name, what in (("hurst", "Hurst exponent"), ("tail_end", "stable index at the end")):
        if len(found.get(name, ())):
            out[f"{name}_lowest"] = _extreme(found[name], n, f"lowest {what} of {len(found[name])} directions")
    if len(found.get("tail_step", ())):
        text = f"lowest stable index of one update of {len(found['tail_step'])} directions"
        out["tail_step_lowest"] = _extreme(found["tail_step"], n, text)
    if "gaussian_p" in found:
        p = found["gaussian_p"]
        text = f"smallest p of {len(p)} Henze-Zirkler tests of three directions each, after Holm"
        out["gaussian_p"] = plain_item(float(p.min()), n, text)
    kurtosis = float(np.abs(found["kurtosis"]).max()) if len(found.get("kurtosis", ())) else 0.0
    text = f"largest |excess kurtosis| of {len(found.get('kurtosis', ()))} directions; its error is sqrt(24 / n)"
    out["kurtosis_largest"] = plain_item(kurtosis, n, text)
    return out


def _extreme(ends: np.ndarray, n: int, text: str) -> SummaryItem:
    return _item(ends[np.argmin(ends[:, 0])], n, f"{text}, with that direction's own 95 % interval")


def _temperature_factor(found: Arrays, n: int) -> SummaryItem:
    ratio = found["temperature"][:, 0] / found["temperature_predicted"]
    mean, error = float(ratio.mean()), float(np.sqrt(2 / (n - 1) / len(ratio)))
    text = "mean over stationary directions of T_i / (lr S_ii / 2); chi-square errors of independent directions"
    return SummaryItem(mean, n, mean - 1.96 * error, mean + 1.96 * error, text)


def _against(item: SummaryItem, expected: float) -> str:
    if item.low is None or item.high is None:
        return ""
    if item.low <= expected <= item.high:
        return "linear theory holds within noise"
    return "above linear theory" if item.low > expected else "below linear theory"


def _differ(ends: np.ndarray, expected: np.ndarray | float, below: bool = False) -> int:
    """How many of the values ``[k, 3]`` differ from what is expected (or lie ``below`` it), at 5 % after Holm."""
    error = (ends[:, 0] - ends[:, 1]) / 1.96
    z = (expected - ends[:, 0]) / np.maximum(error, 1e-300)
    return int((holm(special.ndtr(-z) if below else 2 * special.ndtr(-np.abs(z))) < LEVEL).sum())


def table(clouds: Mapping[str, tuple[Arrays, Mapping[str, SummaryItem]]]) -> TableBlock:
    """One row per cloud and question, with what a reader may conclude. ``clouds``: name -> (arrays, items)."""
    rows: list[list[Any]] = []
    for name, (found, own) in clouds.items():
        for key, what, expected in (
            ("memory_over_predicted", "memory: autocovariance / linear theory", 1.0),
            ("current_over_predicted", "rotation: probability current / linear theory", 1.0),
            ("temperature_over_predicted", "temperature: mean / linear theory", 1.0),
        ):
            if key in own:
                rows.append([name, what, own[key].n, own[key], "1", _against(own[key], expected)])
        rows += _verdict_rows(name, found, own)
    columns = [
        Column("cloud"),
        Column("question"),
        Column("n", "d", "runs; directions are the kept ones"),
        Column("measured", ".4g", "with its 95 % interval"),
        Column("if linear, Gaussian, reversible"),
        Column("verdict"),
    ]
    text = (
        "Measured in the last steps of the clouds along the kept eigenvectors. Linear theory: Hessian and noise at "
        "theta*, independent batches; nothing is fitted. Families of tests are corrected by Holm at 5 %."
    )
    return TableBlock(columns, rows, text)


def _verdict_rows(name: str, found: Arrays, own: Mapping[str, SummaryItem]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    if "current_planes" in own:
        count, all_of = int(own["current_planes"].value or 0), len(found["current_p"])
        verdict = f"rotates in {count} of {all_of} planes" if count else "no rotation beyond noise"
        rows.append(
            [name, "detailed balance: planes with a current", own["current_planes"].n, float(count), "0", verdict]
        )
    if "temperature_range" in own:
        verdict = "one temperature is within noise"
        chance = float(found["temperature_p"])
        if chance < LEVEL:
            verdict = f"not one temperature (p {'< 1e-99' if chance < 1e-99 else f'= {chance:.1g}'})"
        item = own["temperature_range"]
        rows.append([name, "equipartition: hottest / coldest stationary direction", item.n, item, "1", verdict])
    if "hurst_lowest" in own:
        verdict = f"{_differ(found['hurst'], 0.5)} of {len(found['hurst'])} directions differ from 1/2"
        if "hurst_predicted" in found:
            verdict += f", {_differ(found['hurst'], found['hurst_predicted'])} from linear theory"
        rows.append([name, "Hurst exponent: lowest direction", own["hurst_lowest"].n, own["hurst_lowest"], "", verdict])
    for key, what in (("tail_end", "tail index of positions"), ("tail_step", "tail index of updates")):
        if f"{key}_lowest" in own:
            item = own[f"{key}_lowest"]
            misfit = int((found[f"{key}_misfit"] * len(found[f"{key}_misfit"]) < LEVEL).sum())
            heavy = _differ(found[key], 2.0, below=True)
            verdict = f"heavier than Gaussian in {heavy} of {len(found[key])}" if heavy else "within noise of 2"
            verdict += f"; no stable law in {misfit}" if misfit else ""
            rows.append([name, f"{what}: lowest direction", item.n, item, "2", verdict])
    if "gaussian_p" in own:
        p = found["gaussian_p"]
        rejected = int((p < LEVEL).sum())
        verdict = f"not Gaussian in {rejected} of {len(p)} groups" if rejected else "within noise of Gaussian"
        rows.append(
            [name, "Gaussianity: smallest p of groups of directions", own["gaussian_p"].n, float(p.min()), "", verdict]
        )
    return rows


def verdict(name: str, found: Arrays, own: Mapping[str, SummaryItem]) -> Verdict:
    """All questions of one cloud in one line."""
    rows = table({name: (found, own)}).rows
    text = "; ".join(f"{str(row[1]).partition(':')[0]} {row[-1]}" for row in rows)
    return Verdict(f"{name} as a process: {text}", f"n = {int(found['runs'])}; families of tests corrected by Holm")


def process(found: Arrays) -> Figure:
    """Six measured properties of one cloud along eigenvectors, with 95 % intervals, and linear theory."""
    with styled():
        figure = new_figure(DOUBLE, 4.6)
        axes = figure.subplots(2, 3).ravel()
        _memory(axes[0], found)
        _current(axes[1], found)
        _temperature(axes[2], found)
        _hurst(axes[3], found)
        _tail(axes[4], found)
        _kurtosis(axes[5], found)
        names = ("memory", "rotation", "temperature", "roughness", "tails", "shape")
        for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
            panel_title(ax, i, name)
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=COLOURS[0], marker="o", markersize=3, linestyle="", label="measured, 95 % interval"),
            Line2D([], [], color="black", linewidth=1, label="linear theory, nothing fitted"),
            Line2D([], [], color=GREY, linewidth=0.8, linestyle=":", label="diffusion, Gaussian"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _bars(ax: Axes, x: np.ndarray, ends: np.ndarray, colour: str = COLOURS[0], marker: str = "o") -> None:
    apart = np.abs(ends[:, [1, 2]] - ends[:, :1]).T
    ax.errorbar(x, ends[:, 0], apart, fmt=marker, color=colour, markersize=2.6, elinewidth=0.8, markeredgewidth=0)


def _curvature_axis(ax: Axes, values: np.ndarray) -> None:
    smallest = float(np.abs(values[np.abs(values) > 1e-9]).min(initial=1e-3))
    ax.set_xscale("symlog", linthresh=10 ** np.floor(np.log10(max(smallest, 1e-5))))
    top = int(np.ceil(np.log10(max(float(values.max()), 1e-3))))
    ax.set_xticks([-1e-4, 0.0, *(10.0**e for e in range(top - 4, top + 1, 2))])
    ax.minorticks_off()
    ax.set_xlabel(r"eigenvalue $\lambda$")


def _memory(ax: Axes, found: Arrays) -> None:
    ax.set_xlabel("lag (steps)")
    ax.set_ylabel("autocorrelation")
    if "autocovariance" not in found:
        return
    values, lags = found["curvature"], found["lags"]
    order = np.argsort(-values)
    chosen = order[np.unique(np.linspace(0, len(values) // 2, CURVES).round().astype(int))]
    for j, k in enumerate(chosen):
        _bars(ax, lags, found["autocorrelation"][k], COLOURS[j % len(COLOURS)])
        ax.plot([], [], "o-", color=COLOURS[j % len(COLOURS)], markersize=3, label=rf"$\lambda$ = {values[k]:.2g}")
        if "autocovariance_predicted" in found:
            line = found["autocovariance_predicted"][k]
            ax.plot(lags, line / line[0], color=COLOURS[j % len(COLOURS)], linewidth=1)
    ax.legend(fontsize=6)


def _current(ax: Axes, found: Arrays) -> None:
    ax.set_ylabel("measured turning per step")
    if "current" not in found:
        return
    upper = np.triu_indices(len(found["curvature"]), 1)
    root = np.sqrt(found["autocovariance"][:, 0, 0])
    size = np.outer(root, root)[upper]  # makes it a rate of turning: area per step over the spread in that plane
    ends = found["current"][upper] / size[:, None]
    if "current_predicted" in found:
        x = found["current_predicted"][upper] / size
        span = np.array([x.min(), x.max()])
        ax.plot(span, span, color="black", linewidth=1)
        ax.set_xlabel("turning of linear theory")
    else:
        x = np.arange(len(ends)).astype(float)
        ax.set_xlabel("plane of two modes")
    ax.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    _bars(ax, x, ends)
    ax.locator_params(axis="x", nbins=4)


def _temperature(ax: Axes, found: Arrays) -> None:
    ax.set_ylabel(r"$\lambda V (1 - \eta\lambda/2)$")
    ax.set_xlabel(r"eigenvalue $\lambda$ of stationary modes")
    if not len(found.get("temperature", ())):
        ax.text(0.5, 0.5, "no stationary mode", transform=ax.transAxes, ha="center", fontsize=7)
        return
    from matplotlib.ticker import LogFormatterMathtext

    values = found["temperature_curvature"]
    order = np.argsort(values)
    if "temperature_predicted" in found:
        ax.plot(values[order], found["temperature_predicted"][order], color="black", linewidth=1)
    _bars(ax, values, found["temperature"])
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_minor_formatter(LogFormatterMathtext(minor_thresholds=(1, 0.2)))


def _hurst(ax: Axes, found: Arrays) -> None:
    ax.set_ylabel("Hurst exponent")
    ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    if "hurst" in found:
        values = found["curvature"]
        order = np.argsort(values)
        if "hurst_predicted" in found:
            ax.plot(values[order], found["hurst_predicted"][order], color="black", linewidth=1)
        _bars(ax, values, found["hurst"])
    _curvature_axis(ax, found["curvature"])


def _tail(ax: Axes, found: Arrays) -> None:
    ax.set_ylabel("stable index")
    ax.axhline(2.0, color=GREY, linewidth=0.8, linestyle=":")
    for name, colour, marker, label in (
        ("tail_end", COLOURS[0], "o", "positions"),
        ("tail_step", COLOURS[1], "s", "updates"),
    ):
        if len(found.get(name, ())):
            _bars(ax, found["curvature"], found[name], colour, marker)
            ax.plot([], [], marker, color=colour, markersize=3, label=label)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=6, loc="lower left")
    _curvature_axis(ax, found["curvature"])


def _kurtosis(ax: Axes, found: Arrays) -> None:
    n = int(found["runs"])
    ax.axhline(0.0, color=GREY, linewidth=0.8, linestyle=":")
    ax.axhspan(-1.96 * np.sqrt(24 / n), 1.96 * np.sqrt(24 / n), color=GREY, alpha=0.2, linewidth=0)
    ax.plot(found["curvature"], found["kurtosis"], "o", color=COLOURS[0], markersize=3, markeredgewidth=0)
    ax.plot(found["curvature"], found["skewness"], "s", color=COLOURS[1], markersize=3, markeredgewidth=0)
    ax.plot([], [], "o", color=COLOURS[0], markersize=3, label="excess kurtosis (band: Gaussian)")
    ax.plot([], [], "s", color=COLOURS[1], markersize=3, label="skewness")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.45 * (high - low))
    ax.legend(fontsize=6, loc="upper left")
    ax.set_ylabel("moment")
    _curvature_axis(ax, found["curvature"])
