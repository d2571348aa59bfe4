"""Rows of measurements, one per (run, step, attempt), gathered as arrays until they are written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from ..core.protocols import Hit
from .program import RunPlan, Slot

Scheduled = Mapping[str, tuple[Sequence[int], np.ndarray]]  # column -> (members that have a value, their values)


@dataclass(frozen=True)
class _Expansion:
    """The rows of one step: members in order, each once per run it carries."""

    slots: Sequence[Slot]
    runs: pl.Series  # names, one per row
    member: np.ndarray | None  # of each row; None where every member carries one run

    @classmethod
    def of(cls, slots: Sequence[Slot]) -> _Expansion:
        runs = [run.id for slot in slots for run in slot.runs]
        member = np.repeat(np.arange(len(slots)), [len(slot.runs) for slot in slots])
        return cls(slots, pl.Series("run", runs, dtype=pl.String), member if len(runs) > len(slots) else None)

    @cached_property
    def count(self) -> int:
        """How many rows."""
        return len(self.runs)

    def rows(self, values: np.ndarray) -> np.ndarray:
        """One value per row from one per member."""
        return values if self.member is None else values[self.member]


@dataclass(frozen=True)
class _Step:
    """What one step gave: ``measured`` column -> ``[M]``, ``scheduled`` as above, the wall time."""

    rows: _Expansion
    measured: Mapping[str, np.ndarray]
    scheduled: Scheduled
    wall_s: float

    def of(self, runs: Sequence[str]) -> _Step:
        """The rows of some runs alone."""
        chosen = self.rows.runs.is_in(list(runs))
        member = self.rows.rows(np.arange(len(self.rows.slots)))
        rows = _Expansion(self.rows.slots, self.rows.runs.filter(chosen), member[chosen.to_numpy()])
        return _Step(rows, self.measured, self.scheduled, self.wall_s)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Values of all rows and, unless all have one, which have; None for a column this step has not."""
        if name in self.measured:
            return self.rows.rows(self.measured[name]), None
        if name not in self.scheduled:
            return None
        members, found = self.scheduled[name]
        if len(members) == len(self.rows.slots):  # they are in order: all of them
            return self.rows.rows(found), None
        values, held = np.zeros(len(self.rows.slots), found.dtype), np.zeros(len(self.rows.slots), bool)
        values[members], held[members] = found, True
        return self.rows.rows(values), self.rows.rows(held)


