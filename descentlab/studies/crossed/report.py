"""The report of the crossed study: do faults, stale gradients and compression add up, or interact?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...analysis.contrasts import HIGHER, IDENTICAL, LOWER, MIXED, UNTESTED, ContrastResult, analyse
from ...analysis.paired import estimate, wilson
from ...analysis.results import ResultsLike, class_count, last_attempts
from ...core.errors import StudyError
from ...report import Column, FigureBlock, Paragraph, Report, Section, SummaryItem, TableBlock, Verdict
from ...report.figures import DOUBLE, GREY, Dot, draw_intervals, looks, new_figure, panel_title, signed_scale, styled
from ..common import (
    bounded,
    command_text,
    contrast_item,
    contrast_table,
    failure_rule_text,
    is_brief,
    item,
    plain_item,
    scaled,
    shown_provenance,
    statistics_text,
    verdict_detail,
)
from .factors import BASE, WORDS, Factorial, Interaction, Key, factorial, fault_excess, interactions
from .spec import STUDY

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MEASURES = {  # columns of the table of cells, and the scale each is shown at
    "accuracy": 100.0,
    "failure_rate": 100.0,
    "test_loss": 1.0,
    "excess_test_loss": 1.0,
    "excess_test_accuracy": 100.0,
    "bytes_sent": 1.0,
    "virtual_s": 1.0,
}


def _costs(results: ResultsLike, data: Factorial) -> dict[Key, dict[str, float]]:
    """Mean bytes and virtual seconds of the runs of each cell that reached the end."""
    last = last_attempts(results.frame).group_by("run", maintain_order=True).last()
    ends = {row["run"]: row for row in last.select("run", "bytes_sent", "virtual_s").to_dicts()}
    out: dict[Key, dict[str, float]] = {}
    for key in data.keys:
        done = [ends[s.run] for s in data.of(key, data.replicates(key)) if not s.failed and s.run in ends]
        if done:
            out[key] = {name: float(np.mean([row[name] for row in done])) for name in ("bytes_sent", "virtual_s")}
    return out


def cell_summary(results: ResultsLike, data: Factorial) -> dict[str, SummaryItem]:
    """summary.json entries ``crossed/<optimizer+fault+timeline+compressor>/<measure>``."""
    out: dict[str, SummaryItem] = {}
    costs = _costs(results, data)
    for key in data.keys:
        replicates = data.replicates(key)
        if not replicates:
            continue
        name = f"crossed/{'+'.join(key)}"
        out[f"{name}/accuracy"] = bounded(item(estimate(data.values(key, replicates, "test_accuracy"))))
        out[f"{name}/test_loss"] = item(estimate(data.values(key, replicates, "test_loss")))
        out[f"{name}/failure_rate"] = item(wilson(sum(s.failed for s in data.of(key, replicates)), len(replicates)))
        loss, accuracy = fault_excess(data, key)
        if loss:
            out[f"{name}/excess_test_loss"] = item(estimate(loss))
            out[f"{name}/excess_test_accuracy"] = item(estimate(accuracy))
        for cost, value in costs.get(key, {}).items():
            out[f"{name}/{cost}"] = plain_item(value, len(replicates), "mean over runs that reached the end")
    return out


def _cell(summary: Mapping[str, SummaryItem], name: str, scale: float) -> SummaryItem | None:
    return scaled(summary[name], scale) if name in summary else None


def cell_table(data: Factorial, summary: dict[str, SummaryItem]) -> TableBlock:
    """One row per cell."""
    columns = [
        Column("optimizer"),
        Column("fault"),
        Column("timeline"),
        Column("compressor"),
        Column("n", "d", "replicates"),
        Column("test accuracy (%)", ".1f", "mean and 95 % interval, failures at chance"),
        Column("failure rate (%)", ".0f", "95 % Wilson interval"),
        Column("test loss (nats)", ".4f"),
        Column("excess test loss (nats)", "+.4f", "over the same cell without the fault"),
        Column("excess accuracy (points)", "+.2f", "over the same cell without the fault"),
        Column("bytes sent", ",.0f", "per run, both directions, mean of runs that reached the end"),
        Column("virtual time (s)", ",.4g", "per run, mean of runs that reached the end"),
    ]
    rows: list[list[Any]] = []
    for key in data.keys:
        name = f"crossed/{'+'.join(key)}"
        n = len(data.replicates(key))
        rows.append([*key, n, *(_cell(summary, f"{name}/{measure}", scale) for measure, scale in MEASURES.items())])
    methods = [entry.method for name, entry in summary.items() if name.endswith("/test_loss")]
    return TableBlock(columns, rows, f"Mean over replicates with {methods[0] if methods else 'no interval'}.")


def figure(
    data: Factorial, summary: dict[str, SummaryItem], found: list[Interaction], tested: list[ContrastResult]
) -> Figure:
    """Left: test loss of every cell; right: the planned interactions; dots with intervals, one colour per optimizer."""
    from matplotlib.ticker import MaxNLocator

    look = looks(data.conditions)
    conditions = list(dict.fromkeys(key[1:] for key in data.keys))
    cells = [
        (key, summary.get(f"crossed/{'+'.join(key)}/test_loss"))
        for c in conditions
        for key in data.keys
        if key[1:] == c
    ]
    left = [Dot(_shown(k), e.value or 0.0, e.low, e.high, k[0]) for k, e in cells if e is not None]
    right = [
        Dot(
            f"{i.condition}: {WORDS[i.first]} \u00d7\n{WORDS[i.second]}"
            + (f" ({i.levels[0]}, {i.levels[1]})" if "(" in i.name else ""),
            r.estimate.value,
            r.estimate.low,
            r.estimate.high,
            i.condition,
        )
        for i, r in zip(found, tested, strict=True)
    ]
    with styled():
        picture = new_figure(DOUBLE, max(2.6, 0.85 + 0.2 * max(len(left), 1.5 * len(right))))
        axes = picture.subplots(1, 2)
        draw_intervals(axes[0], left, look)
        labels = [dot.label if n == 0 or left[n - 1].label != dot.label else "" for n, dot in enumerate(left)]
        axes[0].set_yticks(range(len(left)), labels)
        axes[0].set_xlabel("final test loss (nats)")
        axes[0].xaxis.set_major_locator(MaxNLocator(5))
        panel_title(axes[0], 0, "every cell")
        draw_intervals(axes[1], right, look)
        axes[1].set_yticks(range(len(right)), [dot.label for dot in right])
        axes[1].axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        ends = [v for dot in right for v in (dot.value, dot.low, dot.high) if v is not None]
        if not signed_scale(axes[1], ends, "x"):
            axes[1].xaxis.set_major_locator(MaxNLocator(5))
        axes[1].set_xlabel("interaction (nats), 0 = additive")
        panel_title(axes[1], 1, "differences of differences")
        handles, names = axes[0].get_legend_handles_labels()
        if handles:
            picture.legend(handles, names, loc="outside lower center", ncols=len(names))
    return picture


def _shown(key: Key) -> str:
    """A cell by what is not ideal in it."""
    return " + ".join(name for name, base in zip(key[1:], BASE.values(), strict=True) if name != base) or "ideal"


def _verdict(interaction: Interaction, result: ContrastResult) -> Verdict:
    one, two = WORDS[interaction.first], WORDS[interaction.second]
    more = f"together cost {abs(result.estimate.value):.3g} nats"
    text = {
        HIGHER: f"{one} and {two} {more} more than the sum of their separate effects",
        LOWER: f"{one} and {two} {more} less than the sum of their separate effects",
        MIXED: f"{one} and {two}: mixed, most replicates and the mean point in opposite directions",
        IDENTICAL: f"{one} and {two} add up exactly in every replicate",
        UNTESTED: f"{one} and {two}: not tested",
    }.get(result.verdict, f"{one} and {two}: interaction within noise")
    return Verdict(f"{interaction.condition}: {text}", verdict_detail(result))


def _nothing_crossed(data: Factorial) -> Verdict:
    """Said where the settings vary fewer than two conditions together, so that no interaction exists."""
    columns = zip(*(key[1:] for key in data.keys), strict=True)
    varied = [word for word, levels in zip(WORDS.values(), columns, strict=True) if len(set(levels)) > 1]
    what = f"only {' and '.join(varied)} varied" if varied else "no condition was varied"
    return Verdict(f"no interaction to test: {what}", "vary at least two of fault, timeline and compressor")


def failure_table(data: Factorial) -> TableBlock:
    """Every failed run with its cell."""
    where = {run: (key, replicate) for (key, replicate), run in data.runs.items()}
    rows = [[*where[s.run][0], where[s.run][1], s.failed_step, s.reason, s.run] for s in data.scores.failures()]
    names = ("optimizer", "fault", "timeline", "compressor", "replicate", "failed at step", "reason", "run")
    return TableBlock([Column(name) for name in names], rows)


def _hit_text(results: ResultsLike) -> str:
    steps = (
        results.frame["hit_step"].drop_nulls().unique().sort().to_list() if "hit_step" in results.frame.columns else []
    )
    return f" The fault hits at step {steps[0]} to {steps[-1]}, depending on the replicate." if steps else ""


def _sections(
    results: ResultsLike,
    data: Factorial,
    summary: dict[str, SummaryItem],
    found: list[Interaction],
    tested: list[ContrastResult],
) -> list[Section]:
    n = max((result.estimate.n for result in tested), default=max(len(data.replicates(key)) for key in data.keys))
    method = tested[0].estimate.method if tested else "no planned contrast can be formed"
    picture = FigureBlock(
        "crossed",
        figure(data, summary, found, tested),
        "(a) Mean final test loss of every cell, named by what is not ideal in it; (b) planned interactions; n = "
        f"{n} replicate{'s' * (n != 1)}, {method}{', not corrected for several contrasts' if tested else ''}.",
        "Test loss of every cell and interactions between conditions, with intervals",
    )
    return [
        Section("Cells and interactions", [picture, cell_table(data, summary)]),
        Section(
            "How the numbers are made",
            [
                Paragraph(
                    "Every cell shares seeds, initial weights and batches with the others of its replicate; the "
                    "cell without a fault is the twin of the same cell with it. Test loss and accuracy are read at "
                    "the last "
                    "step at which a run and its twin were both evaluated." + _hit_text(results)
                ),
                Paragraph(failure_rule_text(data.scores)),
                Paragraph(statistics_text("one seed through every cell")),
            ],
        ),
    ]


def build(results: ResultsLike, classes: int | None = None) -> Report:
    """The report of a crossed study, finished or not; ``classes`` defaults to what the settings say, else 10.

    Raises :class:`StudyError` while no run has ended.
    """
    data = factorial(results, classes or class_count(results.spec))
    ended = [score for score in data.scores.by_run.values() if score.state != "pending"]
    if not ended:
        raise StudyError(f"{results.path}: nothing to report yet, no run has ended; run the study again to go on")
    found = interactions(data)
    tested = analyse([interaction.contrast() for interaction in found])
    beside = [estimate(interaction.accuracy) for interaction in found]
    summary = cell_summary(results, data)
    for interaction, result in zip(found, tested, strict=True):
        summary[f"crossed/{interaction.condition}/{interaction.name}"] = contrast_item(result)
    caption = (
        "Difference of differences of final test loss, paired by replicate and averaged over the levels of the "
        "third factor: above 0, the two conditions together cost more than the sum of their separate effects. "
        "Planned: every pair of factors for every optimizer."
    )
    pending = len(data.scores.by_run) - len(ended)
    notes = (
        [f"{pending} of {len(data.scores.by_run)} runs have not ended; what needs them is left out."] if pending else []
    )
    table = (
        contrast_table(tested, "interaction (nats)", beside, "interaction in accuracy (points)", caption)
        if tested
        else None
    )
    return Report(
        title="Faults, staleness and compression combined",
        question=STUDY.question,
        verdicts=[_verdict(i, r) for i, r in zip(found, tested, strict=True)] or [_nothing_crossed(data)],
        sections=_sections(results, data, summary, found, tested),
        summary=summary,
        failures=failure_table(data),
        provenance=shown_provenance(results.provenance),
        command=command_text(results, "crossed"),
        contrasts=table,
        runs=len(ended),
        notes=notes,
        pdf=not is_brief(results),
    )
