"""A grid as text and as a figure: the best settings, sensitivity to two keys, panels with bands."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from ..analysis.grids import Direction, Setting, best_of, check_column, direction_of, sensitivity, settings_of
from ..analysis.results import ResultsLike, condition_labels, last_attempts, value_text
from ..core.errors import UserError
from .curves import MOST, Layout, draw, too_many


def _interval(setting: Setting) -> str:
    value = setting.value
    text = f"{value.value:.6g}"
    if value.low is not None and value.high is not None:
        text += f" [{value.low:.6g}, {value.high:.6g}]"
    return text + (f" ({setting.failed} of {value.n} failed)" if setting.failed else f" (n = {value.n})")


def _columns(rows: list[list[str]]) -> str:
    """Left-aligned columns, two spaces between them."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def best(directory: Path, metric: str, by: list[str], direction: Direction | None) -> str:
    """One line per group: its best setting, the metric's mean with its 95 % interval, the distance from the best."""
    from .. import store

    results = store.load(directory)
    found = best_of(results, metric, by, direction)
    labels = condition_labels({s.cell: s.settings for s in settings_of(results, metric, direction)})
    head = ["setting", f"final {metric}, 95 % interval", "suboptimality"]
    return _columns([head, *([labels[s.cell], _interval(s), f"{s.suboptimality:.6g}"] for s in found)])


def sensitivities(directory: Path, metric: str, rows: str, columns: str, direction: Direction | None) -> str:
    """A table of the best that each pair of values reaches."""
    from .. import store

    found = sensitivity(store.load(directory), metric, rows, columns, direction)
    head = [f"{rows} \\ {columns}", *(value_text(value) for value in found.columns)]
    body = [
        [value_text(value), *(_interval(s) if s is not None else "-" for s in row)]
        for value, row in zip(found.rows, found.table, strict=True)
    ]
    return _columns([head, *body])


def plot(directory: Path, layout: Layout, out: Path, suboptimality: bool) -> Path:
    """Draw a grid of panels from the table into ``out``. Raises :class:`UserError` for a column that does not exist, a
    key with too many values, and a file that cannot be written."""
    from .. import store

    results = store.load(directory)
    arguments = {"--y": layout.y, "--x": layout.x, "--rows": layout.rows, "--columns": layout.columns}
    for argument, key in {**arguments, "--hue": layout.hue}.items():
        if key is not None:
            check_column(results, key, argument)
    frame = _frame(results, layout.y, suboptimality)
    if (many := too_many(frame, (layout.rows, layout.columns, layout.hue))) is not None:
        raise UserError(
            "plot", many, f"a key with at most {MOST} values", hint="choose some with descentlab table --where"
        )
    figure = draw(frame, layout)
    try:
        figure.savefig(out, dpi=200)
    except (OSError, ValueError) as error:
        raise UserError(
            "--out", str(out), f"a file that can be written, ending in .png, .pdf or .svg ({error})"
        ) from None
    return out


def _frame(results: ResultsLike, y: str, suboptimality: bool) -> pl.DataFrame:
    """The last attempts' rows; with ``suboptimality`` the distance of ``y`` from the best value of any run."""
    frame = last_attempts(results.frame)
    if not frame.schema[y].is_numeric():
        raise UserError("--y", y, "a column of numbers")
    if not suboptimality:
        return frame
    finite = frame.filter(pl.col(y).cast(pl.Float64).is_finite())[y]
    if direction_of(y) == "max":
        return frame.with_columns((finite.max() - pl.col(y)).alias(y))
    return frame.with_columns((pl.col(y) - finite.min()).alias(y))
