"""Aggregates of the published summary and its Markdown report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .v3_measures import EARLY_EPOCH, NOTES, Campaign, Outcome


def _finite(values: Sequence[float | None]) -> np.ndarray:
    return np.array([v for v in values if v is not None and math.isfinite(v)], dtype=float)


def _mean(values: Sequence[float | None]) -> float | None:
    known = _finite(values)
    return float(known.mean()) if len(known) else None


def _std(values: Sequence[float | None]) -> float | None:
    known = _finite(values)
    return float(known.std()) if len(known) else None


def aggregate(campaign: Campaign) -> dict[str, dict[str, Any]]:
    """``aggregate_metrics``: per optimizer, failures included at what they are charged."""
    table: dict[str, dict[str, Any]] = {}
    for name in campaign.optimizers:
        own = campaign.outcomes(name)
        changes = [o.change for o in own]
        table[name] = {
            "mean_final_accuracy": _mean([o.final for o in own]),
            "std_final_accuracy": _std([o.final for o in own]),
            "mean_accuracy_change": _mean(changes),
            "std_accuracy_change": _std(changes),
            "mean_degradation_rate": _mean([o.slope for o in own]),
            "positive_recovery_rate": _mean([float(c is not None and c > 0) for c in changes]),
            "divergence_rate": _mean([float(o.failed) for o in own]),
            "mean_excess_test_loss": _mean([o.extra.get("excess_test_loss") for o in own]),
            "mean_excess_test_accuracy": _mean([o.extra.get("excess_test_accuracy") for o in own]),
            "n": len(own),
        }
    return table


def win_rate(campaign: Campaign, a: str, b: str) -> float | None:
    """Share of experiments in which ``a`` ends at a higher accuracy than ``b``; ties count half, failures lose."""
    points = []
    for experiment in campaign.experiments:
        if a in experiment.outcomes and b in experiment.outcomes:
            x, y = _rank(experiment.outcomes[a]), _rank(experiment.outcomes[b])
            points.append(0.5 if x == y else float(x > y))
    return _mean(points)


def _rank(outcome: Outcome) -> float:
    return -math.inf if outcome.failed or not math.isfinite(outcome.final) else outcome.final


def best(metrics: Mapping[str, Mapping[str, Any]], key: str) -> list[str]:
    """The optimizers with the largest value, several where they tie."""
    known = {name: row[key] for name, row in metrics.items() if row[key] is not None}
    return [name for name, value in known.items() if value == max(known.values())]


def summary(campaign: Campaign, version: int) -> dict[str, Any]:
    """intermediate_summary.json as it stands after the last experiment."""
    return {
        "format_version": version,
        "completed_experiments": len(campaign.experiments),
        "unfinished_experiments": campaign.unfinished,
        "optimizers_tested": campaign.optimizers,
        "aggregate_metrics": aggregate(campaign),
        "notes": list(NOTES),
    }


def report(campaign: Campaign, made: str, watched: int | None) -> str:
    """final_report.md: the published sections."""
    metrics = aggregate(campaign)
    lines = [
        "# Optimizer Recovery Comparison",
        "",
        f"Date: {made}",
        "",
        f"Completed experiments: {len(campaign.experiments)}"
        + (f" ({campaign.unfinished} more are not finished)" if campaign.unfinished else ""),
        "",
        *_configuration(campaign, watched),
        *_aggregate_lines(metrics),
        *_analysis(campaign, metrics),
        *_breakdown(campaign),
        *_conclusions(metrics),
        "## Notes",
        "",
        *(f"- {note}" for note in NOTES),
    ]
    return "\n".join(lines) + "\n"


def _configuration(campaign: Campaign, watched: int | None) -> list[str]:
    configs = campaign.configs
    values = _finite([c["injection_value"] for c in configs])
    steps = [c["target_step"] for c in configs if c["target_step"] is not None]
    rows = {
        "Optimizers": ", ".join(campaign.optimizers),
        "Fault model": ", ".join(sorted({str(c["fmodel"]) for c in configs})),
        "Injection values": f"{values.min():.3g} to {values.max():.3g}" if len(values) else "set by each fault",
        "Largest target epoch": max(c["target_epoch"] for c in configs),
        "Largest target step": max(steps) if steps else "not recorded",
        "Steps after injection": watched if watched is not None else "not recorded",
    }
    return ["## Configuration", "", *(f"- {key}: {value}" for key, value in rows.items()), ""]


def _aggregate_lines(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = ["Optimizer", "Mean Final Acc", "Std Final Acc", "Mean Acc Change", "Positive Recovery %"]
    rows = [
        [
            name,
            _number(row["mean_final_accuracy"]),
            _number(row["std_final_accuracy"]),
            _number(row["mean_accuracy_change"], "+.4f"),
            _percent(row["positive_recovery_rate"]),
            _number(row["mean_degradation_rate"], "+.4f", 1000),
            _percent(row["divergence_rate"]),
            _number(row["mean_excess_test_loss"], "+.4f"),
        ]
        for name, row in metrics.items()
    ]
    columns = [*head, "Mean Degradation (x1000)", "Divergence %", "Excess Test Loss (nats)"]
    return ["## Aggregate Results", "", *table(columns, rows), ""]


def _analysis(campaign: Campaign, metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = campaign.optimizers
    rows = [
        [a, *("" if j <= i else _percent(win_rate(campaign, a, b)) for j, b in enumerate(names))]
        for i, a in enumerate(names)
    ]
    leaders = best(metrics, "mean_accuracy_change")
    change = _number(metrics[leaders[0]]["mean_accuracy_change"], "+.4f") if leaders else "none"
    return [
        "## Analysis",
        "",
        "### Best Optimizer",
        "",
        f"{_named(leaders)}: mean accuracy change {change}",
        "",
        "### Head-to-Head (row against column, % won, ties half)",
        "",
        *table(["", *names], rows),
        "",
    ]


def _breakdown(campaign: Campaign) -> list[str]:
    lines = ["## Breakdown", ""]
    for title, early in ((f"Early (epochs 0 to {EARLY_EPOCH})", True), (f"Late (after epoch {EARLY_EPOCH})", False)):
        chosen = [e for e in campaign.experiments if (e.epoch <= EARLY_EPOCH) == early]
        rows = []
        for name in campaign.optimizers:
            changes = _finite([e.outcomes[name].change for e in chosen if name in e.outcomes])
            if len(changes):
                rows.append([name, *(f"{v:+.4f}" for v in (changes.mean(), changes.max(), changes.min()))])
        lines += [f"### {title}: {len(chosen)} experiments", ""]
        lines += [*table(["Optimizer", "Mean Acc Change", "Best", "Worst"], rows), ""] if rows else []
    return lines


def _conclusions(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Conclusions",
        "",
        f"- Best (highest mean accuracy change): {_named(best(metrics, 'mean_accuracy_change'))}",
        f"- Most resilient (highest positive recovery rate): {_named(best(metrics, 'positive_recovery_rate'))}",
    ]
    unstable = best(metrics, "divergence_rate")
    if unstable and metrics[unstable[0]]["divergence_rate"] > 0:
        lines.append(f"- Least stable (highest divergence rate): {_named(unstable)}")
    tests = "These are rankings of means. Intervals and tests are in the report of the run itself."
    return [*lines, "", tests, ""]


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) + (" (tied)" if len(names) > 1 else "") if names else "none"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]


def _number(value: float | None, spec: str = ".4f", scale: float = 1.0) -> str:
    return "n/a" if value is None else format(scale * value, spec)


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}"
