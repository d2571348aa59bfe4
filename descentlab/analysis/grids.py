"""What a grid of settings says: the best setting of each group, sensitivity to two keys, suboptimality.

The replicate is the unit. A run that failed, diverged or never measured the metric is a failure: it counts as the worst
finite final value of any run compared, and a setting with failures ranks behind every setting that has fewer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from ..core.errors import UserError, nearest
from .paired import Estimate, estimate
from .results import ResultsLike, cell_settings, last_attempts

Direction = Literal["min", "max"]
FOLD = "fold"  # the column of a study with folds


@dataclass(frozen=True)
class Setting:
    """One cell of the grid: its varying ``settings``, the metric over its replicates, how many of them failed, and the
    distance of its mean from the best mean of the whole grid (at least 0)."""

    cell: int
    settings: Mapping[str, Any]
    value: Estimate
    failed: int
    suboptimality: float


def direction_of(metric: str, asked: Direction | None = None) -> Direction:
    """``asked``, or what the name says: accuracies are to be large, everything else small."""
    return asked or ("max" if "accuracy" in metric else "min")


def check_column(results: ResultsLike, key: str, argument: str) -> None:
    """Raises :class:`UserError` for a column the table does not have."""
    if key not in results.frame.columns:
        expected = f"a column of the table ({', '.join(sorted(results.frame.columns))})"
        raise UserError(argument, key, expected, hint=nearest(key, results.frame.columns))


def settings_of(results: ResultsLike, metric: str, direction: Direction | None = None) -> list[Setting]:
    """Every cell with its score, best first. Raises :class:`UserError` for a metric the table does not have, or that no
    run has measured."""
    check_column(results, metric, "--metric")
    sign = 1.0 if direction_of(metric, direction) == "min" else -1.0
    finals = _finals(results, metric)
    finite = [value for value in finals.values() if math.isfinite(value)]
    if not finite:
        raise UserError("--metric", metric, "a column that some run has measured")
    worst = max(finite, key=lambda value: sign * value)
    cells = cell_settings(results.frame)
    first = _over_folds(cells)
    by_cell: dict[int, list[float]] = {}
    for run in results.runs:
        if run["id"] in finals and run["cell"] in cells:
            by_cell.setdefault(first[int(run["cell"])], []).append(finals[run["id"]])
    means = {
        cell: estimate([value if math.isfinite(value) else worst for value in values])
        for cell, values in by_cell.items()
    }
    best = min(sign * mean.value for mean in means.values())
    made = [
        Setting(
            cell,
            _without_fold(cells[cell]),
            mean,
            sum(not math.isfinite(v) for v in by_cell[cell]),
            sign * mean.value - best,
        )
        for cell, mean in means.items()
    ]
    return sorted(made, key=lambda s: (s.failed / s.value.n, s.suboptimality, s.cell))


def _without_fold(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != FOLD}


def _over_folds(cells: Mapping[int, Mapping[str, Any]]) -> dict[int, int]:
    """Cell -> the first cell that differs from it in its fold alone: their runs count as replicates of one setting."""
    first: dict[str, int] = {}
    return {cell: first.setdefault(repr(_without_fold(settings)), cell) for cell, settings in sorted(cells.items())}


def _finals(results: ResultsLike, metric: str) -> dict[str, float]:
    """Run -> its last value; infinite for a failure. Runs that have not ended are left out."""
    ended = {str(row["run"]): str(row["status"]) for row in results.status}
    rows = last_attempts(results.frame).filter(pl.col(metric).is_not_null())
    last = dict(rows.group_by("run", maintain_order=True).agg(pl.col(metric).last().cast(pl.Float64)).iter_rows())
    out = {}
    for run, status in ended.items():
        if status in ("failed", "diverged"):
            out[run] = math.inf
        elif status == "done":
            value = last.get(run, math.nan)
            out[run] = value if math.isfinite(value) else math.inf
    return out


def best_of(
    results: ResultsLike, metric: str, by: Sequence[str] = (), direction: Direction | None = None
) -> list[Setting]:
    """The best setting for each combination of values of the keys ``by``, best first."""
    for key in by:
        check_column(results, key, "--by")
    found: dict[tuple[str, ...], Setting] = {}
    for setting in settings_of(results, metric, direction):
        found.setdefault(tuple(repr(setting.settings.get(key)) for key in by), setting)
    return list(found.values())


@dataclass(frozen=True)
class Sensitivity:
    """``table[i][j]``: the best setting with the i-th value of ``rows`` and the j-th of ``columns``, None if none
    has."""

    rows: Sequence[Any]
    columns: Sequence[Any]
    table: Sequence[Sequence[Setting | None]]


def sensitivity(
    results: ResultsLike, metric: str, rows: str, columns: str, direction: Direction | None = None
) -> Sensitivity:
    """How the metric depends on two keys, everything else at its best."""
    ordered = settings_of(results, metric, direction)
    for argument, key in (("--rows", rows), ("--columns", columns)):
        varying = list(dict.fromkeys(itertools.chain.from_iterable(s.settings for s in ordered)))
        if key not in varying:
            raise UserError(argument, key, f"a setting that varies ({', '.join(varying)})", hint=nearest(key, varying))
    down, across = (_sorted({s.settings[key] for s in ordered if key in s.settings}) for key in (rows, columns))

    def best(a: Any, b: Any) -> Setting | None:
        return next((s for s in ordered if s.settings.get(rows) == a and s.settings.get(columns) == b), None)

    return Sensitivity(down, across, [[best(a, b) for b in across] for a in down])


def _sorted(values: set[Any]) -> list[Any]:
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return sorted(numbers) + sorted((v for v in values if v not in numbers), key=str)
