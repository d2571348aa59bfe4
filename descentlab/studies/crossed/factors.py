"""The crossed study as a factorial: scores by (condition, fault, timeline, compressor) and their interactions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from ...analysis.contrasts import Contrast
from ...analysis.failures import PENDING, Score, Scores, excess_accuracies, excess_losses, final_scores
from ...analysis.results import ResultsLike, cell_settings

FACTORS = ("fault", "timeline", "compressor")
BASE = {"fault": "none", "timeline": "barrier", "compressor": "none"}
WORDS = {"fault": "fault", "timeline": "staleness", "compressor": "compression"}

Key = tuple[str, str, str, str]  # condition (optimizer), fault, timeline, compressor


@dataclass(frozen=True)
class Factorial:
    """Every cell by its levels. ``runs``: (key, replicate) -> run id; ``levels``: factor -> its levels, base first."""

    conditions: list[str]
    levels: dict[str, list[str]]
    runs: dict[tuple[Key, int], str]
    keys: list[Key]
    scores: Scores

    def replicates(self, *keys: Key) -> list[int]:
        """Replicates that ended in all of ``keys``."""
        every = sorted({replicate for _, replicate in self.runs})
        return [r for r in every if all(self._ended(key, r) for key in keys)]

    def _ended(self, key: Key, replicate: int) -> bool:
        run = self.runs.get((key, replicate))
        return run is not None and self.scores[run].state != PENDING

    def of(self, key: Key, replicates: list[int]) -> list[Score]:
        """Scores of a cell, in the order of ``replicates``."""
        return [self.scores[self.runs[key, r]] for r in replicates]

    def values(self, key: Key, replicates: list[int], measure: str) -> np.ndarray:
        """``test_loss`` (nats) or ``test_accuracy`` of a cell, shape [replicates], failures at their charge."""
        return np.array([getattr(score, measure) for score in self.of(key, replicates)])


def level(settings: Mapping[str, Any], factor: str, cells: Mapping[int, Mapping[str, Any]]) -> str:
    """A level's name: its option, and what tells cells with that option apart; a delay is just ``staleness=2``."""
    name = str(settings.get(factor) or BASE[factor])
    staleness = settings.get("timeline.staleness")
    if factor == "timeline" and staleness is not None:
        return f"staleness={staleness:g}"
    rivals = [cell for cell in cells.values() if str(cell.get(factor) or BASE[factor]) == name]
    differing = [k for k in settings if k.startswith(f"{factor}.") and len({str(cell.get(k)) for cell in rivals}) > 1]
    return ",".join([name, *(f"{key.split('.', 1)[1]}={settings[key]}" for key in differing)])


def _condition(settings: Mapping[str, Any], cells: Mapping[int, Mapping[str, Any]]) -> str:
    rivals = [cell for cell in cells.values() if cell["optimizer"] == settings["optimizer"]]
    free = [k for k in settings if k.split(".")[0] not in FACTORS and len({str(cell.get(k)) for cell in rivals}) > 1]
    return ",".join([str(settings["optimizer"]), *(f"{key}={settings[key]}" for key in free)])


