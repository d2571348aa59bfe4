"""The published figures: comparison (2 x 2), zoom, summary (2 x 3). Functions to a Figure, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..figures import GREY, Look, heat, looks, name_ticks, new_figure, panel_title, strip, styled
from .v3_measures import Campaign, Experiment, Outcome
from .v3_summary import win_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ZOOM_BEFORE, SHOWN_AFTER = 10, 50  # steps
GREEN, RED, YELLOW = "#009E73", "#D55E00", "#E69F00"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _curves(ax: Axes, outcomes: Sequence[Outcome], look: dict[str, Look], what: str, start: int = 0) -> None:
    for outcome in outcomes:
        values = getattr(outcome, what)
        shown = outcome.steps >= start
        label = f"{outcome.name} ({outcome.final:.3f}{', failed' if outcome.failed else ''})"
        style = look[outcome.name]
        ax.plot(outcome.steps[shown], values[shown], color=style.colour, linestyle=style.line, label=label)
    ax.axvline(outcomes[0].hit, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)))
    ax.set_xlabel(f"step (fault at step {outcomes[0].hit}, dashed)")
    ax.set_ylabel(f"training {what} of the batch" + (" (nats)" if what == "loss" else ""))


def comparison(experiment: Experiment) -> Figure:
    """Accuracy, loss (log), final accuracy with its change, slope of accuracy after the fault."""
    outcomes = list(experiment.outcomes.values())
    names, look = [o.name for o in outcomes], looks(list(experiment.outcomes))
    with styled():
        figure = new_figure(7.5, 6.0)
        axes = figure.subplots(2, 2)
        _curves(axes[0, 0], outcomes, look, "accuracy")
        axes[0, 0].legend(title="final accuracy")
        panel_title(axes[0, 0], 0, "accuracy")
        _curves(axes[0, 1], outcomes, look, "loss")
        if any((np.isfinite(o.loss) & (o.loss > 0)).any() for o in outcomes):
            axes[0, 1].set_yscale("log")
        panel_title(axes[0, 1], 1, "loss")
        _bars(axes[1, 0], outcomes, names)
        _slopes(axes[1, 1], outcomes, names)
    return figure


def _bars(ax: Axes, outcomes: Sequence[Outcome], names: list[str]) -> None:
    place = np.arange(len(names))
    change = np.array([_number(o.change) for o in outcomes])
    ax.bar(place - 0.2, [o.final for o in outcomes], 0.38, color="#0072B2", label="final accuracy")
    colours = [GREEN if value > 0 else RED for value in change]
    ax.bar(place + 0.2, change, 0.38, color=colours, label="change since the faulty pass")
    ax.axhline(0, color="black", linewidth=0.6)
    name_ticks(ax, names)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
    ax.legend(loc="upper right", ncols=2)
    panel_title(ax, 2, "final accuracy and change")


def _slopes(ax: Axes, outcomes: Sequence[Outcome], names: list[str]) -> None:
    slopes = 1000 * np.array([_number(o.slope) for o in outcomes])
    ax.bar(range(len(names)), slopes, 0.6, color=[GREEN if v > 0 else RED if v < -0.1 else YELLOW for v in slopes])
    for i, value in enumerate(slopes):
        if math.isfinite(value):
            ax.annotate(f"{value:+.2f}", (i, value), ha="center", va="bottom" if value >= 0 else "top")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_ylabel("accuracy per 1,000 steps")
    name_ticks(ax, names)
    panel_title(ax, 3, "slope after the fault")


def zoom(experiment: Experiment) -> Figure:
    """Accuracy from ten steps before the fault on."""
    outcomes = list(experiment.outcomes.values())
    with styled():
        figure = new_figure(6.0, 3.5)
        ax = figure.add_subplot()
        _curves(ax, outcomes, looks(list(experiment.outcomes)), "accuracy", outcomes[0].hit - ZOOM_BEFORE)
        ax.legend(title="final accuracy")
    return figure


def overview(campaign: Campaign) -> Figure:
    """Accuracy change, mean trajectories, wins, slopes, change against faulty accuracy, change by epoch."""
    look = looks(campaign.optimizers)
    with styled():
        figure = new_figure(9.0, 6.0)
        axes = figure.subplots(2, 3).flatten()
        changes = {name: _all(campaign, name, "change") for name in campaign.optimizers}
        failed = {name: np.array([o.failed for o in campaign.outcomes(name)]) for name in campaign.optimizers}
        strip(axes[0], changes, failed, look)
        axes[0].set_ylabel("accuracy change")
        _trajectories(axes[1], campaign, look)
        _wins(axes[2], campaign)
        _violins(axes[3], campaign, look)
        _against(axes[4], campaign, look)
        _by_epoch(axes[5], campaign)
        titles = ["accuracy change", "mean trajectory", "share won", "slope after the fault"]
        for index, title in enumerate([*titles, "change against faulty accuracy", "mean change by epoch"]):
            panel_title(axes[index], index, title)
    return figure


def _all(campaign: Campaign, name: str, what: str) -> np.ndarray:
    return np.array([_number(getattr(o, what)) for o in campaign.outcomes(name)])


def aligned(outcomes: Sequence[Outcome], before: int = ZOOM_BEFORE, after: int = SHOWN_AFTER) -> np.ndarray:
    """Accuracy ``[experiments, before + after + 1]`` by steps from the fault; NaN where there is no such step.

    A failed run counts at chance from its first non-finite value on.
    """
    out = np.full((len(outcomes), before + after + 1), math.nan)
    for row, outcome in zip(out, outcomes, strict=True):
        place = outcome.steps - outcome.hit + before
        inside = (place >= 0) & (place < len(row))
        row[place[inside]] = outcome.accuracy[inside]
        if outcome.failed:
            broken = outcome.hit if outcome.diverged_step is None else outcome.diverged_step
            row[max(0, broken - outcome.hit + before) :] = outcome.chance
    return out


def _trajectories(ax: Axes, campaign: Campaign, look: dict[str, Look]) -> None:
    at = np.arange(-ZOOM_BEFORE, SHOWN_AFTER + 1)
    for name in campaign.optimizers:
        rows = aligned(campaign.outcomes(name))
        known = np.isfinite(rows).any(0)
        if known.any():
            mean = np.nanmean(rows[:, known], axis=0)
            ax.plot(at[known], mean, color=look[name].colour, linestyle=look[name].line, label=name)
    ax.axvline(0, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)))
    ax.set_xlabel("steps from the fault")
    ax.set_ylabel("training accuracy")
    ax.legend()


def _wins(ax: Axes, campaign: Campaign) -> None:
    names = campaign.optimizers
    values = np.array([[0.5 if a == b else _number(win_rate(campaign, a, b)) for b in names] for a in names])
    texts = [["" if math.isnan(v) else f"{v:.2f}" for v in row] for row in values]
    heat(ax, values, texts, names, names, colours="RdYlGn", limits=(0.0, 1.0))


def _violins(ax: Axes, campaign: Campaign, look: dict[str, Look]) -> None:
    for place, name in enumerate(campaign.optimizers):
        slopes = 1000 * _all(campaign, name, "slope")
        slopes = slopes[np.isfinite(slopes)]
        if len(slopes) > 1 and np.ptp(slopes) > 0:
            bodies: Any = ax.violinplot([slopes], positions=[place], showmeans=True)["bodies"]
            for body in bodies:
                body.set_facecolor(look[name].colour)
        else:
            ax.plot([place] * len(slopes), slopes, "o", color=look[name].colour)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_ylabel("accuracy per 1,000 steps")
    name_ticks(ax, campaign.optimizers)


def _against(ax: Axes, campaign: Campaign, look: dict[str, Look]) -> None:
    for name in campaign.optimizers:
        x, y = _all(campaign, name, "post"), _all(campaign, name, "change")
        ax.scatter(x, y, s=14, color=look[name].colour, marker=look[name].marker, label=name)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xlabel("accuracy of the faulty pass")
    ax.set_ylabel("accuracy change")


def _by_epoch(ax: Axes, campaign: Campaign) -> None:
    epochs = sorted({e.epoch for e in campaign.experiments})
    values = np.full((len(campaign.optimizers), len(epochs)), math.nan)
    for i, name in enumerate(campaign.optimizers):
        for j, epoch in enumerate(epochs):
            own = [e.outcomes[name].change for e in campaign.experiments if e.epoch == epoch and name in e.outcomes]
            known = [v for v in own if v is not None and math.isfinite(v)]
            values[i, j] = np.mean(known) if known else math.nan
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    texts = [["" if math.isnan(v) else f"{v:+.2f}" for v in row] for row in values]
    heat(
        ax,
        values,
        texts,
        campaign.optimizers,
        [f"epoch {e}" for e in epochs],
        colours="RdYlGn",
        limits=(-largest or -1.0, largest or 1.0),
    )
