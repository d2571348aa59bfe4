"""Rows of measurements, one per (run, step, attempt), gathered as columns until they are written."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..core.protocols import Hit
from .program import Slot


@dataclass
class Recorder:
    """Buffers what happened since the last flush; ``clock_s`` is the (volatile) wall time of the block so far."""

    clock_s: float = 0.0
    diverged: dict[str, int] = field(default_factory=dict)  # run -> first step with a non-finite loss or weight
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _hits: list[dict[str, Any]] = field(default_factory=list)
    _scenes: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        return self.clock_s + time.monotonic() - self._started

    def rows(self, slots: Sequence[Slot], measured: dict[str, Tensor], scheduled: dict[str, dict[int, float]]) -> None:
        """``measured``: column -> ``[M]``; ``scheduled``: column -> {member: value}, null for the members not in it."""
        columns = {k: v.tolist() for k, v in measured.items()}
        wall = self.now()
        for m, slot in enumerate(slots):
            row = {k: v[m] for k, v in columns.items()}
            row.update({k: v[m] for k, v in scheduled.items() if m in v})
            row["wall_s"] = wall
            if not math.isfinite(row.get("train_loss", 0.0)) or row.get("nonfinite_params"):
                for run in slot.runs:
                    self.diverged.setdefault(run.id, row["step"])
            self._rows.extend({"run": run.id, **row} for run in slot.runs)

    def hit(self, slot: Slot, hit: Hit) -> None:
        """One line of hits.jsonl for every run of the member that was hit."""
        p = hit.planned
        for run in slot.runs:
            self._hits.append(
                {
                    "case": p.case,
                    "run": run.id,
                    "replicate": run.replicate,
                    "step": p.step,
                    "site": f"{p.site.direction}/{p.site.operand}",
                    "layer": p.site.layer,
                    "rule": dict(p.rule),
                    "index": list(p.index),
                    "old": list(hit.old),
                    "new": list(hit.new),
                }
            )

    def scene(self, slot: Slot, arrays: dict[str, np.ndarray]) -> None:
        """Keep what is needed to replay the hit of this member elsewhere."""
        self._scenes.update({run.id: arrays for run in slot.runs})

    def scenes(self) -> dict[str, dict[str, np.ndarray]]:
        """Run -> arrays of its hit, since the last call."""
        scenes, self._scenes = self._scenes, {}
        return scenes

    def flush(self) -> tuple[dict[str, list[Any]], list[dict[str, Any]]]:
        """Columns and hits since the last flush; the buffers are empty afterwards. Missing values are None."""
        names = list(dict.fromkeys(k for row in self._rows for k in row))
        columns = {k: [row.get(k) for row in self._rows] for k in names}
        hits, self._rows, self._hits = self._hits, [], []
        return columns, hits

    def __len__(self) -> int:
        return len(self._rows)
