"""Attention, embeddings and where spread and curvature sit in a transformer: figure, table, summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...report import Column, SummaryItem, TableBlock
from ...report.figures import COLOURS, DOUBLE, GREY, LINES, new_figure, styled
from ...theory.intervals import holm, over_replicates, student_p

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arrays = Mapping[str, np.ndarray]
SHOWN = 4  # attention maps
LETTERS = "abcdefgh"
LEVEL = 0.05  # of a cloud's quantities together


def items(found: Arrays) -> dict[str, SummaryItem]:
    """Mean over the runs' ends of every quantity minus its value at theta*, with Student's interval over runs."""
    out = {}
    theta, runs = found["values"][-1], found["run_values"]
    for i, name in enumerate(found["quantities"].tolist()):
        text = f"mean over runs at their end minus its value at theta* ({theta[i]:.6g}); Student's t over runs"
        if len(runs) < 2:
            out[f"language/{name}"] = SummaryItem(None, len(runs), None, None, text)
            continue
        value, low, high = over_replicates(runs[:, i] - theta[i])
        out[f"language/{name}"] = SummaryItem(float(value), len(runs), float(low), float(high), text)
    return out


def table(clouds: Mapping[str, tuple[Arrays, Mapping[str, SummaryItem]]]) -> TableBlock:
    """One row per cloud and quantity: at the start, at theta*, and what the runs make of it."""
    rows: list[list[Any]] = []
    for name, (found, own) in clouds.items():
        adjusted = _p_values(found)
        for i, quantity in enumerate(found["quantities"].tolist()):
            change = own[f"language/{quantity}"]
            verdict = "within noise"
            if change.low is None or change.high is None:
                verdict = "not tested"
            elif adjusted[i] < LEVEL:
                verdict = "rises" if (change.value or 0.0) > 0 else "falls"
            values = [float(found["values"][0, i]), float(found["values"][-1, i])]
            p = None if verdict == "not tested" else float(adjusted[i])
            rows.append([name, quantity.replace("_", " "), *values, change.n, change, p, verdict])
    columns = [
        Column("cloud"),
        Column("quantity"),
        Column("initial weights", ".4g"),
        Column("theta*", ".4g"),
        Column("n", "d", "runs"),
        Column("runs - theta*", "+.3g", "mean over runs at their end, with its 95 % interval, not corrected"),
        Column("Holm p", ".3g", "Student's t over runs, corrected for the quantities of this cloud"),
        Column("verdict", "", "of the runs beside theta*, by the corrected p"),
    ]
    text = (
        "Entropy of attention: 1 where a query looks everywhere alike; previous: weight on the token before; ranks: "
        "how many directions the vectors use; neighbours: cosine between vectors of successive positions. On 64 "
        "windows of the test text."
    )
    return TableBlock(columns, rows, text)


def _p_values(found: Arrays) -> np.ndarray:
    """Holm's p ``[q]`` of no change from theta* to the runs' ends; 0 or 1 where all runs changed alike or not."""
    apart = found["run_values"] - found["values"][-1]
    p, scattered = np.where(apart.mean(0) == 0, 1.0, 0.0), np.ptp(apart, axis=0) > 0
    if len(apart) > 1 and scattered.any():
        p[scattered] = student_p(apart[:, scattered])
    return holm(p)


def picture(found: Arrays) -> Figure:
    """Attention maps at four moments; quantities along training; shares of parameters, spread and curvature."""
    steps, maps = found["steps"], found["maps"]
    shown = np.unique(np.linspace(0, len(maps) - 1, SHOWN).round().astype(int))
    with styled():
        figure = new_figure(DOUBLE, 4.4)
        rows: Any = figure.subfigures(2, 1, height_ratios=(1.0, 1.15))
        top = rows[0].subplots(1, len(shown), squeeze=False)[0]
        for i, (ax, k) in enumerate(zip(top, shown, strict=True)):
            image = ax.imshow(maps[k, 0, 0], vmin=0, vmax=float(maps.max()), cmap="viridis")
            ax.set_title(f"({LETTERS[i]}) " + (r"$\theta^*$" if steps[k] < 0 else f"{steps[k]} updates"))
            ax.set_xlabel("token looked at")
        top[0].set_ylabel("token that looks")
        rows[0].colorbar(image, ax=list(top), label="weight", shrink=0.8)
        below = rows[1].subplots(1, 3, width_ratios=(1, 1, 1.2))
        names = found["quantities"].tolist()
        _along(below[0], found, [names.index(n) for n in ("attention_entropy", "attention_previous")])
        _along(below[1], found, [names.index(n) for n in ("token_rank", "position_rank")])
        below[0].set_ylabel("of the attention weights")
        below[1].set_ylabel("directions in use")
        shares = [found["size"] / found["size"].sum(), found["spread_share"], found["curvature_share"]]
        for j, (share, label) in enumerate(zip(shares, ("parameters", "spread V", "curvature H"), strict=True)):
            below[2].barh(np.arange(len(share)) + 0.27 * (1 - j), share, 0.25, color=COLOURS[j], label=label)
        below[2].set_yticks(np.arange(len(shares[0])), found["parts"].tolist())
        below[2].set_xlabel("share of the trace")
        below[2].axvline(0, color=GREY, linewidth=0.6)
        below[2].set_ylim(-0.6, len(shares[0]) + 1.1)  # room above the bars
        below[2].legend(fontsize=6, loc="upper right")
        for i, (ax, name) in enumerate(zip(below, ("attention", "embeddings", "where it sits"), strict=True)):
            ax.set_title(f"({LETTERS[len(shown) + i]}) {name}")
    return figure


def _along(ax: Any, found: Arrays, chosen: Sequence[int]) -> None:
    steps = found["steps"][:-1] + 1
    for j, i in enumerate(chosen):
        name = str(found["quantities"][i]).replace("attention_", "").replace("_rank", "s")
        ax.plot(steps, found["values"][:-1, i], color=COLOURS[j], linestyle=LINES[j], label=name)
        runs = found["run_values"][:, i]
        low, high = np.quantile(runs, [0.025, 0.975])
        end = steps[-1] * 1.6
        middle = float(np.median(runs))
        ax.errorbar(end, middle, [[middle - low], [high - middle]], fmt="o", color=COLOURS[j], markersize=2, capsize=2)
    ax.set_xscale("log")
    ax.set_xlabel("updates + 1; bars: runs, 95 %")
    ax.legend(fontsize=6)
