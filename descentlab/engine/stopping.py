"""Which runs end before their time: a loss that is NaN or too large, or evaluations that no longer improve.

Decisions depend on a run's own rows alone, so a run ends at the same step whatever it is trained beside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..core.errors import UserError
from ..core.state import State
from .program import Slot
from .recorder import Recorder, Scheduled

EARLY, DIVERGED = "early", "diverged"


@dataclass
class Stopping:
    """Watches rows as they are recorded. ``ended``: run -> (its last step, why, in words).

    ``max_loss``: of the step's batch or of any evaluation; None = no such limit. ``patience``: evaluations of the
    column ``watch`` without a better value (an equal one is none) after which a run ends; None = never. ``keep_best``:
    hand the weights of each better evaluation to the recorder.
    """

    max_loss: float | None = None
    patience: int | None = None
    watch: str = ""
    better: Literal["max", "min"] = "min"
    keep_best: bool = False
    ended: dict[str, tuple[int, str, str]] = field(default_factory=dict)  # run -> (step, EARLY or DIVERGED, reason)
    best: dict[str, tuple[float, int]] = field(default_factory=dict)  # run -> (best value, evaluations since)

    def look(
        self,
        slots: Sequence[Slot],
        due: Sequence[int],
        measured: Mapping[str, np.ndarray],
        scheduled: Scheduled,
        state: State,
        recorder: Recorder,
    ) -> None:
        """One recorded step: ``measured`` column -> ``[M]``, ``scheduled`` for the members ``due``."""
        step = int(measured["step"][0])
        if self.max_loss is not None:
            self._limit(slots, step, measured, scheduled, recorder)
        if self.watch and due:
            place = {m: i for i, m in enumerate(due)}
            for m in due:
                value = self._value(m, place[m], measured, scheduled)
                for run in slots[m].runs:
                    if run.id not in self.ended and self._improves(run.id, value, step) and self.keep_best:
                        recorder.keep(f"best-{run.id}.npz", _weights(state, m, value, step))

    def _limit(
        self, slots: Sequence[Slot], step: int, measured: Mapping[str, np.ndarray], scheduled: Scheduled, to: Recorder
    ) -> None:
        assert self.max_loss is not None
        losses: dict[str, tuple[Sequence[int], np.ndarray]]
        losses = {name: (range(len(slots)), v) for name, v in measured.items() if name.endswith("loss")}
        losses |= {name: found for name, found in scheduled.items() if "_loss" in name}
        for name, (members, found) in losses.items():
            for m, value in zip(members, found.tolist(), strict=True):
                if not value <= self.max_loss:
                    for run in slots[m].runs:
                        reason = f"{name} = {value:.6g} at step {step}, more than max_loss = {self.max_loss:g}"
                        self.ended.setdefault(run.id, (step, DIVERGED, reason))
                        to.diverged.setdefault(run.id, step)

    def _value(self, m: int, place: int, measured: Mapping[str, np.ndarray], scheduled: Scheduled) -> float:
        if self.watch in measured:
            return float(measured[self.watch][m])
        if self.watch not in scheduled or scheduled[self.watch][1].ndim > 1:
            raise UserError("watch", self.watch, f"one of {', '.join([*scheduled, *measured])}")
        return float(scheduled[self.watch][1][place])

    def _improves(self, run: str, value: float, step: int) -> bool:
        worst = -math.inf if self.better == "max" else math.inf
        best, since = self.best.get(run, (worst, 0))
        improved = value > best if self.better == "max" else value < best
        self.best[run] = (value, 0) if improved else (best, since + 1)
        if self.patience is not None and self.best[run][1] >= self.patience:
            text = f"stopped after step {step}: {self.watch} no better than {best:.6g} in {self.patience} evaluations"
            self.ended[run] = (step, EARLY, text)
        return improved

    def left(self, slots: Sequence[Slot]) -> tuple[Slot, ...]:
        """The members with the runs that go on; those without any are gone."""
        if not self.ended:
            return tuple(slots)
        kept = [(slot, tuple(run for run in slot.runs if run.id not in self.ended)) for slot in slots]
        return tuple(slot if runs == slot.runs else replace(slot, runs=runs) for slot, runs in kept if runs)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "ended": {k: list(v) for k, v in self.ended.items()},
            "best": {k: list(v) for k, v in self.best.items()},
        }

    def load(self, held: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.ended = {run: (int(v[0]), str(v[1]), str(v[2])) for run, v in held.get("ended", {}).items()}
        self.best = {run: (float(v[0]), int(v[1])) for run, v in held.get("best", {}).items()}


def _weights(state: State, m: int, value: float, step: int) -> dict[str, np.ndarray]:
    """Arrays of one member: ``params/NAME``, ``buffers/NAME``, averages alike, and where and how good it was."""
    trees = {"params": state.params, "buffers": state.buffers}
    trees |= {f"average/{part}": tree for part, tree in state.server.get("average", {}).items()}
    arrays = {
        f"{part}/{n}": t[m].detach().cpu().numpy().copy() for part, tree in trees.items() for n, t in tree.items()
    }
    return {**arrays, "step": np.array(step), "value": np.array(value)}
