"""Shared parts of figures: sizes, colours, axes and the plots several studies draw. No I/O, no pyplot.

Widths are a journal's: 3.4 in for one column, 7 in for two, text at 7 pt or more at that size. Colours are Okabe
and Ito's palette without its yellow; a condition also has its own line style and marker, so grey print works.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SINGLE, DOUBLE = 3.4, 7.0  # inches
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2, 2, 2, 2, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6b6b6b"
LETTER = 0.062  # inches, mean width of a letter at 8 points
TICKS = 0.45  # inches beside a panel for its tick labels
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
}


@dataclass(frozen=True)
class Look:
    """How one condition is drawn, everywhere the same."""

    colour: str
    line: Any
    marker: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look per condition, by its place in ``names``."""
    return {
        name: Look(COLOURS[i % len(COLOURS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib settings of every figure, for the time of drawing only."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, laid out so that labels keep their room."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panel_title(ax: Axes, index: int, text: str) -> None:
    """``(a) text`` above the panel, broken after commas where it is wider than the panel."""
    place, figure = ax.get_subplotspec(), ax.get_figure()
    across = place.get_gridspec().ncols if place is not None else 1
    width = figure.get_figwidth() if figure is not None else DOUBLE  # type: ignore[union-attr]
    room = int((width / across - TICKS) / LETTER)
    ax.set_title(broken(f"({chr(ord('a') + index)}) {text}", room))


def broken(name: str, room: int) -> str:
    """``name`` with line breaks after commas, lines of at most ``room`` letters where commas allow it."""
    lines = [""]
    for part in name.replace(",", ",\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > room:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns of a legend with these labels fit into ``width`` inches."""
    return max(1, min(len(labels), int(width / (LETTER * (max(map(len, labels), default=1) + 7)))))


def signed_scale(ax: Axes, values: Sequence[float] | np.ndarray, axis: str = "y") -> bool:
    """Linear, or symmetric-log where magnitudes span over two decades; returns whether it is the latter."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    sizes = np.abs(np.asarray(values, dtype=float))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    if not len(sizes) or sizes.max() / np.quantile(sizes, 0.25) < 100:
        return False
    low = math.floor(math.log10(max(float(np.quantile(sizes, 0.1)), sizes.max() * 1e-4)))
    high = math.floor(math.log10(sizes.max()))
    getattr(ax, f"set_{axis}scale")("symlog", linthresh=10.0**low, linscale=0.6)
    decades = [10.0**k for k in range(high, low - 1, -math.ceil((high - low + 1) / 4))][::-1]
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    least, most = float(finite.min()), float(finite.max())
    bottom = least * 3 if least <= -(10.0**low) else -(10.0**low) / (1 if least < 0 else 3)
    top = most * 3 if most >= 10.0**low else 10.0**low / (1 if most > 0 else 3)
    getattr(ax, f"set_{axis}lim")(bottom, top)
    which = ax.yaxis if axis == "y" else ax.xaxis
    which.set_major_locator(
        FixedLocator([*(-d for d in decades[::-1] if -d >= bottom), 0.0, *(d for d in decades if d <= top)])
    )
    which.set_minor_locator(NullLocator())
    which.set_major_formatter(FuncFormatter(lambda v, _: decade_text(v)))
    return True


def signed(value: float, spec: str) -> str:
    """A number with its sign, typeset minus, no sign on what rounds to zero."""
    text = format(value, spec)
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "\u2212")


def plain_log_ticks(ax: Axes) -> None:
    """Quiet ticks for a logarithmic y axis with its limits set: under two decades 1, 2, 5 times powers, written out.

    No minor ticks: they are most of the time matplotlib takes for such an axis.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    low, high = ax.get_ylim()
    ax.yaxis.set_minor_locator(NullLocator())
    if high / low > 100:
        return
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**k for k in powers for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    if len(ticks) < 2:  # much less than a decade: evenly spaced numbers
        ticks = [t for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def decade_text(value: float) -> str:
    """0, 0.1, 1, 10 as they are; further decades as powers."""
    if value == 0:
        return "0"
    power = round(math.log10(abs(value)))
    sign = "\u2212" if value < 0 else ""
    return f"{sign}{10.0**power:g}" if -2 <= power <= 2 else f"${'-' if value < 0 else ''}10^{{{power}}}$"


def strip(
    ax: Axes, groups: Mapping[str, np.ndarray], failed: Mapping[str, np.ndarray], look: Mapping[str, Look]
) -> None:
    """Box (quartiles, whiskers to the extremes) with every replicate beside it; failures as crosses."""
    for place, (name, values) in enumerate(groups.items()):
        colour = look[name].colour
        if len(values) > 2:
            ax.boxplot(
                [values],
                positions=[place - 0.18],
                widths=0.28,
                whis=(0, 100),
                manage_ticks=False,
                patch_artist=True,
                boxprops={"facecolor": colour, "alpha": 0.25, "edgecolor": colour},
                medianprops={"color": colour, "linewidth": 1.6},
                whiskerprops={"color": colour},
                capprops={"color": colour},
            )
        spread = place + 0.2 + 0.12 * _jitter(len(values))
        bad = failed[name]
        ax.scatter(spread[~bad], values[~bad], s=9, marker=look[name].marker, color=colour, linewidths=0, alpha=0.8)
        ax.scatter(spread[bad], values[bad], s=22, marker="x", color="black", linewidths=1.1, zorder=4)
    ax.set_xlim(-0.6, len(groups) - 0.4)
    name_ticks(ax, list(groups))


def _jitter(n: int) -> np.ndarray:
    """Evenly spread, fixed offsets in [-1, 1] (golden-ratio sequence)."""
    return 2 * ((np.arange(n) * 0.6180339887) % 1.0) - 1


def name_ticks(ax: Axes, names: Sequence[str]) -> None:
    """Condition names under a categorical axis, slanted where they would touch."""
    if sum(len(name) for name in names) > 32:
        names = [broken(name, max(8, 40 // len(names))) for name in names]
    slanted = sum(max(map(len, name.split("\n"))) for name in names) > 40
    ax.set_xticks(range(len(names)), names, rotation=25 if slanted else 0, ha="right" if slanted else "center")


def heat(
    ax: Axes,
    values: np.ndarray,
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    colours: str,
    limits: tuple[float, float],
) -> None:
    """A heat map with its numbers written in, which is why it has no colour bar; NaN cells stay blank."""
    from matplotlib import colormaps

    shown = np.ma.masked_invalid(values)
    ax.imshow(shown, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    shade, span = colormaps[colours], (limits[1] - limits[0]) or 1.0
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            colour = "black"
            if math.isfinite(values[i, j]):
                red, green, blue, _ = shade(min(1.0, max(0.0, (values[i, j] - limits[0]) / span)))
                colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color=colour, linespacing=1.15)
    name_ticks(ax, columns)
    ax.set_yticks(range(len(rows)), [broken(row, 12) for row in rows])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


@dataclass(frozen=True)
class Dot:
    """One line of an interval plot; ``low`` and ``high`` may be None, ``group`` picks colour and marker."""

    label: str
    value: float
    low: float | None
    high: float | None
    group: str


def interval_plot(dots: Sequence[Dot], xlabel: str, width: float = SINGLE, zero: bool = True) -> Figure:
    """Dots with intervals, one line each, first on top; a legend where there are several groups.

    Labels that would leave less than half of ``width`` to the dots make the figure two columns wide.
    """
    if max((len(dot.label) for dot in dots), default=0) * LETTER > width / 2:
        width = DOUBLE
    with styled():
        groups = list(dict.fromkeys(dot.group for dot in dots))
        columns = legend_columns(groups, width)
        high = 0.17 * -(-len(groups) // columns) + 0.08 if len(groups) > 1 else 0
        figure = new_figure(width, 0.75 + 0.21 * len(dots) + high)
        ax = figure.add_subplot()
        draw_intervals(ax, dots, looks(groups))
        ax.set_yticks(range(len(dots)), [dot.label for dot in dots])
        ends = [v for dot in dots for v in (dot.value, dot.low, dot.high) if v is not None]
        if zero:
            ax.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
            signed_scale(ax, ends, "x")
        ax.set_xlabel(xlabel)
        if len(groups) > 1:
            figure.legend(loc="outside upper center", ncols=columns)
    return figure


def failed_mark() -> Any:
    """The legend's entry for a failed run."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", marker="x", color="black", markersize=5, label="failed run")


def draw_intervals(ax: Axes, dots: Sequence[Dot], look: Mapping[str, Look]) -> None:
    """The marks of :func:`interval_plot` on an axis, y = place in ``dots`` downwards."""
    seen: set[str] = set()
    for place, dot in enumerate(dots):
        mark = look[dot.group]
        if dot.low is not None and dot.high is not None:
            ax.plot(
                [dot.low, dot.high],
                [place, place],
                color=mark.colour,
                linewidth=1.1,
                marker="|",
                markersize=5,
                markeredgewidth=1.1,
            )
        label = dot.group if dot.group not in seen else "_nolegend_"
        seen.add(dot.group)
        ax.plot(
            [dot.value], [place], marker=mark.marker, color=mark.colour, markersize=3.8, linestyle="none", label=label
        )
    ax.set_ylim(len(dots) - 0.4, -0.6)
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.5)
    ax.tick_params(axis="y", length=0)
