"""The sections of the asynchrony report that hold figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...analysis.contrasts import ContrastResult
from ...analysis.results import ResultsLike, last_attempts
from ...core.errors import UserError
from ...report import FigureBlock, Paragraph, Section, SummaryItem
from ...report.figures import Dot, looks
from ...theory.staleness import efficiency, expected_staleness
from ..common import is_brief
from . import figures
from .outcomes import Cell, Outcomes, Pair

MOST_LINES = 7  # conditions one figure of curves shows
MOST_PANELS = 12
SHOWN_UPDATES = 40


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
    out.append(_clusters(cells, summary, brief=is_brief(results)))
    return out


def _contrasts(planned: Sequence[Pair], tested: Sequence[ContrastResult]) -> Section:
    blocks = []
    for unit, what in (("points", "difference of test accuracy (points)"), ("nats", "difference of the gap (nats)")):
        dots = [
            Dot(pair.name, r.estimate.value, r.estimate.low, r.estimate.high, f"{pair.question}: {pair.factor}")
            for pair, r in zip(planned, tested, strict=True)
            if pair.unit == unit
        ]
        if dots:
            caption = f"Planned contrasts, mean and 95 % interval; {tested[0].estimate.method}."
            blocks.append(FigureBlock(f"contrasts_{unit}", figures.contrasts(dots, what), caption, what))
    return Section("Planned contrasts", blocks)


def _curves(results: ResultsLike, cells: Sequence[Cell]) -> Section:
    frame = last_attempts(results.frame)
    shown = _chosen(cells, MOST_LINES)
    look = looks([cell.name for cell in shown])
    rest = f"; {len(shown)} of {len(cells)} conditions, the largest momentum first" if len(shown) < len(cells) else ""
    n = max(len(cell.runs) for cell in cells)
    blocks = [
        FigureBlock(
            "curves",
            figures.curves(frame, shown, look),
            f"Median and quartiles over {n} replicates, a value that is not finite counts as the worst{rest}.",
            "Test accuracy and loss against updates, virtual time and bytes",
        )
    ]
    if "validation_loss" in frame.columns and not is_brief(results):
        panels = _chosen(cells, MOST_PANELS)
        blocks.append(
            FigureBlock(
                "validation",
                figures.validation(frame, panels),
                "Medians over replicates; the mark is where the validation loss is least, where training should stop.",
                "Training, validation and test loss with the early-stop mark",
            )
        )
    return Section("Convergence", blocks)


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


def _clusters(cells: Sequence[Cell], summary: Mapping[str, SummaryItem], brief: bool) -> Section:
    """Who worked when, who had which data, and how much faster that was."""
    blocks: list[FigureBlock | Paragraph] = []
    if brief:
        return Section("Clusters", [Paragraph("Timelines, partitions and speed are drawn from size=default on.")])
    try:
        blocks += _from_settings(cells)
    except (UserError, ImportError) as error:  # a third party's class, or a trace, that is not here any more
        blocks.append(Paragraph(f"Timelines and partitions cannot be drawn here: {error}"))
    rates = {}
    for cell in cells:
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
        caption = "Speed on the virtual clock" + (
            "; beside it the share of what as many single processes with the same delays would process."
            if alone
            else "."
        )
        picture = figures.scaling(list(rates), list(rates.values()), shares)
        blocks.append(FigureBlock("scaling", picture, caption, "Samples per virtual second and scaling efficiency"))
    return Section("Clusters", blocks)


def _from_settings(cells: Sequence[Cell]) -> list[FigureBlock]:
    from .program import counts, updates

    kinds: dict[tuple[str, str], Cell] = {}
    deals: dict[tuple[str, int], Cell] = {}
    for cell in cells:
        if cell.alone or cell.settings["engine"]["name"] != "virtual":
            continue
        kinds.setdefault((cell.factors["timeline"], cell.factors["delay"]), cell)
        deals.setdefault((cell.factors["partition"], int(cell.settings["workers"])), cell)
    out = []
    tables = {
        cell.name: (int(cell.settings["workers"]), updates(cell.settings, SHOWN_UPDATES))
        for cell in list(kinds.values())[:4]
    }
    if tables:
        text = "The first updates of replicate 0: a bar is a worker's gradient, a mark the update it went into."
        out.append(FigureBlock("timelines", figures.timelines(tables), text, "Who contributed when"))
    partitions = {
        f"{partition}, {workers} workers": counts(cell.settings)
        for (partition, workers), cell in list(deals.items())[:4]
    }
    if partitions:
        text = "Training samples of each class that every worker has, in replicate 0."
        out.append(FigureBlock("partitions", figures.class_counts(partitions), text, "Class counts per worker"))
    return out
