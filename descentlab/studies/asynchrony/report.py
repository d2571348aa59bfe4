"""The report of the asynchrony study: three questions, planned contrasts, verdicts; curves, staleness, clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from ...analysis.contrasts import HIGHER, IDENTICAL, LOWER, MIXED, UNTESTED, ContrastResult, analyse
from ...analysis.paired import estimate, wilson
from ...analysis.results import ResultsLike, last_attempts
from ...core.errors import StudyError
from ...report import Column, Paragraph, Report, Section, SummaryItem, TableBlock, Verdict
from ..common import (
    bounded,
    command_text,
    contrast_item,
    failure_rule_text,
    is_brief,
    item,
    plain_item,
    scaled,
    shown_provenance,
    statistics_text,
    verdict_detail,
)
from .outcomes import QUESTIONS, Cell, Outcomes, Pair, outcomes, pairs
from .pictures import sections
from .spec import STUDY

WORDS = {
    LOWER: "lower by {size}",
    HIGHER: "higher by {size}",
    MIXED: "mixed: significant by ranks, while the mean points the other way",
    IDENTICAL: "identical in every replicate",
    UNTESTED: "not tested",
}


CLASS = "test_accuracy_class"  # the columns of the observable per_class_accuracy
FACTOR_NAMES = {
    "timeline": "Not waiting",
    "delay": "Other delays",
    "staleness_rule": "Staleness rules",
    "partition": "Partitions",
    "partition x timeline": "Partitions, and how much more without waiting",
    "momentum": "Momentum",
    "momentum x timeline": "Momentum, and how much more without waiting",
}


def build(results: ResultsLike) -> Report:
    """The report of an asynchrony study, finished or not. Raises :class:`StudyError` while no run has ended."""
    found = outcomes(results)
    ended = [score for score in found.scores.by_run.values() if score.state != "pending"]
    if not ended:
        raise StudyError(f"{results.path}: nothing to report yet, no run has ended; run the study again to go on")
    planned = sorted(pairs(found), key=lambda pair: list(QUESTIONS).index(pair.question))
    tested = [result for own in families(planned).values() for result in analyse([pair.contrast() for pair in own])]
    summary = cell_summary(found, results)
    for pair, result in zip(planned, tested, strict=True):
        summary[f"asynchrony/contrast/{pair.question}/{pair.name}"] = contrast_item(result)
    pending = len(found.scores.by_run) - len(ended)
    return Report(
        title="Asynchronous training",
        question=" ".join(QUESTIONS.values()),
        verdicts=_verdicts(planned, tested),
        contrasts=_contrast_table(planned, tested) if planned else None,
        sections=[*sections(results, found, planned, tested, summary), _table_section(found, summary), _method(found)],
        summary=summary,
        failures=_failures(found),
        provenance=shown_provenance(results.provenance),
        command=command_text(results, "asynchrony"),
        runs=len(ended),
        notes=[f"{pending} of {len(found.scores.by_run)} runs have not ended; they are left out."] if pending else [],
        pdf=not is_brief(results),
    )


def families(planned: Sequence[Pair]) -> dict[str, list[Pair]]:
    """The planned contrasts of each question, in order: each is corrected by itself."""
    return {question: own for question in QUESTIONS if (own := [p for p in planned if p.question == question])}


def cell_summary(found: Outcomes, results: ResultsLike) -> dict[str, SummaryItem]:
    """Final scores, staleness, clocks and ledger of every cell."""
    frame = last_attempts(results.frame)
    staleness = _means(frame, "staleness")
    weight_gap = _means(frame, "weight_gap")
    summary: dict[str, SummaryItem] = {}
    for cell in found.cells:
        replicates = found.ended(cell)
        if not replicates:
            continue
        at = f"asynchrony/{cell.name}"
        runs = [cell.runs[r] for r in replicates]
        summary[f"{at}/accuracy"] = bounded(item(estimate(found.accuracy(cell, replicates))))
        summary[f"{at}/test_loss"] = item(estimate(found.loss(cell, replicates)))
        summary[f"{at}/failure_rate"] = item(wilson(found.failed(cell, replicates), len(replicates)))
        if any(run in found.gaps for run in runs):
            summary[f"{at}/train_test_gap"] = item(estimate(found.gap(cell, replicates)))
        for name, of in (("staleness", staleness), ("weight_gap", weight_gap)):
            values = [of[run] for run in runs if run in of and np.isfinite(of[run])]
            if values:
                summary[f"{at}/{name}"] = item(estimate(values))
        last = [found.ends[run] for run in runs if run in found.ends]
        for name in ("virtual_s", "wall_s", "samples", "bytes_sent"):
            mean = float(np.mean([row[name] for row in last])) if last and name in last[0] else None
            summary[f"{at}/{name}"] = plain_item(mean, len(last), "mean at the last evaluation")
        summary |= {f"{at}/{name}": made for name, made in _more(found, runs).items()}
    return summary


def _more(found: Outcomes, runs: Sequence[str]) -> dict[str, SummaryItem]:
    """Accuracy on the training set, and on the test samples of each class, where they were measured; failures at
    chance."""
    ends = {run: found.ends.get(run, {}) for run in runs}
    keys = {"train_accuracy": "train_set_accuracy"}
    keys |= {f"class_{key.rsplit('_', 1)[1]}": key for row in ends.values() for key in row if key.startswith(CLASS)}
    out = {}
    for name, key in keys.items():
        if all(row.get(key) is None for row in ends.values()):
            continue
        values = [found.scores.chance if found.scores[run].failed else row.get(key) for run, row in ends.items()]
        known = [float(value) for value in values if value is not None and np.isfinite(value)]
        if known:
            out[name] = bounded(item(estimate(known)))
    return out


def _percent(entry: SummaryItem | None) -> SummaryItem | None:
    return None if entry is None else scaled(entry, 100.0)


def _means(frame: pl.DataFrame, column: str) -> dict[str, float]:
    """Run -> mean of a column over its rows."""
    if column not in frame.columns:
        return {}
    means = frame.group_by("run").agg(pl.col(column).mean())
    return {str(run): float(v) for run, v in means.iter_rows() if v is not None}


def _verdicts(planned: Sequence[Pair], tested: Sequence[ContrastResult]) -> list[Verdict]:
    """A line per question; under it its factors, each with the largest difference that stands out."""
    out = []
    for question, text in QUESTIONS.items():
        own = [(p, r) for p, r in zip(planned, tested, strict=True) if p.question == question]
        if not own:
            out.append(Verdict(f"{text} Nothing in this grid compares that.", ""))
            continue
        family = f"Planned beforehand: a family of {len(own)} contrasts, Holm's correction at 0.05 within it."
        out.append(Verdict(f"{text} {_count(own)}", family))
        for factor in dict.fromkeys(p.factor for p, _ in own):
            out += _factor_verdicts(FACTOR_NAMES[factor], [(p, r) for p, r in own if p.factor == factor])
    return out


def _count(own: Sequence[tuple[Pair, ContrastResult]]) -> str:
    differ = sum(r.verdict in (LOWER, HIGHER) for _, r in own)
    return f"{differ} of {len(own)} planned differences {'stands' if differ == 1 else 'stand'} out."


def _factor_verdicts(name: str, own: Sequence[tuple[Pair, ContrastResult]]) -> list[Verdict]:
    """Up to three contrasts each by itself; more as a count and the largest one that stands out."""
    if len(own) <= 3:
        return [Verdict(_line(pair, result), verdict_detail(result)) for pair, result in own]
    clear = [(p, r) for p, r in own if r.verdict in (LOWER, HIGHER)]
    if not clear:
        least = [r.detectable for _, r in own if r.detectable is not None]
        detail = f"detectable differences {min(least):.3g} to {max(least):.3g} {own[0][0].unit}" if least else ""
        return [Verdict(f"{name}: none of {len(own)} differences stands out", detail)]
    pair, result = max(clear, key=lambda both: abs(both[1].estimate.value))
    return [Verdict(f"{name}: {len(clear)} of {len(own)}; the largest: {_line(pair, result)}", verdict_detail(result))]


def _line(pair: Pair, result: ContrastResult) -> str:
    what = "train-test gap" if pair.unit == "nats" else "test accuracy"
    size = (
        f"{abs(result.estimate.value):.3f} nats" if pair.unit == "nats" else f"{abs(result.estimate.value):.1f} points"
    )
    word = WORDS.get(result.verdict, "within noise").format(size=size)
    return f"{pair.name}: {what} {word}"


def _contrast_table(planned: Sequence[Pair], tested: Sequence[ContrastResult]) -> TableBlock:
    columns = [
        Column("contrast"),
        Column("verdict"),
        Column("difference", "+.3f", "mean with its 95 % interval, not corrected for several contrasts"),
        Column("unit"),
        Column("Holm p", ".3g", "corrected for the planned contrasts of the same question"),
        Column("n", "d", "replicates both sides finished"),
        Column("detectable", ".3g", "difference found with 80 % power at the corrected level, this n and spread"),
        Column("beside", "+.3f", "test loss (nats), or accuracy (points) for the gap; shown, not tested"),
        Column("question"),
        Column("factor"),
        Column("interval and test"),
    ]
    rows = [
        [
            pair.name,
            r.verdict,
            item(r.estimate),
            pair.unit,
            r.p_holm,
            r.estimate.n,
            r.detectable,
            item(estimate(pair.beside)),
            pair.question,
            pair.factor,
            f"{r.estimate.method}; {r.test.method}" + (f", {r.test.note}" if r.test.note else ""),
        ]
        for pair, r in zip(planned, tested, strict=True)
    ]
    sizes = ", ".join(f"{len(own)} for {question}" for question, own in families(planned).items())
    caption = (
        "Final test accuracy in percentage points for delay and partition, test loss minus training loss in nats for "
        "momentum; paired by replicate. Planned: cells that agree in all settings but one factor, each against the "
        "reference of its group (barrier, the first delay, no rule, shared or sample, the smallest momentum), and how "
        f"these differences change where nobody waits. Holm's correction is within each question: {sizes}."
    )
    return TableBlock(columns, rows, caption)


def _table_section(found: Outcomes, summary: Mapping[str, SummaryItem]) -> Section:
    columns = [
        Column("condition"),
        Column("n", "d", "replicates that ended"),
        Column("test accuracy (%)", ".2f", "mean and 95 % interval, failures at chance"),
        Column("train accuracy (%)", ".2f"),
        Column("test loss (nats)", ".3f"),
        Column("test - train loss (nats)", "+.3f"),
        Column("failures (%)", ".0f", "95 % Wilson interval"),
        Column("staleness", ".2f", "versions, mean over recorded updates"),
        Column("weight gap", ".3g", "norm of weights now minus weights read, mean over recorded updates"),
        Column("virtual time (s)", ".2f"),
        Column("wall time (s)", ".1f", "on the virtual clock: of all members that were computed together"),
        Column("samples", ",.0f"),
        Column("MB sent", ".1f"),
    ]
    rows = []
    for cell in found.cells:
        n = len(found.ended(cell))
        if not n:
            continue
        of = {k.rsplit("/", 1)[1]: v for k, v in summary.items() if k.rsplit("/", 1)[0] == f"asynchrony/{cell.name}"}
        sent = of["bytes_sent"].value
        rows.append(
            [
                cell.name,
                n,
                scaled(of["accuracy"], 100.0),
                _percent(of.get("train_accuracy")),
                of["test_loss"],
                of.get("train_test_gap"),
                scaled(of["failure_rate"], 100.0),
                of["staleness"].value if "staleness" in of else None,
                of["weight_gap"].value if "weight_gap" in of else None,
                of["virtual_s"].value,
                of["wall_s"].value if "wall_s" in of else None,
                of["samples"].value,
                None if sent is None else sent / 1e6,
            ]
        )
    blocks = [TableBlock(columns, rows, "At the last evaluation of each run.")]
    return Section("All conditions", [*blocks, *_by_class(found, summary)])


def _by_class(found: Outcomes, summary: Mapping[str, SummaryItem]) -> list[TableBlock]:
    """Test accuracy by class, with ``observe.extra=[per_class_accuracy]``."""
    rows: list[list[Any]] = []
    most = 0
    for cell in found.cells:
        at = f"asynchrony/{cell.name}/class_"
        own = {int(k.removeprefix(at)): v for k, v in summary.items() if k.startswith(at)}
        if own:
            rows.append([cell.name, *(_percent(own.get(label)) for label in range(max(own) + 1))])
            most = max(most, len(rows[-1]))
    if not rows:
        return []
    columns = [Column("condition"), *(Column(f"class {label} (%)", ".1f") for label in range(most - 1))]
    filled = [row + [None] * (most - len(row)) for row in rows]
    return [TableBlock(columns, filled, "Test accuracy by class at the last evaluation: mean and 95 % interval.")]


def _method(found: Outcomes) -> Section:
    texts = (
        "A condition is named by what differs: m is momentum, W workers, B the batch size, single the single process. "
        "A delay is its level, or its law with the mean; slow2: worker 0 needs twice as long, only_slow2: and nobody "
        "else is delayed.",
        "All conditions of a replicate share initial weights and, worker by worker, batches and delays. Partitions are "
        "dealt anew for each replicate. One update is one change of the server's weights; conditions have equal "
        "numbers of updates unless a budget of samples or virtual time was asked for, so a synchronous condition "
        "sees as many times the samples as it has workers. The train-test gap of a failed run is the largest of any "
        "run that ended.",
        failure_rule_text(found.scores),
        statistics_text("one seed through every condition", "those of one question"),
    )
    return Section("How the numbers are made", [Paragraph(text) for text in texts])


def _failures(found: Outcomes) -> TableBlock:
    of: dict[str, tuple[Cell, int]] = {run: (cell, r) for cell in found.cells for r, run in cell.runs.items()}
    rows = [[of[s.run][0].name, of[s.run][1], s.failed_step, s.reason, s.run] for s in found.scores.failures()]
    return TableBlock([Column(n) for n in ("condition", "replicate", "failed at step", "reason", "run")], rows)


__all__ = ["STUDY", "build", "cell_summary"]
