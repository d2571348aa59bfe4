"""The report of the training study: learning curves, and where the runs end with intervals over replicates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ...analysis.failures import Scores, final_scores
from ...analysis.grids import FOLD, settings_of
from ...analysis.paired import estimate, wilson
from ...analysis.results import ResultsLike, cell_settings, class_count, condition_labels, last_attempts
from ...core.errors import StudyError
from ...report import Column, FigureBlock, Paragraph, Report, Section, SummaryItem, TableBlock, Verdict
from ...report.figures import DOUBLE, Look, looks, new_figure, panel_title, styled
from ...store.moments import load_moments
from ..common import bounded, command_text, failure_rule_text, is_brief, item, scaled, shown_provenance
from .classes import class_sections, time_section
from .spec import FOLD_METRIC, STUDY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {  # column -> what its axis says
    "train_loss": "loss of the batch (nats)",
    "test_loss": "test loss (nats)",
    "test_accuracy": "test accuracy",
}
LARGE = 8  # cells that one figure shows


@dataclass(frozen=True)
class Source:
    """What curves are drawn from: rows of all steps, or moments where the study kept those instead."""

    frame: pl.DataFrame
    moments: pl.DataFrame | None


def build(results: ResultsLike) -> Report:
    """The report of a training study, finished or not. Raises :class:`StudyError` while no run has ended."""
    labels = condition_labels(cell_settings(results.frame))
    runs = {str(run["id"]): run for run in results.runs if run["cell"] in labels}
    scores = final_scores(results, [[run] for run in runs], class_count(results.spec))
    ended = {run: score for run, score in scores.by_run.items() if score.state != "pending"}
    if not ended:
        raise StudyError(f"{results.path}: nothing to report yet, no run has ended; run the study again to go on")
    by_cell: dict[int, list[str]] = {}
    for run in ended:
        by_cell.setdefault(int(runs[run]["cell"]), []).append(run)
    moments = load_moments(results.path)
    summary = {
        f"training/{labels[cell]}/{name}": entry
        for cell, members in sorted(by_cell.items())
        for name, entry in cell_summary(scores, members).items()
    }
    pending = len(runs) - len(ended)
    return Report(
        title="Training runs",
        question=STUDY.question,
        verdicts=[*_choice(results), *(_verdict(labels[cell], summary) for cell in sorted(by_cell))][:LARGE],
        sections=[
            *_sections(Source(results.frame, moments), labels, by_cell, summary),
            *class_sections(results, labels, by_cell, scores),
            time_section(results, labels, by_cell),
            _method(summary, scores),
        ],
        summary=summary,
        failures=_failures(scores, runs, labels),
        provenance=shown_provenance(results.provenance),
        command=command_text(results, "training"),
        runs=len(ended),
        notes=[f"{pending} of {len(runs)} runs have not ended; they are left out."] if pending else [],
        pdf=not is_brief(results),
    )


def cell_summary(scores: Scores, runs: list[str]) -> dict[str, SummaryItem]:
    """Final test loss (nats), accuracy (0..1) and failure rate of one configuration over its replicates."""
    of = [scores[run] for run in runs]
    return {
        "test_loss": item(estimate([score.test_loss for score in of])),
        "accuracy": bounded(item(estimate([score.test_accuracy for score in of]))),
        "failure_rate": item(wilson(sum(score.failed for score in of), len(of))),
    }


def _choice(results: ResultsLike) -> list[Verdict]:
    """The setting that a comparison over folds chooses: the best mean of the validation loss, failures last."""
    if FOLD not in results.frame.columns or FOLD_METRIC not in results.frame.columns:
        return []
    best, *others = settings_of(results, FOLD_METRIC)
    name = ", ".join(f"{key} = {value}" for key, value in best.settings.items()) or "the only setting"
    text = f"chosen over folds: {name}, validation loss {best.value.value:.4f} nats"
    second = f"; the next one is {others[0].suboptimality:.4f} nats worse" if others else ""
    return [
        Verdict(text, f"mean of n = {best.value.n} runs, {best.failed} failed{second}; folds share training samples")
    ]


def _verdict(label: str, summary: Mapping[str, SummaryItem]) -> Verdict:
    accuracy, loss = summary[f"training/{label}/accuracy"], summary[f"training/{label}/test_loss"]
    shown = f"{label}: test accuracy {100 * (accuracy.value or 0):.1f} %, test loss {loss.value:.3f} nats"
    if accuracy.low is None or accuracy.high is None:
        return Verdict(shown, f"n = {accuracy.n}; {accuracy.method}")
    span = f"accuracy [{100 * accuracy.low:.1f} %, {100 * accuracy.high:.1f} %], loss [{loss.low:.3f}, {loss.high:.3f}]"
    return Verdict(shown, f"{span}; n = {accuracy.n}; {accuracy.method}")


def _table(
    labels: Mapping[int, str], by_cell: Mapping[int, list[str]], summary: Mapping[str, SummaryItem]
) -> TableBlock:
    columns = [
        Column("configuration"),
        Column("n", "d", "replicates that ended"),
        Column("test accuracy (%)", ".2f", "mean and 95 % interval over replicates, failures at chance"),
        Column("test loss (nats)", ".4f", "mean and 95 % interval over replicates"),
        Column("failure rate (%)", ".0f", "95 % Wilson interval"),
    ]
    rows: list[list[Any]] = []
    for cell, runs in sorted(by_cell.items()):
        of = {name: summary[f"training/{labels[cell]}/{name}"] for name in ("accuracy", "test_loss", "failure_rate")}
        rows.append(
            [labels[cell], len(runs), scaled(of["accuracy"], 100.0), of["test_loss"], scaled(of["failure_rate"], 100.0)]
        )
    return TableBlock(columns, rows, "At the last evaluation of each run.")


def curves(source: Source, cell: int, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(step, middle, low, high) of one column of a cell: median and range over its runs, where a value that is not
    finite counts as the worst; or mean and two standard deviations, where the study kept moments only."""
    if source.moments is not None:
        part = source.moments.filter(pl.col("cell") == cell, pl.col("observable") == column, pl.col("nonfinite") == 0)
        step, mean, variance = (part.sort("step")[name].to_numpy() for name in ("step", "mean", "variance"))
        spread = 2 * np.sqrt(variance)
        return step, mean, mean - spread, mean + spread
    worst = -np.inf if "accuracy" in column else np.inf
    value = pl.when(pl.col(column).is_finite()).then(pl.col(column)).otherwise(worst)
    part = (
        last_attempts(source.frame)
        .filter(pl.col("cell") == cell, pl.col(column).is_not_null())
        .group_by("step")
        .agg(value.median().alias("middle"), value.min().alias("low"), value.max().alias("high"))
        .sort("step")
    )
    step, *rest = (part[name].to_numpy() for name in ("step", "middle", "low", "high"))
    return step, *(np.where(np.isfinite(v), v, np.nan) for v in rest)  # type: ignore[return-value]


