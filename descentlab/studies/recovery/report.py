"""The report of the recovery study: what failed, the planned contrasts, then everything behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl

from ...analysis.contrasts import HIGHER, IDENTICAL, LOWER, MIXED, UNTESTED, Contrast, ContrastResult, analyse
from ...analysis.outcomes import LABELS
from ...analysis.paired import Estimate, estimate
from ...analysis.recovery import STREAK, TOLERANCE_NATS, Recovery, analyse_recovery, mean_of
from ...analysis.results import ResultsLike, class_count, planned_pairs
from ...core.errors import StudyError
from ...report import FigureBlock, Paragraph, Report, Section, SummaryItem, Verdict
from ...report.figures import Dot, interval_plot
from ...report.model import Block
from ..common import (
    command_text,
    contrast_item,
    contrast_table,
    failure_rule_text,
    interval_text,
    is_brief,
    percent_range,
    plain_item,
    shown_provenance,
    statistics_text,
    verdict_detail,
)
from . import breakdowns, figures, outcome_figures, tables
from .arms import arm_report
from .corruption import corruption_section
from .explanation import explanation_section
from .overview import head_to_head, overview, paired_differences
from .protocols import protocol_notes, tune_notes
from .spec import STUDY

MEASURE = "excess test loss over the twin"


def contrasts_of(recovery: Recovery) -> tuple[list[tuple[str, str]], list[ContrastResult], list[Estimate]]:
    """All pairs of optimizers: names, the tested differences in excess test loss, and those in accuracy beside them."""
    pairs, planned, beside = [], [], []
    for first, second in planned_pairs(recovery.cells):
        a, b = recovery.labels[first], recovery.labels[second]
        loss = paired_differences(recovery, a, b, "excess_test_loss")
        if not len(loss):
            continue
        pairs.append((a, b))
        planned.append(Contrast(f"{a} \u2212 {b}", loss))
        beside.append(estimate(paired_differences(recovery, a, b, "excess_test_accuracy")))
    return pairs, analyse(planned), beside


def _contrast_verdict(pair: tuple[str, str], result: ContrastResult) -> Verdict:
    a, b = pair
    often = a if result.test.direction < 0 else b
    size = f"{abs(result.estimate.value):.3g} nats"
    text = {
        LOWER: f"{a} against {b}: {a} ends with {size} less excess test loss",
        HIGHER: f"{a} against {b}: {b} ends with {size} less excess test loss",
        MIXED: f"{a} against {b}: mixed, {often} is better in most cases, the other in the mean",
        IDENTICAL: f"{a} against {b}: identical in every case",
        UNTESTED: f"{a} against {b}: not tested",
    }.get(result.verdict, f"{a} against {b}: within noise")
    return Verdict(text, verdict_detail(result))


def _condition_verdict(recovery: Recovery, name: str) -> Verdict:
    rows = tables.own(recovery, name)
    if rows.is_empty():
        return Verdict(f"{name}: no finished case")
    found = mean_of(rows, "excess_test_loss")
    failed = int(rows["failed"].sum())
    inside = found.low is not None and found.high is not None and found.low <= 0 <= found.high
    noise = "; the interval includes 0: within noise" if inside and found.sd else ""
    rate = percent_range(tables.rate_of(rows, pl.col("failed")))
    counts = rows["outcome"].to_list()
    kinds = ", ".join(f"{label} {counts.count(label)}" for label in LABELS if label in counts)
    detail = f"{found.method}, n = {found.n} cases; failed {failed} of {len(rows)}, {rate}; outcomes: {kinds}{noise}"
    return Verdict(f"{name}: {MEASURE} {interval_text(found, 'nats')}", detail)


def _summary(
    recovery: Recovery, pairs: list[tuple[str, str]], results: list[ContrastResult], beside: list[Estimate]
) -> dict[str, SummaryItem]:
    summary = tables.condition_summary(recovery)
    wins = head_to_head(recovery)
    for (a, b), result, accuracy in zip(pairs, results, beside, strict=True):
        key = f"recovery/{a}-vs-{b}"
        summary[f"{key}/excess_test_loss"] = contrast_item(result)
        method = f"{accuracy.method}; not tested"
        summary[f"{key}/excess_test_accuracy"] = SummaryItem(
            accuracy.value, accuracy.n, accuracy.low, accuracy.high, method
        )
        won, tied, lost = wins[a, b]
        share = (won + tied / 2) / (won + tied + lost)
        summary[f"{key}/win_rate"] = plain_item(
            share, won + tied + lost, f"{won} wins, {tied} ties (half), {lost} losses"
        )
    return summary


def typical_cases(recovery: Recovery) -> list[tuple[str, str, int]]:
    """The case of median damage and, of five or more, the most damaging one: (kind, fault, replicate).

    Damage is the mean excess test loss over optimizers.
    """
    means = (
        recovery.measures.group_by("fault", "replicate")
        .agg(pl.col("excess_test_loss").mean())
        .sort("excess_test_loss", "replicate", "fault")
    )
    order = [(str(fault), int(replicate)) for fault, replicate in means.select("fault", "replicate").iter_rows()]
    median = [("median", *order[(len(order) - 1) // 2])]
    return median + ([("most damaging", *order[-1])] if len(order) >= 5 else [])


def _comparison_blocks(recovery: Recovery) -> list[FigureBlock]:
    blocks = []
    for kind, fault, case in typical_cases(recovery):
        one = (pl.col("fault") == fault) & (pl.col("replicate") == case)
        about = recovery.measures.filter(one).row(0, named=True)
        value = f", value {about['value']:.3g}" if math.isfinite(about["value"]) else ""
        caption = (
            f"The {kind} case ({fault} case {case}, by mean excess test loss over optimizers): layer "
            f"{about['layer']}{value}, hit at step {about['hit_step']}. n = 1 per optimizer, so no interval. (a, b) "
            f"values per batch lightly, centred {figures.SMOOTH}-step moving average on top, never across the hit; "
            "(c) change against the twin in percentage points above the bars; (d) excess test loss, a failed run at "
            "its charge."
        )
        name = f"comparison_{kind.replace(' ', '_')}"
        alt = f"Training accuracy and loss by step, final test accuracy and excess test loss in case {case}"
        blocks.append(FigureBlock(name, figures.comparison(recovery, fault, case), caption, alt))
    return blocks


def _zoom_block(recovery: Recovery, n: int) -> FigureBlock:
    caption = (
        f"From 10 steps before the hit, cases aligned at the hit (step 0), n = {n} cases where that step exists, "
        "drawn where at least half do. Top: median and quartiles of training loss over cases; bottom: mean "
        "training accuracy, band 95 % t interval over cases cut at 0 and 1. A failed run counts at its charge from "
        "its failure on."
    )
    alt = "Training loss and accuracy around the hit, with the fault and without"
    return FigureBlock("recovery_zoom", figures.zoom(recovery), caption, alt)


def _outcome_section(recovery: Recovery, brief: bool) -> Section:
    """Rates of the outcomes, as bars and with intervals, and what the labels mean."""
    several = len(recovery.faults) > 1
    caption = (
        "Outcomes of all faulted runs, counts in the bars, n runs beside each name; the intervals are in the table. "
        "No run is left out."
    )
    alt = "Stacked bars of outcome shares"
    blocks: list[Block] = [breakdowns.outcome_table(recovery)]
    if not brief:
        n = len(recovery.measures)
        caption = f"{caption} n = {n} in all."
        blocks.append(FigureBlock("outcomes", outcome_figures.outcomes(recovery), caption, f"{alt} per optimizer"))
        if several:
            figure = outcome_figures.outcomes_by_fault(recovery)
            blocks.append(FigureBlock("outcomes_by_fault", figure, f"As above by fault type, n = {n} in all.", alt))
    return Section("Outcomes", [*blocks, breakdowns.definitions(recovery.thresholds)])


def _overview_block(recovery: Recovery, n: int) -> FigureBlock:
    caption = (
        f"All cases, n = {n} per optimizer. (a) excess test loss, box: quartiles, whiskers: extremes, marks: cases, "
        "cross: failed run; (b) mean excess training accuracy on the same batches, band: 95 % t interval over "
        "cases; (c) share of cases won on excess test loss, ties half; (d) excess test accuracy; (e) excess "
        "training loss of the faulty forward pass against the final excess test loss; (f) mean excess test loss by "
        "epoch of the hit, colour on an asinh scale."
    )
    return FigureBlock("summary", overview(recovery), caption, "Six panels summarising all cases and optimizers")


def _interval_block(recovery: Recovery, pairs: list[tuple[str, str]], results: list[ContrastResult]) -> FigureBlock:
    dots = []
    for name in recovery.order:
        rows = tables.own(recovery, name)
        if len(rows):
            e = mean_of(rows, "excess_test_loss")
            dots.append(Dot(name, e.value, e.low, e.high, "optimizer \u2212 its twin"))
    for (a, b), r in zip(pairs, results, strict=True):
        dots.append(Dot(f"{a} \u2212 {b}", r.estimate.value, r.estimate.low, r.estimate.high, "planned contrast"))
    n = max((r.estimate.n for r in results), default=len(recovery.measures))
    method = results[0].estimate.method if results else "95 % interval"
    caption = (
        f"Mean excess test loss over the twin and its planned differences, n = {n} cases, {method}, not corrected "
        "for several contrasts."
    )
    return FigureBlock(
        "excess_test_loss",
        interval_plot(dots, "excess test loss (nats)"),
        caption,
        "Means with intervals per optimizer and contrast",
    )


def _sections(
    recovery: Recovery, results: ResultsLike, summary: dict[str, SummaryItem], intervals: FigureBlock
) -> list[Section]:
    n = recovery.measures["replicate"].n_unique()
    brief = is_brief(results)
    return [
        Section("Results per optimizer", [tables.condition_table(recovery, summary), intervals]),
        _outcome_section(recovery, brief),
        *([] if brief else [Section("Summary of all cases", [_overview_block(recovery, n)])]),
        Section("Around the hit", [_zoom_block(recovery, n)]),
        explanation_section(recovery, brief),
        *corruption_section(recovery, results, brief),
        *([] if brief else [Section("Single cases in full", _comparison_blocks(recovery))]),
        Section("Head to head", [tables.head_table(recovery)]),
        *breakdowns.breakdown_sections(recovery),
        Section("Cases", [tables.case_table(recovery, results)]),
        Section("Every case of every optimizer", [tables.pair_table(recovery)]),
        Section(
            "How the numbers are made",
            [
                Paragraph(
                    "Every faulted run has a twin: same seed, batches and optimizer, no fault, identical to the "
                    "bit before the hit. The primary measure is test loss minus the twin's, in nats, at the last "
                    "step at which both were evaluated."
                ),
                Paragraph(failure_rule_text(recovery.scores)),
                Paragraph(statistics_text("a case: one planned fault met by every optimizer")),
                Paragraph(
                    f"Steps to recover: first step after the hit that starts {STREAK} consecutive batches on which "
                    f"training loss is within {TOLERANCE_NATS} nats of the twin's; a run that never does is "
                    "censored, not dropped."
                ),
            ],
        ),
    ]


@dataclass(frozen=True)
class Answers:
    """Every number of the report, before anything is drawn; ``tested`` and ``beside`` belong to ``pairs`` in order."""

    recovery: Recovery
    pairs: list[tuple[str, str]]
    tested: list[ContrastResult]
    beside: list[Estimate]
    summary: dict[str, SummaryItem]


def answer(results: ResultsLike, classes: int | None = None) -> Answers:
    """Score, compare and summarise a recovery study; see :func:`build`."""
    recovery = analyse_recovery(results, classes or class_count(results.spec))
    if recovery.measures.is_empty():
        problem = "nothing to report yet, no faulted run and its twin have ended; run the study again to go on"
        raise StudyError(f"{results.path}: {problem}")
    pairs, tested, beside = contrasts_of(recovery)
    return Answers(recovery, pairs, tested, beside, _summary(recovery, pairs, tested, beside))


def build(results: ResultsLike, classes: int | None = None) -> Report:
    """The report of a recovery study, finished or not; ``classes`` defaults to what the settings say, else 10.

    Raises :class:`StudyError` while no faulted run and its twin have both ended.
    """
    made = answer(results, classes)
    recovery, pairs, tested, beside, summary = made.recovery, made.pairs, made.tested, made.beside, made.summary
    of_arms, arm_numbers = arm_report(recovery, results)
    summary |= arm_numbers
    pending = len(recovery.scores.pending())
    notes = (
        [
            f"{pending} of {len(recovery.scores.by_run)} runs have not ended; they and their partners are in no "
            "number here."
        ]
        if pending
        else []
    )
    if is_brief(results):
        notes.append("size=quick draws two of the figures, as PNG only; run the default size for all of them.")
    notes += [*tables.not_applicable(results.hits), *protocol_notes(results), *tune_notes(results)]
    caption = (
        f"Difference in {MEASURE} (first minus second; negative: the first recovers better), paired by case. All "
        "pairs of optimizers were planned; nothing else is tested."
    )
    verdicts = [_condition_verdict(recovery, name) for name in recovery.order]
    verdicts += [_contrast_verdict(pair, result) for pair, result in zip(pairs, tested, strict=True)]
    table = (
        contrast_table(tested, "difference (nats)", beside, "difference in accuracy (points)", caption)
        if tested
        else None
    )
    return Report(
        title="Recovery from a hardware fault",
        question=STUDY.question,
        verdicts=verdicts,
        sections=[*of_arms, *_sections(recovery, results, summary, _interval_block(recovery, pairs, tested))],
        summary=summary,
        failures=tables.failure_table(recovery, results),
        provenance=shown_provenance(results.provenance),
        command=command_text(results, "recovery"),
        contrasts=table,
        runs=len(recovery.scores.by_run) - pending,
        notes=notes,
        pdf=not is_brief(results),
    )
