"""The sections of the asynchrony report that hold figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...analysis.contrasts import ContrastResult
from ...analysis.results import ResultsLike, last_attempts
from ...core.errors import UserError
from ...report import FigureBlock, Paragraph, Section, SummaryItem
from ...report.figures import DOUBLE, Dot, interval_plot, looks
from ...theory.staleness import efficiency, expected_staleness
from ..common import is_brief
from . import figures
from .outcomes import QUESTIONS, Cell, Outcomes, Pair

MOST_LINES = 7  # conditions one figure of curves shows
MOST_FIGURES = 4
MOST_PANELS = 12
MOST_PATHS = 6  # trajectories on one plane
MOST_TIMELINES = 5
PACE = ("workers", "model", "cost", "local_steps", "batch_size")  # what speed depends on, beside who waits
SHOWN_UPDATES = 500


def sections(
    results: ResultsLike,
    found: Outcomes,
    planned: Sequence[Pair],
    tested: Sequence[ContrastResult],
    summary: Mapping[str, SummaryItem],
) -> list[Section]:
    """Curves, contrasts, staleness and clusters, as far as there is something to show."""
    cells = [cell for cell in found.cells if found.ended(cell)]
    out = [_contrasts(planned, tested)] if planned else []
    out.append(_curves(results, cells))
    if any(cell.name for cell in cells if f"asynchrony/{cell.name}/train_test_gap" in summary):
        caption = "Median and quartiles over replicates; the single process has all data, whatever the panel."
        block = FigureBlock("gap", figures.gaps(found), caption, "Train-test gap against momentum, by staleness")
        out.append(Section("Momentum and the train-test gap", [block]))
    out.append(_staleness(results, cells))
    out.append(_clusters(results, cells, summary))
    return [*out, *_trajectories(results, cells)]


def _contrasts(planned: Sequence[Pair], tested: Sequence[ContrastResult]) -> Section:
    """One figure per question."""
    blocks = []
    for question, text in QUESTIONS.items():
        own = [(p, r) for p, r in zip(planned, tested, strict=True) if p.question == question]
        if not own:
            continue
        dots = [Dot(p.name, r.estimate.value, r.estimate.low, r.estimate.high, p.factor) for p, r in own]
        what = "difference of the gap (nats)" if own[0][0].unit == "nats" else "difference of test accuracy (points)"
        caption = f"{text} Planned contrasts, mean and 95 % interval; n = {own[0][1].estimate.n} replicates."
        blocks.append(FigureBlock(f"contrasts_{question}", interval_plot(dots, what, DOUBLE), caption, what))
    return Section("Differences by question", blocks)


def _curves(results: ResultsLike, cells: Sequence[Cell]) -> Section:
    frame = last_attempts(results.frame)
    groups = _groups(cells, brief=is_brief(results))
    kind = {cell.name: cell.name if "" in groups else _without_momentum(cell) for cell in cells}
    look = looks(list(dict.fromkeys(kind.values())))
    n = max(len(cell.runs) for cell in cells)
    blocks = []
    for i, (name, own) in enumerate(groups.items()):
        of = f"Momentum {name}. " if name and len(groups) > 1 else ""
        alike = [cell for cell in cells if not name or _momentum(cell) == name]
        some = f" {len(own)} of {len(alike)} conditions." if len(own) < len(alike) else ""
        blocks.append(
            FigureBlock(
                "curves" if i == 0 else f"curves_{i + 1}",
                figures.curves(frame, own, {cell.name: look[kind[cell.name]] for cell in own}),
                f"{of}Median and quartiles over {n} replicates, a value that is not finite counts as the worst. Times "
                "and bytes are on logarithmic axes; wall time on the virtual clock is that of all members that were "
                f"computed together. A single process sends nothing.{some}",
                f"{of}Test accuracy and loss against updates, virtual time, wall time and bytes",
            )
        )
    if "validation_loss" in frame.columns and not is_brief(results):
        panels = _chosen(cells, MOST_PANELS)
        some = f"; {len(panels)} of {len(cells)} conditions" if len(panels) < len(cells) else ""
        blocks.append(
            FigureBlock(
                "validation",
                figures.validation(frame, panels),
                "Medians over replicates; the mark is where the validation loss is least, where training should "
                f"stop{some}.",
                "Training, validation and test loss with the early-stop mark",
            )
        )
    return Section("Convergence", blocks)


def _momentum(cell: Cell) -> str:
    return cell.factors["momentum"]


def _without_momentum(cell: Cell) -> str:
    """What a condition is beside its momentum: it looks the same in the figure of each."""
    return "|".join(f"{k}:{v}" for k, v in cell.factors.items() if k != "momentum")


def _groups(cells: Sequence[Cell], brief: bool) -> dict[str, list[Cell]]:
    """What one figure of curves shows: all, or one momentum each, the largest first; at most so many lines."""
    if len(cells) <= MOST_LINES:
        return {"": list(cells)}
    levels = sorted(dict.fromkeys(map(_momentum, cells)), key=lambda level: (len(level), level), reverse=True)
    shown = levels[:1] if brief else levels[:MOST_FIGURES]
    return {level: [cell for cell in cells if _momentum(cell) == level][:MOST_LINES] for level in shown}


def _chosen(cells: Sequence[Cell], most: int) -> list[Cell]:
    """At most so many, those with the largest momentum first, in their order."""
    if len(cells) <= most:
        return list(cells)
    momentum = [-float(cell.settings["optimizer"].get("momentum", 0.0)) for cell in cells]
    order = sorted(range(len(cells)), key=lambda i: (momentum[i], i))[:most]
    return [cells[i] for i in sorted(order)]


def _staleness(results: ResultsLike, cells: Sequence[Cell]) -> Section:
    frame = last_attempts(results.frame)
    seen: dict[tuple[str, str, int], Cell] = {}
    for cell in cells:
        key = cell.factors["timeline"], cell.factors["delay"], int(cell.settings["workers"])
        if not cell.alone and cell.settings["timeline"]["name"] != "barrier":
            seen.setdefault(key, cell)
    shown = list(seen.values())[:9]
    if not shown or "staleness" not in frame.columns:
        return Section("Staleness", [Paragraph("No condition here has stale gradients.")])
    expected = {
        cell.name: expected_staleness(int(cell.settings["workers"]))
        for cell in shown
        if cell.settings["timeline"]["name"] == "asynchronous"
    }
    block = FigureBlock(
        "staleness",
        figures.staleness(frame, shown, expected),
        "Versions between reading and applying, over the recorded updates of all replicates; one condition for each "
        "timeline and delay, which the weights do not influence. Expected: W - 1 in the mean when nobody waits.",
        "Histograms of staleness",
    )
    return Section("Staleness", [block])


def _trajectories(results: ResultsLike, cells: Sequence[Cell]) -> list[Section]:
    """The paths of some runs on the plane of their principal components, where weights were stored along them."""
    kept = [cell for cell in cells if cell.settings["observe"].get("snapshots_every")]
    kept = [cell for cell in kept if cell.settings["model"] == kept[0].settings["model"]][:MOST_PATHS]
    if not kept or is_brief(results):
        return []
    from ...report.landscape import picture
    from .program_paths import SAMPLES, surface, trails

    command = f"descentlab landscape {results.path} draws a finer plane, and one that can be turned."
    try:
        paths = trails(Path(results.path), {cell.runs[min(cell.runs)]: cell.name for cell in kept})
        if not paths:
            return []
        drawn = picture(surface(kept[0].settings, paths), "")
    except (UserError, ImportError) as error:
        return [Section("Trajectories", [Paragraph(f"Trajectories are not drawn here: {error}"), Paragraph(command)])]
    caption = (
        f"The training loss ({SAMPLES} samples) on the plane of the first two principal components of the weights "
        f"along the first replicate of {len(paths)} conditions; a ring is the end of a run, the cross the end of the "
        f"first. {command}"
    )
    return [Section("Trajectories", [FigureBlock("trajectories", drawn, caption, "Paths on the loss landscape")])]


def _clusters(results: ResultsLike, cells: Sequence[Cell], summary: Mapping[str, SummaryItem]) -> Section:
    """Who worked when, who had which data, and how much faster that was."""
    blocks: list[FigureBlock | Paragraph] = []
    if is_brief(results):
        return Section("Clusters", [Paragraph("Timelines, partitions and speed are drawn from size=default on.")])
    try:
        blocks += _from_settings(results, cells)
    except (UserError, ImportError) as error:  # a third party's class, or a trace, that is not here any more
        blocks.append(Paragraph(f"Timelines and partitions cannot be drawn here: {error}"))
    rates: dict[str, float] = {}
    seen: set[tuple[str, str, str]] = set()
    for cell in cells:
        pace = cell.factors["timeline"], cell.factors["delay"], str([cell.settings.get(key) for key in PACE])
        if pace in seen:
            continue  # weights do not influence the clock
        seen.add(pace)
        samples, seconds = (summary[f"asynchrony/{cell.name}/{k}"].value for k in ("samples", "virtual_s"))
        if samples and seconds:
            rates[cell.name] = samples / seconds
    if rates:
        alone = {cell.factors["delay"]: rates[cell.name] for cell in cells if cell.alone and cell.name in rates}
        shares = [
            efficiency(rates[cell.name], alone[cell.factors["delay"]], int(cell.settings["workers"]))
            if cell.factors["delay"] in alone
            else None
            for cell in cells
            if cell.name in rates
        ]
        caption = "Speed on the virtual clock, one condition for each cluster" + (
            "; beside it the share of what as many single processes with the same delays would process."
            if alone
            else "."
        )
        blocks.append(_scaling(cells, rates, shares, caption))
    return Section("Clusters", blocks)


def _scaling(
    cells: Sequence[Cell], rates: Mapping[str, float], shares: Sequence[float | None], caption: str
) -> FigureBlock:
    """Bars; or lines against the number of workers where there are several."""
    alt = "Samples per virtual second and scaling efficiency"
    lines: dict[str, list[tuple[int, float]]] = {}
    for cell, share in zip([cell for cell in cells if cell.name in rates], shares, strict=True):
        if share is not None and not cell.alone:
            kind = f"{cell.factors['timeline']}, {cell.factors['delay']}"
            lines.setdefault(kind, []).append((int(cell.settings["workers"]), share))
    if lines and min(len(points) for points in lines.values()) > 1:
        return FigureBlock("scaling", figures.efficiencies(lines), caption, alt)
    return FigureBlock("scaling", figures.scaling(list(rates), list(rates.values()), shares), caption, alt)


def _from_settings(results: ResultsLike, cells: Sequence[Cell]) -> list[FigureBlock]:
    from .program import counts, updates
    from .program_paths import recorded

    kinds: dict[tuple[str, str, int], Cell] = {}
    deals: dict[tuple[str, int], Cell] = {}
    for cell in cells:
        if not cell.alone:
            workers = int(cell.settings["workers"])
            kinds.setdefault((cell.factors["timeline"], cell.factors["delay"], workers), cell)
            deals.setdefault((cell.factors["partition"], workers), cell)
    out = []
    tables = {}
    for cell in list(kinds.values())[:MOST_TIMELINES]:
        if cell.settings["engine"]["name"] == "virtual":
            made = updates(cell.settings, SHOWN_UPDATES)
        else:
            made = recorded(Path(results.path), cell.runs[min(cell.runs)], SHOWN_UPDATES)
        if made:
            tables[cell.name] = (int(cell.settings["workers"]), made)
    if tables:
        text = "The first updates of the first replicate: a bar is a worker's gradient, a mark the update it went into."
        out.append(FigureBlock("timelines", figures.timelines(tables), text, "Who contributed when"))
    partitions = {
        f"{partition}, {workers} workers": counts(cell.settings)
        for (partition, workers), cell in list(deals.items())[:4]
    }
    if partitions:
        text = "Training samples of each class that every worker has, in replicate 0."
        out.append(FigureBlock("partitions", figures.class_counts(partitions), text, "Class counts per worker"))
    return out
