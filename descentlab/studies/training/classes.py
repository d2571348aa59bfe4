"""What the training report says of every class of the test set, where it was measured, and of time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ...analysis.failures import Scores
from ...analysis.paired import estimate
from ...analysis.results import ResultsLike, last_attempts
from ...report import Column, FigureBlock, Section, SummaryItem, TableBlock
from ...report.figures import DOUBLE, looks, new_figure, panel_title, styled
from ..common import bounded, item, scaled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECALL, PRECISION, SUPPORT = "test_accuracy_class", "test_precision_class", "test_support_class"
SHOWN = 8  # configurations in the figure


def class_sections(
    results: ResultsLike, labels: Mapping[int, str], by_cell: Mapping[int, Sequence[str]], scores: Scores
) -> list[Section]:
    """A table and bars with a value per class; nothing where no run measured any."""
    classes = sorted(
        int(found[1]) for name in results.frame.columns if (found := re.fullmatch(rf"{RECALL}_(\d+)", name))
    )
    if not classes:
        return []
    rows: list[list[Any]] = []
    drawn: dict[int, list[SummaryItem]] = {}
    for cell, runs in sorted(by_cell.items()):
        last = _last(results.frame, runs)
        for label in classes:
            recall = _mean(last, f"{RECALL}_{label}", runs, scores)
            precision = _mean(last, f"{PRECISION}_{label}", runs, scores)
            support = last[f"{SUPPORT}_{label}"].max() if f"{SUPPORT}_{label}" in last.columns else None
            drawn.setdefault(cell, []).append(recall)
            rows.append(
                [labels[cell], label, support, scaled(recall, 100.0), _scaled(precision), _f1(recall, precision)]
            )
    columns = [
        Column("configuration"),
        Column("class", "d"),
        Column("samples", ".0f", "of the class in the test set"),
        Column("recall (%)", ".1f", "accuracy on its samples: mean and 95 % interval over replicates"),
        Column("precision (%)", ".1f", "share of right ones among samples called so"),
        Column("F1 (%)", ".1f", "harmonic mean of the two means"),
    ]
    caption = (
        "At the last evaluation of each run; a run that failed counts at chance. Precision needs "
        "observe.extra=[class_report]; a class that is never named has a precision of 0."
    )
    chosen = sorted(drawn)[:SHOWN]
    n = max(len(runs) for runs in by_cell.values())
    figure = FigureBlock(
        "classes",
        _bars({labels[cell]: drawn[cell] for cell in chosen}, classes),
        f"Recall of each class, mean and 95 % interval over replicates; n = {n}.",
        "Accuracy on the test samples of each class",
    )
    return [Section("Classes", [TableBlock(columns, rows, caption), figure])]


def time_section(results: ResultsLike, labels: Mapping[int, str], by_cell: Mapping[int, Sequence[str]]) -> Section:
    """How long the runs took; runs that were trained together share their time."""
    rows = []
    for cell, runs in sorted(by_cell.items()):
        last = _last(results.frame, runs)
        wall, steps = last["wall_s"].drop_nulls().to_list(), (last["step"] + 1).to_list()
        if wall:
            per_step = [1e3 * w / s for w, s in zip(wall, steps, strict=True)]
            rows.append(
                [labels[cell], len(wall), float(np.median(steps)), float(np.median(wall)), float(np.median(per_step))]
            )
    columns = [
        Column("configuration"),
        Column("n", "d", "replicates that ended"),
        Column("updates", ".0f"),
        Column("training time (s)", ".2f", "of the whole block a run was in, evaluations included"),
        Column("per update (ms)", ".3f", "the same over the updates"),
    ]
    caption = "Medians over replicates, by the clock on this machine; runs trained side by side share their time."
    return Section("Time", [TableBlock(columns, rows, caption)])


def _last(frame: pl.DataFrame, runs: Sequence[str]) -> pl.DataFrame:
    own = last_attempts(frame).filter(pl.col("run").is_in(list(runs))).sort("run", "step")
    return own.group_by("run", maintain_order=True).last()


def _mean(last: pl.DataFrame, column: str, runs: Sequence[str], scores: Scores) -> SummaryItem:
    if column not in last.columns:
        return SummaryItem(None, 0, None, None, "")
    held = dict(last.select("run", column).iter_rows())
    values = [scores.chance if scores[run].failed else held.get(run) for run in runs]
    known = [float(v) for v in values if v is not None and np.isfinite(v)]
    return bounded(item(estimate(known))) if known else SummaryItem(None, 0, None, None, "")


def _scaled(entry: SummaryItem) -> SummaryItem | None:
    return None if entry.value is None else scaled(entry, 100.0)


def _f1(recall: SummaryItem, precision: SummaryItem) -> float | None:
    if recall.value is None or precision.value is None:
        return None
    total = recall.value + precision.value
    return 200.0 * recall.value * precision.value / total if total else 0.0


def _bars(recalls: Mapping[str, Sequence[SummaryItem]], classes: Sequence[int]) -> Figure:
    look = looks(list(recalls))
    width = 0.8 / len(recalls)
    with styled():
        picture = new_figure(DOUBLE, 2.4)
        ax = picture.subplots()
        for i, (label, found) in enumerate(recalls.items()):
            at = np.arange(len(classes)) + (i - (len(recalls) - 1) / 2) * width
            middle = [100 * (entry.value or 0.0) for entry in found]
            low = [
                m - 100 * (e.low if e.low is not None else e.value or 0.0) for m, e in zip(middle, found, strict=True)
            ]
            high = [
                100 * (e.high if e.high is not None else e.value or 0.0) - m for m, e in zip(middle, found, strict=True)
            ]
            ax.bar(
                at, middle, width, color=look[label].colour, label=label, yerr=[low, high], error_kw={"linewidth": 0.6}
            )
        ax.set_xticks(range(len(classes)), [str(label) for label in classes])
        ax.set_xlabel("class")
        ax.set_ylabel("recall (%)")
        panel_title(ax, 0, "accuracy on the samples of each class")
        handles, names = ax.get_legend_handles_labels()
        picture.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
    return picture
