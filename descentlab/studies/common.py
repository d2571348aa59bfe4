"""What the reports of several studies share: contrasts as tables and lines, statistics as summary items."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..analysis.contrasts import IDENTICAL, NOISE, UNTESTED, ContrastResult
from ..analysis.failures import Scores
from ..analysis.paired import Estimate
from ..analysis.results import ResultsLike
from ..report import Column, SummaryItem, TableBlock

DIFF_SHOWN = 200  # characters of an uncommitted diff shown on the page


def item(estimate: Estimate, scale: float = 1.0) -> SummaryItem:
    """An estimate as a summary item, in units of 1 / ``scale``."""
    return scaled(SummaryItem(estimate.value, estimate.n, estimate.low, estimate.high, estimate.method), scale)


def scaled(entry: SummaryItem, scale: float) -> SummaryItem:
    """The item in units of 1 / ``scale``: 100 turns a rate into percent."""
    value, low, high = (None if v is None else v * scale for v in (entry.value, entry.low, entry.high))
    return SummaryItem(value, entry.n, low, high, entry.method)


def bounded(entry: SummaryItem, low: float = 0.0, high: float = 1.0) -> SummaryItem:
    """An item whose interval is cut at the limits its quantity has, such as 0 and 1 for an accuracy."""
    if entry.low is None or entry.high is None or (entry.low >= low and entry.high <= high):
        return entry
    method = f"{entry.method}, cut at {low:g} and {high:g}"
    return SummaryItem(entry.value, entry.n, max(low, entry.low), min(high, entry.high), method)


def plain_item(value: float | None, n: int, method: str) -> SummaryItem:
    """A summary item that has no interval."""
    return SummaryItem(value, n, None, None, method)


def percent_range(estimate: Estimate) -> str:
    """``10 % [2 %, 40 %]`` for a rate."""
    low, high = estimate.low or 0.0, estimate.high if estimate.high is not None else 1.0
    return f"{100 * estimate.value:.0f} % [{100 * low:.0f} %, {100 * high:.0f} %]"


def interval_text(estimate: Estimate, unit: str, spec: str = "+.4f") -> str:
    """``+0.12 nats [+0.01, +0.23]``."""
    text = f"{estimate.value:{spec}} {unit}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


def contrast_item(result: ContrastResult) -> SummaryItem:
    """The contrast with its interval; the method tells test, corrected p, verdict and detectable difference."""
    parts = [result.estimate.method, f"test: {result.test.method}"]
    if result.test.note:
        parts.append(result.test.note)
    if result.test.p is not None:
        parts.append(f"p = {result.test.p:.4g}, Holm p = {result.p_holm:.4g}")
    if result.detectable is not None:
        parts.append(f"detectable at 80 % power: {result.detectable:.4g} {result.unit}")
    estimate = result.estimate
    method = "; ".join([*parts, f"verdict: {result.verdict}"])
    return SummaryItem(estimate.value, estimate.n, estimate.low, estimate.high, method)


def contrast_table(
    results: Sequence[ContrastResult], what: str, beside: Sequence[Estimate], beside_name: str, caption: str
) -> TableBlock:
    """Planned contrasts, one a row; ``beside`` is a second measure, in points, that is shown but not tested."""
    columns = [
        Column("contrast"),
        Column("n", "d", "replicates both sides finished"),
        Column(what, "+.4f", "mean with its 95 % interval, not corrected for several contrasts"),
        Column("Holm p", ".3g", "corrected for all planned contrasts"),
        Column("verdict"),
        Column(
            "detectable (nats)", ".3g", "difference found with 80 % power at the corrected level, this n and spread"
        ),
        Column("d_z", "+.2f", "effect size: mean difference / its standard deviation"),
        Column("p", ".3g", "two-sided, before correction"),
        Column(beside_name, "+.2f", "shown beside, not tested"),
        Column("interval and test"),
    ]
    rows = [
        [
            r.name,
            r.estimate.n,
            item(r.estimate),
            r.p_holm,
            r.verdict,
            r.detectable,
            r.estimate.dz,
            r.test.p,
            item(other, 100.0),
            f"{r.estimate.method}; {r.test.method}" + (f", {r.test.note}" if r.test.note else ""),
        ]
        for r, other in zip(results, beside, strict=True)
    ]
    return TableBlock(columns, rows, caption)


def verdict_detail(result: ContrastResult) -> str:
    """The numbers behind a verdict, as one line."""
    parts = [interval_text(result.estimate, result.unit), f"n = {result.estimate.n}", result.estimate.method]
    if result.p_holm is not None:
        parts.append(f"Holm p = {result.p_holm:.3g} ({result.test.method})")
    elif result.verdict in (UNTESTED, IDENTICAL):
        parts.append(result.test.note)
    if result.verdict == NOISE and result.detectable is not None:
        parts.append(f"detectable difference {result.detectable:.3g} {result.unit} at 80 % power")
    return "; ".join(parts)


def failure_rule_text(scores: Scores) -> str:
    """How failures were counted, with this report's numbers."""
    return (
        "A run that crashed, diverged or ended with non-finite weights or loss is a failure: it stays in every "
        f"mean at chance accuracy ({scores.chance:.3g}) and at {scores.failure_loss:.4g} nats, the larger of ln C "
        "and the worst finite final test loss of any run compared here, and it ranks last. A pair whose twin "
        "failed is charged the worst excess of all. No mean is over survivors."
    )


def statistics_text(unit: str, family: str = "all of them") -> str:
    """How intervals and tests are made; ``family``: the contrasts that are corrected together."""
    return (
        f"The replicate ({unit}) is the unit of every interval and rate. Under 20 replicates: Student's t on paired "
        "differences. From 20: BCa bootstrap over replicates and a sign-flip permutation test of the mean. Where a "
        "difference is exactly 0 (a masked fault): exact Wilcoxon signed-rank test with Pratt's zeros. Only the "
        f"planned contrasts are tested, with Holm's correction at 0.05 over {family}; a test that could not "
        "reach its level at this n is not run and says so. Intervals are 95 %, two-sided, not corrected for "
        "several comparisons. A contrast that is not significant is called within noise, which is not evidence "
        "that there is no difference: compare the detectable difference. Mixed: significant by ranks, while a few "
        "large differences turn the mean the other way."
    )


def shown_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance for the page: an uncommitted diff is cut, resumptions are counted; provenance.json has it all."""
    out = dict(provenance)
    if isinstance(out.get("resumed"), list):
        out["resumed"] = f"{len(out['resumed'])} times, see provenance.json"
    git = out.get("git")
    if isinstance(git, Mapping):
        out["git"] = {
            k: v if len(str(v)) <= DIFF_SHOWN else f"{len(str(v))} characters, see provenance.json"
            for k, v in git.items()
        }
    return out


def is_brief(results: ResultsLike) -> bool:
    """Whether the report leaves out PDF files and some figures: at ``size=quick`` they would take most of the time."""
    return results.spec.get("size") == "quick"


def command_text(results: ResultsLike, study: str) -> str:
    """The command that made the results, as typed."""
    command = results.provenance.get("command") or ["descentlab", "run", study]
    return shlex.join(["descentlab", *(str(part) for part in command[1:])])
