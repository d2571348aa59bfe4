"""When a step is measured, and how its measurements become rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.flat import base_of, split
from ..core.protocols import Measured
from ..core.state import State
from ..core.tree import Tree, clone
from .parts import Parts
from .program import Slot
from .recorder import Recorder, Scheduled


class Measuring:
    """Asks the observables of a block and hands what they give to the recorder."""

    def __init__(self, parts: Parts, recorder: Recorder) -> None:
        self.parts, self.recorder = parts, recorder
        self.slots: tuple[Slot, ...] = ()
        needs: set[str] = set().union(*(o.needs for o in parts.observables))
        self._needs_before = "update" in needs
        self._before: Tree = {}
        self._base: Tensor | None = None  # of it, where the weights lie side by side

    def bind(self, slots: tuple[Slot, ...]) -> None:
        """The members are now ``slots``."""
        self.slots = slots
        self._by_schedule: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for m, slot in enumerate(slots):
            self._by_schedule.setdefault(slot.schedule, []).append(m)

    def before(self, params: Tree) -> Tree | None:
        """A copy of the weights before the update, good until the next call; None if no observable asks for it."""
        if not self._needs_before:
            return None
        base = base_of(params)
        if base is not None:
            if self._base is None or self._base.shape != base.shape or self._before.keys() != params.keys():
                self._base = torch.empty_like(base)
                self._before = split(self._base, params)
            self._base.copy_(base)
            return self._before
        held, self._base = list(self._before.values()), None
        if [t.shape for t in held] == [p.shape for p in params.values()]:
            torch._foreach_copy_(held, list(params.values()))
        else:
            self._before = clone(params)
        return self._before

    def due(self, step: int) -> list[int]:
        """The members whose evaluation falls on this step, in order."""
        found = [
            members
            for schedule, members in self._by_schedule.items()
            if any(self._evaluation_due(step, stop, anchor) for stop, anchor in schedule)
        ]
        return sorted(m for members in found for m in members)

    def _evaluation_due(self, step: int, stop: int, anchor: int) -> bool:
        every = self.parts.evaluate_every
        return step == stop - 1 or (every > 0 and (step - anchor) % every == 0)

    def record(self, step: int, m: Measured, due: Sequence[int], alarms: Scheduled) -> None:
        """One row per run; scheduled observables only for the members ``due``, ``alarms`` for those that have one."""
        found, scheduled = self._per_step(step, m), self._scheduled(m, due) if due else {}
        self.recorder.rows(self.slots, found, {**scheduled, **alarms})
        if self.parts.stopping is not None:
            self.parts.stopping.look(self.slots, due, found, scheduled, m.state, self.recorder)

    def record_alarms(self, step: int, m: Measured, alarms: Scheduled) -> None:
        """Rows for the members in alarm alone, on a step that is not recorded otherwise."""
        members = list(next(iter(alarms.values()))[0])
        found = {name: values[members] for name, values in self._per_step(step, m).items()}
        places = list(range(len(members)))
        rows = {name: (places, values) for name, (_, values) in alarms.items()}
        self.recorder.rows(tuple(self.slots[i] for i in members), found, rows)

    def _per_step(self, step: int, m: Measured) -> dict[str, np.ndarray]:
        clock = m.state.clock
        found = {k: _array(clock[k]) for k in ("attempt", "epoch", "samples", "virtual_s", "bytes_sent")}
        found["step"] = np.full(len(self.slots), step)
        found.update({k: _array(v) for k, v in m.late.items()})
        for observable in self.parts.observables:
            found.update({k: _array(v) for k, v in observable.measure(m).items()})
        return found

    def _looked_at(self, state: State) -> State:
        """What evaluations look at: not the optimizer's slots, unless somebody else's observable does."""
        if all(getattr(o, "weights_only", False) for o in self.parts.on_schedule):
            return State({**state.server, "slots": {}}, clock=state.clock)
        return state

    def _scheduled(self, m: Measured, due: Sequence[int]) -> dict[str, tuple[Sequence[int], np.ndarray]]:
        """Column -> (members, values) of the observables that need an evaluation."""
        part, test, everyone = m.state, self.parts.test, len(due) == len(self.slots)
        some = getattr(self.parts.evaluator, "evaluate_some", None)
        if everyone or some is None or not all(getattr(o, "only_evaluates", False) for o in self.parts.on_schedule):
            part, some = part if everyone else self._looked_at(part).take(due), None

        def evaluate(x: Tensor = test[0], y: Tensor = test[1]) -> tuple[Tensor, Tensor]:
            return some(part, due, x, y) if some is not None else self.parts.evaluator.evaluate(part, x, y)

        loss, accuracy, lr = (t[list(due)] for t in (m.loss, m.accuracy, m.lr))
        look = Measured(part, {}, loss, accuracy, lr, None, evaluate, test)
        return {
            name: (due, _array(values))
            for observable in self.parts.on_schedule
            for name, values in observable.measure(look).items()
        }


def _array(t: Tensor) -> np.ndarray:
    """A copy on the CPU, of a type that numpy has too."""
    if t.dtype in (torch.bfloat16, torch.float16):
        t = t.float()
    return (t if t.device.type == "cpu" else t.cpu()).detach().numpy().copy()
