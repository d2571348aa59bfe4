"""What came of every run, and the comparisons that were planned before: pairs of cells that differ in one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from ...analysis.contrasts import Contrast
from ...analysis.failures import PENDING, Scores, final_scores
from ...analysis.results import ResultsLike, class_count, last_attempts
from .names import delay_text, flat

QUESTIONS = {
    "delay": "How do delays, and not waiting, change convergence?",
    "partition": "What does dealing the data by sample or by label change?",
    "momentum": "Does momentum regularise, and does staleness add to it?",
}
FACTORS = ("timeline", "delay", "staleness_rule", "partition", "momentum")
OF_QUESTION = {"timeline": "delay", "delay": "delay", "staleness_rule": "delay", "partition": "partition"}
SYNCHRONOUS = ("barrier", "constant", "backup")
FIRST = {"timeline": ("barrier",), "partition": ("shared", "sample"), "staleness_rule": ("none",)}


@dataclass(frozen=True)
class Cell:
    """A cell of the grid with its runs by replicate; ``factors``: factor -> its level, the rest of the settings."""

    index: int
    name: str
    settings: Mapping[str, Any]
    runs: Mapping[int, str]
    factors: Mapping[str, str] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether it is the single-process baseline."""
        return self.settings["workers"] == 1


@dataclass(frozen=True)
class Pair:
    """A planned comparison: ``cell`` minus ``reference`` over the replicates that ended in both."""

    question: str
    factor: str
    name: str
    cell: Cell
    reference: Cell
    replicates: Sequence[int]
    differences: np.ndarray
    beside: np.ndarray

    def contrast(self) -> Contrast:
        return Contrast(self.name, self.differences, self.unit)

    @property
    def unit(self) -> str:
        """Of the differences; those beside are in the other one."""
        return "nats" if self.question == "momentum" else "points"


@dataclass(frozen=True)
class Outcomes:
    """Cells in their order, scores of all runs, and the loss on the test set over that on the training set (nats)."""

    cells: Sequence[Cell]
    scores: Scores
    gaps: Mapping[str, float]
    ends: Mapping[str, Mapping[str, Any]]  # run -> its last row

    def ended(self, *cells: Cell) -> list[int]:
        """Replicates that ended in all of these cells."""
        common = set.intersection(*(set(cell.runs) for cell in cells))
        return sorted(r for r in common if all(self.scores[c.runs[r]].state != PENDING for c in cells))

    def accuracy(self, cell: Cell, replicates: Sequence[int]) -> np.ndarray:
        """Final test accuracy, 0 to 1, failures at chance."""
        return np.array([self.scores[cell.runs[r]].test_accuracy for r in replicates])

    def loss(self, cell: Cell, replicates: Sequence[int]) -> np.ndarray:
        """Final test loss (nats), failures at their charge."""
        return np.array([self.scores[cell.runs[r]].test_loss for r in replicates])

    def gap(self, cell: Cell, replicates: Sequence[int]) -> np.ndarray:
        """Test loss minus training loss at the end, nats; of a failed run the largest of any run that ended."""
        worst = max((v for v in self.gaps.values() if np.isfinite(v)), default=0.0)
        found = [self.gaps.get(cell.runs[r], np.nan) for r in replicates]
        failed = [self.scores[cell.runs[r]].failed for r in replicates]
        return np.array([worst if bad or not np.isfinite(v) else v for v, bad in zip(found, failed, strict=True)])

    def failed(self, cell: Cell, replicates: Sequence[int]) -> int:
        return sum(self.scores[cell.runs[r]].failed for r in replicates)


def outcomes(results: ResultsLike) -> Outcomes:
    """Sort the runs into cells and score them."""
    by_cell: dict[int, dict[int, str]] = {}
    settings: dict[int, Mapping[str, Any]] = {}
    names: dict[int, str] = {}
    for run in results.runs:
        index = int(run["cell"])
        by_cell.setdefault(index, {})[int(run["replicate"])] = str(run["id"])
        settings[index], names[index] = run["settings"], str(run["labels"]["condition"])
    cells = [Cell(i, names[i], settings[i], by_cell[i], factors(settings[i])) for i in sorted(by_cell)]
    scores = final_scores(results, [[str(run["id"])] for run in results.runs], class_count(results.spec))
    frame = last_attempts(results.frame).filter(pl.col("test_loss").is_not_null())
    last = frame.group_by("run", maintain_order=True).last()
    ends = {str(row["run"]): row for row in last.to_dicts()}
    gaps = {
        run: float(row["test_loss"] - row["train_set_loss"])
        for run, row in ends.items()
        if row.get("train_set_loss") is not None
    }
    return Outcomes(cells, scores, gaps, ends)


