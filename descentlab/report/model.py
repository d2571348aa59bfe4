"""The report as data: what a study's ``build`` returns and what the renderers take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SummaryItem:
    """One number with its replicates, interval and how the interval was made; undefined parts are None."""

    value: float | None
    n: int
    low: float | None
    high: float | None
    method: str


@dataclass(frozen=True)
class Verdict:
    """One line a hurried reader may stop at, and the numbers behind it."""

    text: str
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """A table column: its head (with the unit), a Python format for numbers, and an explanation shown on hover."""

    name: str
    format: str = ""
    help: str = ""


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class TableBlock:
    """Rows of plain values or :class:`SummaryItem`; None is shown as a dash."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {list(row)!r}: expected {len(self.columns)} cells")


@dataclass(frozen=True)
class FigureBlock:
    """A matplotlib figure; ``name`` becomes the file name, ``caption`` states n and intervals, ``alt`` the content."""

    name: str
    figure: Figure
    caption: str
    alt: str


Block = Paragraph | TableBlock | FigureBlock


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """A whole report. ``failures`` without rows means that no run failed; ``contrasts`` are the planned ones.

    Shown in this order: question, failures, contrasts, verdicts, sections, provenance and the command to reproduce.
    """

    title: str
    question: str
    verdicts: Sequence[Verdict]
    sections: Sequence[Section] = ()
    summary: Mapping[str, SummaryItem] = field(default_factory=dict)
    failures: TableBlock = TableBlock((Column("run"),), ())
    provenance: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    contrasts: TableBlock | None = None
    runs: int = 0  # how many runs the statistics cover
    notes: Sequence[str] = field(default_factory=tuple)  # what a reader must know first, such as unfinished runs
    pdf: bool = True  # False: figures as PNG only, which halves the time of writing

    def write(self, target: Path | str) -> Path:
        """Write index.html, report.md, summary.json and figures/ into the folder ``target``; returns index.html."""
        from .render import write_report

        return write_report(self, Path(target))

    def figures(self) -> list[FigureBlock]:
        """Every figure in the order shown."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, FigureBlock)]

    def failure_line(self) -> str:
        """One sentence on what failed."""
        failed = len(self.failures.rows)
        of = f" of {self.runs}" if self.runs else ""
        if not failed:
            return f"No run failed (0{of} runs)." if of else "No run failed."
        return f"{failed}{of} runs failed. {self.failures.caption}".strip()


DASH = "\u2013"


def number_text(value: float, spec: str = "") -> str:
    """A number for people: ``spec`` applied to finite ones, NaN and infinities by name, booleans as yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("+inf" if value > 0 else "-inf")
    return format(value, spec)


def cell_text(value: Any, column: Column) -> str:
    """A table cell as text: ``0.12 [0.01, 0.23]`` for a summary item."""
    if value is None:
        return DASH
    if isinstance(value, SummaryItem):
        if value.value is None:
            return DASH
        text = number_text(value.value, column.format)
        if value.low is None or value.high is None:
            return text
        return f"{text} [{number_text(value.low, column.format)}, {number_text(value.high, column.format)}]"
    if isinstance(value, (bool, int, float)):
        return number_text(value, column.format)
    return str(value)


def sort_key(value: Any) -> str | float | None:
    """What a table sorts a cell by: its number, else its text; None sorts last."""
    if isinstance(value, SummaryItem):
        return sort_key(value.value)
    if isinstance(value, (bool, int, float)):
        return None if math.isnan(value) else float(value)
    return value if value is None else str(value)


def flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) lines for the provenance table."""
    lines: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            lines += flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            lines.append((f"{prefix}{key}", " ".join(str(item) for item in value)))
        else:
            lines.append((f"{prefix}{key}", str(value)))
    return lines
