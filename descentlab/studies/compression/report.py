"""The report of the compression study: what every method reaches, in what time and with how many bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...analysis.failures import Scores, final_scores
from ...analysis.paired import Estimate, estimate
from ...analysis.results import ResultsLike, class_count
from ...core.errors import StudyError
from ...report import Column, FigureBlock, Paragraph, Report, Section, SummaryItem, TableBlock, Verdict
from ..common import (
    command_text,
    failure_rule_text,
    interval_text,
    is_brief,
    item,
    plain_item,
    scaled,
    shown_provenance,
)
from . import figures
from .measures import MEASURES, Run, by_epoch, by_link, curves, runs_of, summarise
from .prediction import Predicted, order, predictions
from .spec import STUDY
from .tables import epoch_section, exchange_tables, prediction_section

MARGIN = 0.005  # accuracy that counts as no loss


@dataclass(frozen=True)
class Found:
    """Everything the report is made from."""

    results: ResultsLike
    methods: Mapping[str, str]  # run -> method
    runs: Sequence[Run]
    summary: Mapping[str, Mapping[str, SummaryItem]]
    links: Mapping[str, Sequence[Run]]  # by link; one nameless entry where all runs have the same
    predicted: Sequence[Predicted]


def build(results: ResultsLike) -> Report:
    """The report of a compression study, finished or not. Raises :class:`StudyError` while no run has ended."""
    methods = {str(run["id"]): str(run["labels"]["method"]) for run in results.runs}
    groups = [[run] for run in methods]
    scores = final_scores(results, groups, class_count(results.spec))
    runs = runs_of(results, scores, methods)
    if not runs:
        raise StudyError(f"{results.path}: nothing to report yet, no run has ended; run the study again to go on")
    ended = {run.id: run.method for run in runs}
    found = Found(results, ended, runs, summarise(runs), by_link(runs), predictions(results, runs))
    contrasts = comparisons(runs)
    pending = len(methods) - len(runs)
    return Report(
        title="Compressed gradients",
        question=STUDY.question,
        verdicts=_verdicts(found, contrasts),
        sections=_sections(found, scores, contrasts),
        summary=_summary(found, contrasts),
        failures=_failures(scores, ended),
        provenance=shown_provenance(results.provenance),
        command=command_text(results, "compression"),
        runs=len(runs),
        notes=[f"{pending} of {len(methods)} runs have not ended; they are left out."] if pending else [],
        pdf=not is_brief(results),
    )


def comparisons(runs: Sequence[Run]) -> dict[str, Estimate]:
    """``a_minus_b`` -> difference in final accuracy, paired by replicate: every adaptive method against the largest
    fixed rank, and the largest fixed rank against the smallest."""
    by = {(run.method, run.replicate): run for run in runs}
    pairs: list[tuple[str, str]] = []
    for own in by_link(runs).values():
        fixed = sorted({r.method for r in own if r.method.startswith("rank_")}, key=lambda m: int(m[5:].split(",")[0]))
        pairs += [(fixed[-1], fixed[0])] if len(fixed) > 1 else []
        adaptive = [m for m in dict.fromkeys(r.method for r in own) if _adapts(m)]
        pairs += [(method, fixed[-1]) for method in adaptive if fixed]
    found = {}
    for first, second in pairs:
        shared = sorted({r for m, r in by if m == first} & {r for m, r in by if m == second})
        if shared:
            differences = [by[first, r].accuracy - by[second, r].accuracy for r in shared]
            found[f"{first}_minus_{second}"] = estimate(differences)
    return found


def _adapts(method: str) -> bool:
    return method.startswith(("adaptive", "calibrated", "budget", "schedule"))


def _summary(found: Found, contrasts: Mapping[str, Estimate]) -> dict[str, SummaryItem]:
    out = {
        f"compression/{method}/{name}": entry
        for method, measures in found.summary.items()
        for name, entry in measures.items()
    }
    for one in found.predicted:
        how = f"T = a + b bytes at {one.bandwidth_mbps:g} Mbit/s, relative to the median measured"
        out[f"compression/{one.method}/prediction_error"] = plain_item(one.error, one.n, how)
    for rate in dict.fromkeys(one.bandwidth_mbps for one in found.predicted):
        right, pairs, _ = order([one for one in found.predicted if one.bandwidth_mbps == rate])
        how = f"share of pairs of methods whose median times are in the predicted order, at {rate:g} Mbit/s"
        out[f"compression/in_order/{rate:g}_mbps"] = plain_item(right / max(pairs, 1), pairs, how)
    return out | {f"compression/{name}/accuracy": item(result) for name, result in contrasts.items()}


def _verdicts(found: Found, contrasts: Mapping[str, Estimate]) -> list[Verdict]:
    lines = []
    for method, of in found.summary.items():
        accuracy, time_s, sent = (of.get(name) for name in ("accuracy", "time_s", "bytes_sent"))
        assert accuracy is not None and time_s is not None and sent is not None
        text = f"{method}: {100 * (accuracy.value or 0):.2f} % in {time_s.value:.3g} s, {_mega(sent.value)} MB sent"
        lines.append(Verdict(text, f"n = {accuracy.n}; {accuracy.method}"))
    for name, result in contrasts.items():
        first, _, second = name.partition("_minus_")
        shown = replace(result, value=100 * result.value, low=_times(result.low), high=_times(result.high))
        what = interval_text(shown, "points", "+.2f")
        word = ""
        if _adapts(first) and result.low is not None:
            kept = result.low > -MARGIN
            word = f": {'not worse' if kept else 'not shown to be as good'} within {100 * MARGIN:g} point"
            word += _time_ratio(found, first, second)
        lines.append(Verdict(f"{first} against {second}: {what}{word}", f"n = {result.n}; {result.method}"))
    return lines


def _times(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _mega(value: float | None) -> str:
    return f"{(value or 0) / 1e6:.3g}"


def _time_ratio(found: Found, first: str, second: str) -> str:
    a, b = (found.summary[m].get("time_s") for m in (first, second))
    return f", in {a.value / b.value:.2f} of its time" if a and b and a.value and b.value else ""


def _table(found: Found) -> TableBlock:
    columns = [
        Column("method"),
        Column("n", "d", "replicates that ended"),
        Column("test accuracy (%)", ".2f", "on the test set at the end, mean and 95 % interval; failures at chance"),
        Column("time (s)", ".3g", "of training, without evaluations"),
        Column("iterations/s", ".3g"),
        Column("sent (MB)", ".4g", "by all workers"),
        Column("sending (%)", ".1f", "share of an update's time"),
    ]
    rows: list[list[Any]] = []
    for method, of in found.summary.items():
        n = of["accuracy"].n
        sent, share = scaled(of["bytes_sent"], 1e-6), scaled(of["link_share"], 100.0)
        rows.append([method, n, scaled(of["accuracy"], 100.0), of["time_s"], of.get("iterations_per_s"), sent, share])
    return TableBlock(columns, rows, "Mean over replicates with its 95 % interval.")


def _sections(found: Found, scores: Scores, contrasts: Mapping[str, Estimate]) -> list[Section]:
    results = found.results
    n = max(of["accuracy"].n for of in found.summary.values())
    pictures = []
    for i, (link, runs) in enumerate(found.links.items()):
        own = {run.id: run.method for run in runs}
        time, sent = (curves(results, own, x) for x in ("virtual_s", "bytes_sent"))
        text = f"Mean test accuracy over {n} replicates while training; at the end with its 95 % interval."
        pictures.append(
            FigureBlock(
                f"tradeoff_{i}" if link else "tradeoff",
                figures.tradeoff(time, sent, {method: found.summary[method] for method in time}),
                f"{text} Link: {link}." if link else text,
                "Accuracy against time and against bytes sent",
            )
        )
    spent = FigureBlock(
        "breakdown",
        figures.breakdown(found.runs),
        f"Where an update's time goes; mean over {n} replicates. {_clock_text(found)}",
        "Stacked bars of the time of an update",
    )
    sections = [
        Section("Every method", [_table(found)]),
        Section("What it costs to reach an accuracy", pictures),
        Section("Where the time goes", [spent, *exchange_tables(found.results, found.runs)]),
        *_rank_section(found),
        *prediction_section(found.predicted),
        *_pays_section(found),
        *epoch_section(found.results, found.methods),
    ]
    how = Paragraph(
        "Accuracy is that on the test set after the last update, never the best epoch's. A replicate is one seed: its "
        f"own initial weights and batches, the same for every method. {failure_rule_text(scores)}"
    )
    return [*sections, Section("How the numbers are made", [how, Paragraph(_clock_text(found))])]


def _clock_text(found: Found) -> str:
    if any(run.parts["compress_s"] for run in found.runs):
        return "Times are measured by the processes: of computing, compressing, each collective, decompressing."
    computes = sorted({1e3 * run.parts["compute_s"] for run in found.runs})
    compute = " or ".join(f"{value:g}" for value in computes)
    workers = " or ".join(str(n) for n in sorted({run.workers for run in found.runs}))
    rates = {(run.bandwidth_mbps, run.latency_s) for run in found.runs}
    said = [f"{rate:g} Mbit/s and {1e3 * hop:g} ms a hop" if rate else "no limit" for rate, hop in sorted(rates)]
    link = " or ".join(said)
    return (
        f"Times are those of a simulated clock: {compute} ms for a gradient and the update, and a ring of "
        f"{workers} workers with {link}. Compressing takes no time on this clock."
    )


def _rank_section(found: Found) -> list[Section]:
    rank = by_epoch(found.results, found.methods, "rank")
    if not rank:
        return []
    change = by_epoch(found.results, found.methods, "gradient_change")
    norm = by_epoch(found.results, found.methods, "grad_norm")
    figure = figures.ranks(rank, change, norm, _threshold(found), list(found.summary))
    caption = "Mean over replicates. A policy's view of the gradient starts with its second look."
    return [Section("Rank", [FigureBlock("ranks", figure, caption, "Rank and gradient change against epochs")])]


def _threshold(found: Found) -> float | None:
    """The change that Accordion takes for much, where all cells that have one agree on it."""
    keys = ("compressor.policy.threshold", "compressor.policy.accordion.threshold")
    frame = found.results.frame
    values = {v for key in keys if key in frame.columns for v in frame[key].drop_nulls().unique().to_list()}
    policy = found.results.spec.get("compressor", {})
    policy = policy.get("policy", {}) if isinstance(policy, Mapping) else {}
    if not values and "threshold" in policy:
        values = {policy["threshold"]}
    return float(values.pop()) if len(values) == 1 else None


def _pays_section(found: Found) -> list[Section]:
    if not all(run.messages for run in found.runs):
        return []
    columns = [Column("method"), Column("faster than none below (Mbit/s)", ".4g", "at this latency")]
    blocks: list[Any] = []
    for i, (link, runs) in enumerate(found.links.items()):
        rate, latency = runs[0].bandwidth_mbps, runs[0].latency_s
        text = (
            "Time of an update over other links, from the bytes and messages of these runs and the time they computed."
        )
        blocks.append(
            FigureBlock(
                f"pays_{i}" if link else "pays",
                figures.when_it_pays(runs, rate, 1e3 * latency),
                f"{text} Runs at {link}." if link else text,
                "Time of an update against bandwidth and latency",
            )
        )
        plain = next((run for run in runs if run.base == "none"), None)
        if plain is not None:
            first = {run.method: run for run in reversed(runs) if run.base != "none"}
            rows = [[m, _break_even(plain, run, latency)] for m, run in reversed(first.items())]
            blocks.append(TableBlock(columns, rows, "Above it, or where a dash stands, sending everything is as fast."))
        if len(found.links) > 1:
            break  # the model needs the runs of one link only, the fastest
    return [Section("When compression pays", blocks)]


def _break_even(plain: Run, own: Run, latency_s: float) -> float | None:
    """The rate at which a method takes as long as none; None where it never does, inf where it always wins."""
    rates = np.geomspace(1e-2, 1e6, 4000)
    faster = [figures.update_s(own, r, latency_s) < figures.update_s(plain, r, latency_s) for r in rates]
    if all(faster):
        return float("inf")
    return float(rates[max(np.flatnonzero(faster))]) if any(faster) else None


def _failures(scores: Scores, methods: Mapping[str, str]) -> TableBlock:
    rows = [[methods.get(s.run, ""), s.failed_step, s.reason, s.run] for s in scores.failures()]
    return TableBlock([Column(name) for name in ("method", "failed at step", "reason", "run")], rows)


__all__ = ["MEASURES", "build", "comparisons"]