def _with_fixed(settings: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's settings with the factors that all cells share, which are no columns of the frame."""
    fixed: dict[str, Any] = {}
    for factor in FACTORS:
        block = spec.get(factor)
        if isinstance(block, Mapping) and "name" in block:
            fixed[factor] = block["name"]
    staleness = (spec.get("timeline") or {}).get("staleness")
    if "timeline" in fixed and staleness is not None:
        fixed["timeline.staleness"] = staleness
    return {**fixed, **settings}


def _ordered(names: list[str], base: str) -> list[str]:
    unique = list(dict.fromkeys(names))
    return sorted(unique, key=lambda name: name != base)


def factorial(results: ResultsLike, classes: int) -> Factorial:
    """Sort the runs into the factorial; runs that differ only in the fault are scored at one common step."""
    cells = {cell: _with_fixed(s, results.spec) for cell, s in cell_settings(results.frame).items()}
    keys: dict[int, Key] = {
        cell: (
            _condition(s, cells),
            level(s, "fault", cells),
            level(s, "timeline", cells),
            level(s, "compressor", cells),
        )
        for cell, s in cells.items()
    }
    runs = {
        (keys[int(run["cell"])], int(run["replicate"])): str(run["id"])
        for run in results.runs
        if int(run["cell"]) in keys
    }
    groups: dict[tuple, list[str]] = {}
    for (key, replicate), run in runs.items():
        groups.setdefault((key[0], key[2], key[3], replicate), []).append(run)
    scores = final_scores(results, list(groups.values()), classes)
    levels = {f: _ordered([key[i + 1] for key in keys.values()], BASE[f]) for i, f in enumerate(FACTORS)}
    conditions = list(dict.fromkeys(key[0] for key in keys.values()))
    order = [k for k in product(conditions, *levels.values()) if k in set(keys.values())]
    return Factorial(conditions, levels, runs, order, scores)


@dataclass(frozen=True)
class Interaction:
    """One planned difference of differences: two factors' levels against base, averaged over the third factor."""

    condition: str
    first: str
    second: str
    levels: tuple[str, str]
    name: str
    replicates: list[int]
    loss: np.ndarray
    accuracy: np.ndarray

    def contrast(self) -> Contrast:
        return Contrast(f"{self.condition}: {self.name}", self.loss)


def interactions(data: Factorial) -> list[Interaction]:
    """All planned interactions per condition, on replicates that ended in every cell the contrast needs."""
    found = []
    for condition in data.conditions:
        for first, second in (("fault", "timeline"), ("fault", "compressor"), ("timeline", "compressor")):
            if BASE[first] != data.levels[first][0] or BASE[second] != data.levels[second][0]:
                continue  # no base level to take differences from
            for one, two in product(data.levels[first][1:], data.levels[second][1:]):
                contrast = _interaction(data, condition, (first, second), (one, two))
                if contrast is not None:
                    found.append(contrast)
    return found


def _interaction(
    data: Factorial, condition: str, factors: tuple[str, str], levels: tuple[str, str]
) -> Interaction | None:
    """[(a, b) - (0, b)] - [(a, 0) - (0, 0)], 0 = base, averaged over the third factor's levels, per replicate."""
    third = next(f for f in FACTORS if f not in factors)
    signs: list[tuple[Key, int]] = []
    for context in data.levels[third]:
        for has_first, has_second in product((1, 0), (1, 0)):
            at = {
                third: context,
                factors[0]: levels[0] if has_first else BASE[factors[0]],
                factors[1]: levels[1] if has_second else BASE[factors[1]],
            }
            signs.append(
                ((condition, at["fault"], at["timeline"], at["compressor"]), 1 if has_first == has_second else -1)
            )
    if any(key not in data.keys for key, _ in signs):
        return None
    replicates = data.replicates(*(key for key, _ in signs))
    if not replicates:
        return None
    loss, accuracy = (
        np.sum([sign * data.values(key, replicates, measure) for key, sign in signs], axis=0) / len(data.levels[third])
        for measure in ("test_loss", "test_accuracy")
    )
    name = f"{WORDS[factors[0]]}-x-{WORDS[factors[1]]}"
    if len(data.levels[factors[0]]) > 2 or len(data.levels[factors[1]]) > 2:
        name += f"({levels[0]},{levels[1]})"
    return Interaction(condition, *factors, levels, name, replicates, loss, accuracy)


def fault_excess(data: Factorial, key: Key) -> tuple[list[float], list[float]]:
    """Test loss (nats) and accuracy over the same cell without the fault, per replicate; empty where there is none."""
    twin = (key[0], BASE["fault"], key[2], key[3])
    if key == twin or twin not in data.keys:
        return [], []
    replicates = data.replicates(key, twin)
    fault, control = data.of(key, replicates), data.of(twin, replicates)
    return excess_losses(fault, control), excess_accuracies(fault, control)
