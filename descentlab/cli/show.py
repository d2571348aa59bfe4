"""What the commands print: a table on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from ..config.yaml12 import inline
from ..core.errors import UserError, nearest

if TYPE_CHECKING:
    from ..config.resolve import Resolved, Setting
    from ..store import Status


def _written(row: Setting) -> str:
    """A setting's value as it would be typed after ``key=``."""
    return ",".join(inline(value) for value in row.value) if row.axis else inline(row.value)


def settings(resolved: Resolved) -> None:
    """The effective settings, what the study has by default marked as such."""
    rows = resolved.effective()
    if sys.stdout.isatty():
        _settings_table(rows)
    else:
        for row in rows:
            marks = [mark for mark, on in (("grid", row.axis), ("default", row.is_default)) if on]
            typer.echo(f"{row.key} = {_written(row)}" + (f"  ({', '.join(marks)})" if marks else ""))
    cells, count = len(resolved.cells), len(resolved.runs)
    typer.echo(f"{count} {'run' if count == 1 else 'runs'} in {cells} {'cell' if cells == 1 else 'cells'}")


def _settings_table(rows: list[Setting]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        style = "dim" if row.is_default else "bold"
        mark = "grid" * row.axis + ", " * (row.axis and row.is_default) + "default" * row.is_default
        drawn.add_row(Text(row.key, style), Text(_written(row), style), Text(mark, "dim"))
    Console().print(drawn)


def notes(resolved: Resolved) -> None:
    """What the user should know before anything runs."""
    for note in resolved.notes:
        typer.echo(f"note: {note}")


def runs(resolved: Resolved) -> None:
    """One line per run: id, cell, replicate, role, and what differs between cells."""
    from ..config.schema import flatten

    flat = [flatten(cell) for cell in resolved.cells]
    for run in resolved.runs:
        cell = flat[run.cell]
        differing = [f"{key}={inline(cell[key])}" for key in resolved.varying if key in cell]
        head = f"{run.id} cell={run.cell} replicate={run.replicate} role={run.role}"
        typer.echo(" ".join([head, *(f"{key}={inline(value)}" for key, value in run.labels.items()), *differing]))


def layers(resolved: Resolved) -> None:
    """Layers that the fault of a cell can hit, with commas between them, one line per different list."""
    from ..launch.prepare import layers_of

    for line in dict.fromkeys(",".join(layers_of(cell)) for cell in resolved.cells):
        typer.echo(line)


def status(state: Status) -> None:
    """Counts first, then one line for each block that is not done and each run that failed or diverged."""
    counts = ", ".join(f"{count} {name}" for name, count in state.counts().items()) or "no runs"
    share, left = state.progress(), state.left_s()
    parts = [f"{100 * share:.0f} %"] if share is not None and set(state.counts()) - {"done"} else []
    if left is not None:
        parts.append(f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left")
    typer.echo(", ".join([f"{state.study}: {counts}", *parts]))
    for block in state.blocks:
        if block.state != "done":
            steps = f"{block.steps}/{block.total} steps" if block.total else f"{block.steps} steps"
            _line("block", block.key, block.state, steps, block.message)
    for run in state.runs:
        if run.state in ("failed", "diverged"):
            _line("run", run.run, run.state, f"{run.steps} steps", run.message)


def _line(*words: Any) -> None:
    typer.echo(" ".join(str(word) for word in words if word))


def choices(kind: str) -> None:
    """What there is of one kind, with defaults, said once where neighbours have the same. The name comes first on a
    line, what is indented belongs to it."""
    from ..config import rooms

    known = [*rooms.kinds(), "studies"]
    if kind == "studies":
        _studies()
        return
    if kind not in known:
        raise UserError("KIND", kind, f"one of {', '.join(known)}", hint=nearest(kind, known))
    entries = rooms.entries(kind)
    width = max(len(entry.name) for entry in entries)
    before = ""
    for entry in entries:
        of = f"{entry.key}: " if kind == "workloads" else ""
        defaults = ", ".join(f"{key} = {inline(v)}" for key, v in entry.defaults.items())
        if kind == "observables":  # one schedule for many: no line of its own
            typer.echo(f"{entry.name:<{width}}  {entry.summary} ({defaults})")
            continue
        typer.echo(f"{entry.name:<{width}}  {of}{entry.summary}")
        if defaults:
            typer.echo(" " * (width + 2) + ("same settings" if defaults == before else defaults))
        before = defaults


def _studies() -> None:
    from ..studies import registry

    width = max(len(name) for name in registry.names())
    for name in registry.names():
        study = registry.find(name)
        typer.echo(f"{name:<{width}}  {study.question}")
        typer.echo(f"{'':<{width}}  preset = {', '.join(study.presets)}; size = {', '.join(study.sizes)}")
