"""When a step is measured, and how its measurements become rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.protocols import Measured
from .parts import Parts
from .program import Slot
from .recorder import Recorder


class Measuring:
    """Asks the observables of a block and hands what they give to the recorder."""

    def __init__(self, parts: Parts, recorder: Recorder) -> None:
        self.parts, self.recorder = parts, recorder
        self.slots: tuple[Slot, ...] = ()
        needs: set[str] = set().union(*(o.needs for o in parts.observables))
        self.needs_before = "update" in needs  # a copy of the weights before the update

    def bind(self, slots: tuple[Slot, ...]) -> None:
        """The members are now ``slots``."""
        self.slots = slots
        self._by_schedule: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for m, slot in enumerate(slots):
            self._by_schedule.setdefault(slot.schedule, []).append(m)

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

    def record(self, step: int, m: Measured, due: Sequence[int]) -> None:
        """One row per run; scheduled observables only for the members ``due``."""
        clock = m.state.clock
        row = {k: clock[k] for k in ("attempt", "epoch", "samples", "virtual_s", "bytes_sent")}
        row["step"] = torch.full_like(clock["step"], step)
        for observable in self.parts.observables:
            row.update(observable.measure(m))
        self.recorder.rows(self.slots, row, self._scheduled(m, due) if due else {})

    def _scheduled(self, m: Measured, due: Sequence[int]) -> dict[str, dict[int, float]]:
        """Column -> {member: value} of the observables that need an evaluation."""
        part, test = m.state.take(due), self.parts.test

        def evaluate(x: Tensor = test[0], y: Tensor = test[1]) -> tuple[Tensor, Tensor]:
            return self.parts.evaluator.evaluate(part, x, y)

        loss, accuracy, lr = (t[list(due)] for t in (m.loss, m.accuracy, m.lr))
        look = Measured(part, {}, loss, accuracy, lr, None, evaluate, test)
        return {
            name: dict(zip(due, values.tolist(), strict=True))
            for observable in self.parts.on_schedule
            for name, values in observable.measure(look).items()
        }