@dataclass
class Recorder:
    """Buffers what happened since the last flush; ``clock_s`` is the (volatile) wall time of the block so far.

    ``diverged``: run -> first step with a non-finite loss or weight, among the rows that were flushed.
    """

    clock_s: float = 0.0
    diverged: dict[str, int] = field(default_factory=dict)
    _steps: list[_Step] = field(default_factory=list)
    _rows: int = 0
    _expansion: _Expansion = field(default_factory=lambda: _Expansion.of(()))
    _hits: list[dict[str, Any]] = field(default_factory=list)
    _scenes: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        return self.clock_s + time.monotonic() - self._started

    def rows(self, slots: Sequence[Slot], measured: Mapping[str, np.ndarray], scheduled: Scheduled) -> None:
        """``measured``: column -> ``[M]``, ``step`` among them; ``scheduled``: null for the members not in it. The
        arrays are kept, not copied."""
        if slots is not self._expansion.slots:
            self._expansion = _Expansion.of(slots)
        self._steps.append(_Step(self._expansion, measured, scheduled, self.now()))
        self._rows += self._expansion.count

    def absorb(self, other: Recorder, runs: Sequence[str]) -> None:
        """Take over the rows and hits of ``runs`` that ``other`` holds."""
        for step in other._steps:
            self._steps.append(step.of(runs))
            self._rows += self._steps[-1].rows.count
        self._hits += [hit for hit in other._hits if hit["run"] in runs]

    def hit(self, slot: Slot, hit: Hit) -> None:
        """One line of hits.jsonl for every run of the member that was hit."""
        for run in slot.runs:
            self._hits.append(_hit_line(run, hit))

    def event(self, run: RunPlan, hit: Hit) -> None:
        """One line of hits.jsonl for an event, at its first step, whether it could be ``applied`` or not and why;
        ``activations``: on how many steps of the run it is due."""
        due = len(hit.planned.steps(run.stop)) if hit.applied else 0
        line = {**_hit_line(run, hit), "applied": hit.applied, "activations": due, "elements": hit.elements}
        self._hits.append({**line, **({"tensor": hit.tensor} if hit.applied else {"reason": hit.reason})})

    def scene(self, slot: Slot, arrays: dict[str, np.ndarray]) -> None:
        """Keep what is needed to replay the hit of this member elsewhere."""
        self._scenes.update({f"hit-{run.id}.npz": arrays for run in slot.runs})

    def keep(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Store these arrays as a file of this name; of several the last ones."""
        self._scenes[name] = arrays

    def scenes(self) -> dict[str, dict[str, np.ndarray]]:
        """File name -> arrays to store in it, since the last call."""
        scenes, self._scenes = self._scenes, {}
        return scenes

    @property
    def evaluated(self) -> bool:
        """Whether the last recorded step is one of an evaluation."""
        return bool(self._steps and self._steps[-1].scheduled)

    def flush(self) -> tuple[dict[str, pl.Series], list[dict[str, Any]]]:
        """Columns and hits since the last flush; the buffers are empty afterwards. Missing values are null."""
        steps, hits = self._steps, self._hits
        self._steps, self._hits, self._rows = [], [], 0
        if not steps:
            return {}, hits
        names = dict.fromkeys(name for step in steps for name in (*step.measured, *step.scheduled))
        columns = {"run": pl.concat([step.rows.runs for step in steps])}
        columns |= {name: _joined(name, steps) for name in names}
        walls = np.repeat([step.wall_s for step in steps], [step.rows.count for step in steps])
        columns["wall_s"] = pl.Series("wall_s", walls)
        self._note_diverged(columns)
        return columns, hits

    def _note_diverged(self, columns: Mapping[str, pl.Series]) -> None:
        if "rewound" not in columns and _all_finite(columns):
            return
        bad = np.zeros(len(columns["run"]), bool)
        if "train_loss" in columns:
            bad |= ~np.isfinite(columns["train_loss"].fill_null(0.0).to_numpy()) & ~_mended(columns, len(bad))
        if "nonfinite_params" in columns:
            bad |= columns["nonfinite_params"].fill_null(0).to_numpy() > 0
        back = columns["rewound"].fill_null(-1).to_numpy() if "rewound" in columns else np.full(len(bad), -1)
        for row in np.flatnonzero(bad | (back > 0)):
            run, step = columns["run"][int(row)], int(columns["step"][int(row)])
            if back[row] > 0:  # what came of the undone steps does not count
                if self.diverged.get(run, -1) > step - back[row]:
                    del self.diverged[run]
            else:
                self.diverged.setdefault(run, step)

    def __len__(self) -> int:
        return self._rows


def _all_finite(columns: Mapping[str, pl.Series]) -> bool:
    """Whether no loss and no weight was anything else; one pass over each column. May be wrong in saying no."""
    loss = columns["train_loss"].sum() if "train_loss" in columns else 0.0
    return bool(np.isfinite(float(loss))) and not ("nonfinite_params" in columns and columns["nonfinite_params"].sum())


def _mended(columns: Mapping[str, pl.Series], rows: int) -> np.ndarray:
    """The rows on which a recovery arm acted: their loss is that of an update it took back or repaired."""
    if "action" not in columns:
        return np.zeros(rows, bool)
    return (columns["action"].fill_null("accepted") != "accepted").to_numpy()


def _joined(name: str, steps: Sequence[_Step]) -> pl.Series:
    """One column over all rows of all steps."""
    found = [step.column(name) for step in steps]
    if all(part is not None and part[1] is None for part in found):
        return pl.Series(name, np.concatenate([part[0] for part in found if part is not None]))
    rows = sum(step.rows.count for step in steps)
    values = np.zeros(rows, np.result_type(*{part[0].dtype for part in found if part is not None}))
    held, last = np.zeros(rows, bool), 0
    for part, step in zip(found, steps, strict=True):
        first, last = last, last + step.rows.count
        if part is not None:
            values[first:last], held[first:last] = part[0], True if part[1] is None else part[1]
    column = pl.Series(name, values)
    return column.zip_with(pl.Series(held), pl.Series([None], dtype=column.dtype))


def _hit_line(run: RunPlan, hit: Hit) -> dict[str, Any]:
    """What hits.jsonl says of a perturbation that one run met; ``store`` adds the optimizer."""
    p = hit.planned
    return {
        "case": p.case,
        "run": run.id,
        "replicate": run.replicate,
        "step": p.step,
        "site": f"{p.site.direction}/{p.site.operand}",
        "layer": p.site.layer,
        "rule": dict(p.rule),
        "index": list(p.index if hit.index is None else hit.index),
        "old": list(hit.old),
        "new": list(hit.new),
    }