def factors(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a cell has of each factor, as text, and everything ``else``."""
    of = flat(settings)
    ignored = {"condition", *(k for k in of if k.startswith("timeline.delay"))}
    own: dict[str, list[str]] = {factor: [] for factor in (*FACTORS, "else")}
    for key, value in of.items():
        if key in ignored:
            continue
        room = key.split(".")[0]
        if key in ("optimizer.momentum", "worker_momentum"):
            own["momentum"].append(f"{value:g}" if key == "optimizer.momentum" else f"worker {value:g}" * bool(value))
        elif room in ("timeline", "partition", "staleness_rule"):
            own[room].append(str(value) if key == room else _shown(key, value))
        elif room == "delay":
            continue
        else:
            own["else"].append(f"{key}={value}")
    own["delay"] = [delay_text(of)]
    return {factor: ",".join(filter(None, parts)) for factor, parts in own.items()}


def _shown(key: str, value: Any) -> str:
    """A setting of an option; nothing for the usual way of dealing labels."""
    return "" if (key, value) == ("partition.truncate", True) else f"{key.split('.')[-1]}={value}"


def pairs(found: Outcomes) -> list[Pair]:
    """Every planned comparison, by question; the cells of one agree in all but the factor."""
    made: list[Pair] = []
    for factor in FACTORS:
        for cells in _groups(found, factor):
            reference = _reference(factor, cells)
            made += [_pair(found, factor, cell, reference) for cell in cells if cell is not reference]
    made += [more for factor in ("partition", "momentum") for more in _interactions(found, made, factor)]
    return [pair for pair in made if len(pair.replicates)]


def _groups(found: Outcomes, factor: str) -> list[list[Cell]]:
    """Cells that agree in all other factors. Delays move only the clock of a synchronous cell, so that one is the
    reference of asynchronous ones whatever their delays."""
    groups: dict[str, list[Cell]] = {}
    for cell in found.cells:
        if cell.alone and factor != "momentum":
            continue
        if factor == "delay" and cell.settings["timeline"]["name"] in SYNCHRONOUS[:2]:
            continue
        groups.setdefault(_rest(cell, factor), []).append(cell)
    if factor != "timeline":
        return list(groups.values())
    out = []
    for cells in groups.values():
        barriers = [cell for cell in cells if cell.settings["timeline"]["name"] == "barrier"]
        if barriers:
            out.append([barriers[0], *(cell for cell in cells if cell not in barriers)])
        else:
            delays = dict.fromkeys(cell.factors["delay"] for cell in cells)
            out += [[cell for cell in cells if cell.factors["delay"] == delay] for delay in delays]
    return out


def _rest(cell: Cell, *without: str) -> str:
    """All factors but some; ``timeline`` leaves out the delay too."""
    skipped = {*without, *(("delay",) if "timeline" in without else ())}
    return "|".join(f"{k}:{level}" for k, level in cell.factors.items() if k not in skipped)


def _interactions(found: Outcomes, made: Sequence[Pair], factor: str) -> list[Pair]:
    """How much larger the effect of ``factor`` is without waiting: its difference there minus that behind a barrier."""
    own = [pair for pair in made if pair.factor == factor and not pair.cell.alone]
    waiting = {
        (_rest(pair.cell, "timeline"), _rest(pair.reference, "timeline")): pair
        for pair in own
        if pair.cell.settings["timeline"]["name"] == "barrier"
    }
    out = []
    for pair in own:
        base = waiting.get((_rest(pair.cell, "timeline"), _rest(pair.reference, "timeline")))
        if base is None or pair.cell.settings["timeline"]["name"] == "barrier":
            continue
        both = [r for r in pair.replicates if r in set(base.replicates)]
        first, second = ([list(p.replicates).index(r) for r in both] for p in (pair, base))
        name = f"{pair.name}, less the same behind a barrier"
        differences = pair.differences[first] - base.differences[second]
        beside = pair.beside[first] - base.beside[second]
        question = OF_QUESTION.get(factor, factor)
        out.append(Pair(question, f"{factor} x timeline", name, pair.cell, pair.reference, both, differences, beside))
    return out


def _reference(factor: str, cells: Sequence[Cell]) -> Cell:
    for level in FIRST.get(factor, ()):
        for cell in cells:
            if cell.factors[factor].split(",")[0] == level:
                return cell
    if factor == "momentum":
        of = [
            (float(c.settings["optimizer"].get("momentum", 0.0)), float(c.settings["worker_momentum"])) for c in cells
        ]
        return cells[of.index(min(of))]
    return cells[0]


def difference_name(first: str, second: str) -> str:
    """``asynchronous \u2212 barrier (label,m=0.9)``: what differs, and in brackets what both have."""
    a, b = first.split(","), second.split(",")
    common = [part for part in a if part in b]
    own = [",".join(part for part in parts if part not in common) for parts in (a, b)]
    return f"{own[0] or 'as it is'} \u2212 {own[1] or 'without'}" + (f" ({','.join(common)})" if common else "")


def _pair(found: Outcomes, factor: str, cell: Cell, reference: Cell) -> Pair:
    replicates = found.ended(cell, reference)
    accuracy = 100 * (found.accuracy(cell, replicates) - found.accuracy(reference, replicates))
    loss = found.loss(cell, replicates) - found.loss(reference, replicates)
    name = difference_name(cell.name, reference.name)
    if factor == "momentum":
        gap = found.gap(cell, replicates) - found.gap(reference, replicates)
        return Pair("momentum", factor, f"gap of {name}", cell, reference, replicates, gap, accuracy)
    return Pair(OF_QUESTION[factor], factor, name, cell, reference, replicates, accuracy, loss)
