"""Why a run ended as it did: which state the fault polluted, by how much, and when that decays."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ...analysis.outcomes import LABELS
from ...analysis.pollution import FROZEN, POLLUTED, censored_median
from ...analysis.recovery import Recovery
from ...report import Column, FigureBlock, Paragraph, Section, TableBlock
from . import figures

NEVER = 1e9  # predicted steps from here on are called never: no training is that long


def steps_text(values: list[float | int | None], watched: int) -> str | None:
    """Median of step counts; None among them is beyond the horizon, which makes the median a lower bound."""
    if not values:
        return None
    median, bound = censored_median(values, watched)
    return f"> {watched}" if bound else f"{median:g}"


def predicted_text(values: list[float | None]) -> str | None:
    """Median of predicted step counts."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    median = float(np.quantile(known, 0.5, method="lower"))
    return "never" if median > NEVER else f"{median:,.0f}"


def _median_ratio(values: pl.Series) -> float | None:
    known = sorted(values.drop_nulls().to_list())
    return known[(len(known) - 1) // 2] if known else None


def pollution_table(recovery: Recovery) -> TableBlock:
    """One row per condition and polluted state: how often, how much, how long, measured and predicted."""
    rows: list[list[Any]] = []
    for condition in recovery.order:
        own = recovery.measures.filter(pl.col("condition") == condition)
        for state in sorted(set(own["polluted"].to_list()), key=lambda s: (s == "none", s)):
            part = own.filter(pl.col("polluted") == state)
            watched = int(part["steps_watched"].min())  # type: ignore[arg-type]
            slot, bn = "optimizer slot" in state, "BatchNorm" in state
            slots = [part["slot_steps"].to_list(), part["slot_predicted"].to_list()] if slot else [[], []]
            variances = [part["bn_steps"].to_list(), part["bn_predicted"].to_list()] if bn else [[], []]
            back = [part["frozen_steps"].to_list(), part["frozen_predicted"].to_list()]
            counts = part["outcome"].to_list()
            rows.append(
                [
                    condition,
                    state,
                    len(part),
                    *(_median_ratio(part[f"{key}_ratio"]) for key in ("slot", "bn", "update")),
                    steps_text(slots[0], watched),
                    predicted_text(slots[1]),
                    steps_text(variances[0], watched),
                    predicted_text(variances[1]),
                    steps_text(back[0], watched),
                    predicted_text(back[1]),
                    ", ".join(f"{label} {counts.count(label)}" for label in LABELS if label in counts),
                ]
            )
    columns = [
        Column("optimizer"),
        Column("polluted state", "", f"{POLLUTED:g} times the twin's or more right after the faulty update"),
        Column("n", "d", "faulted runs"),
        Column("slot / twin's", ".3g", "largest optimizer slot element at the hit, median"),
        Column("BatchNorm variance / twin's", ".3g", "largest running variance at the hit, median"),
        Column("update / twin's", ".3g", "norm of the faulty update, median: how far the weights were thrown"),
        Column("slot: steps to 10 %", "", "measured, median; > : not within what was watched"),
        Column("slot: predicted", "", "constant gradient after the hit; a lower bound for second moments"),
        Column("variance: steps to 10 %", "", "measured, median; > : not within what was watched"),
        Column("variance: predicted", "", "(1 - 0.1)^k; infinite variance: never"),
        Column(
            "updates: frozen for", "", "steps until updates are back at 90 % of the twin's, median; 0: never frozen"
        ),
        Column("frozen: predicted", "", "constant gradient; known only where the fault was a factor on the gradient"),
        Column("outcomes"),
    ]
    caption = (
        "Ratios to the twin right after the faulty update, medians over runs. Steps until within 10 % of the twin for "
        "good; a run that is not, within what was watched, counts as longer. Updates are frozen if their moving "
        f"average is below {FROZEN:g} of the twin's right after the hit. Weights have no decay: what an update moved "
        "stays until training moves it back."
    )
    return TableBlock(columns, rows, caption)


def explanation_section(recovery: Recovery, brief: bool) -> Section:
    """Table, the decay figure, and what the prediction assumes."""
    n = recovery.measures["replicate"].n_unique()
    caption = (
        "Largest optimizer slot, largest BatchNorm running variance and size of the updates (moving average after the "
        f"hit) over the twin's at the same step: lines, median, and bands, quartiles, over n = {n} cases; non-finite "
        "values count as above the axis. Crosses: median of what is predicted for constant gradients after the hit, "
        "from each run's slot or variance at the hit (for second moments a lower bound, since nothing fades faster "
        "than its decay; for momentum an approximation), for updates from the factor on the gradient where that was "
        "the fault (an estimate: a real gradient is not constant). 1 = as in the twin. An optimizer without slots has "
        "no line."
    )
    text = Paragraph(
        "The prediction takes the state right after the faulty update, assumes that gradients are then as in the twin, "
        "and lets every slot forget at its own rate (theory/slots.py): momentum mu^k, Adam beta1^k and beta2^k, "
        "RMSprop alpha^k, Adagrad and AMSGrad never, BatchNorm variance (1 - 0.1)^k. Where the fault also moved the "
        "weights, gradients stay larger than the twin's and the measured decay is slower."
    )
    if brief:
        return Section("Explanation", [pollution_table(recovery), text])
    alt = "Optimizer slots and BatchNorm variance relative to the twin after the hit, measured and predicted"
    figure = FigureBlock("state_after_hit", figures.state(recovery), caption, alt)
    return Section("Explanation", [pollution_table(recovery), figure, text])