def figure(source: Source, labels: Mapping[int, str], cells: list[int]) -> Figure:
    """Learning curves: a panel per measure, a line with its band per configuration."""
    look = looks([labels[cell] for cell in cells])
    with styled():
        picture = new_figure(DOUBLE, 2.4)
        axes = picture.subplots(1, len(PANELS))
        for i, (ax, (column, says)) in enumerate(zip(axes, PANELS.items(), strict=True)):
            for cell in cells:
                _curve(ax, curves(source, cell, column), look[labels[cell]], labels[cell])
            ax.set_xlabel("step")
            ax.set_ylabel(says)
            panel_title(ax, i, column.replace("_", " "))
        handles, names = axes[0].get_legend_handles_labels()
        picture.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
    return picture


def _curve(ax: Axes, curve: tuple[np.ndarray, ...], look: Look, label: str) -> None:
    step, middle, low, high = curve
    ax.plot(step, middle, color=look.colour, linestyle=look.line, label=label)
    ax.fill_between(step, low, high, color=look.colour, alpha=0.15, linewidth=0)


def _failures(scores: Scores, runs: Mapping[str, Mapping[str, Any]], labels: Mapping[int, str]) -> TableBlock:
    rows = [
        [labels[int(runs[s.run]["cell"])], runs[s.run]["replicate"], s.failed_step, s.reason, s.run]
        for s in scores.failures()
    ]
    return TableBlock([Column(n) for n in ("configuration", "replicate", "failed at step", "reason", "run")], rows)


def _sections(
    source: Source,
    labels: Mapping[int, str],
    by_cell: Mapping[int, list[str]],
    summary: Mapping[str, SummaryItem],
) -> list[Section]:
    shown = sorted(by_cell)[:LARGE]
    kept = "mean and two standard deviations over replicates" if source.moments is not None else ""
    band = kept or "median and range over replicates, a value that is not finite counts as the worst"
    rest = f"; the first {LARGE} of {len(by_cell)} configurations" if len(by_cell) > LARGE else ""
    n = max(len(runs) for runs in by_cell.values())
    drawing = FigureBlock(
        "curves",
        figure(source, labels, shown),
        f"Learning curves: {band}; n = {n}{rest}.",
        "Loss and accuracy over steps",
    )
    return [
        Section("Learning curves", [drawing]),
        Section("Final scores", [_table(labels, by_cell, summary)]),
    ]


def _method(summary: Mapping[str, SummaryItem], scores: Scores) -> Section:
    method = next(iter(summary.values())).method
    seeds = "A replicate is one seed: its own initial weights and batches, the same for every configuration."
    return Section(
        "How the numbers are made",
        [Paragraph(f"{seeds} Intervals: {method}."), Paragraph(failure_rule_text(scores))],
    )
