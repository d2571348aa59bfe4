"""Plain (stochastic) gradient descent of one model: what theta* is found with, and the control.

The engine does the same, to the bit, at five times the cost of a step: it keeps clocks, slots and forks for an
ensemble, and here a hundred thousand steps are made with one small model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ...core.protocols import Selection
from ...core.state import State
from ...core.tree import Tree
from ...engine.work import VmapWork
from .program_pull import Pull

HELD = 5000  # rows before they are written


class Descent:
    """``steps`` updates p -= lr g from the bench's last checkpoint, or from ``start``.

    ``state`` has one member. Rows: training loss of the step's batch and the gradient's norm every ``every`` steps, the
    test set every ``evaluate_every`` and at the end.
    """

    def __init__(
        self,
        bench: Any,
        parts: Any,
        lr: float,
        steps: int,
        *,
        every: int,
        evaluate_every: int,
        start: Mapping[str, Any],
        pull: Pull | None = None,
    ) -> None:
        self.bench, self.parts, self.lr, self.steps = bench, parts, lr, steps
        self.every, self.evaluate_every, self.step, self.lost = every, evaluate_every, 0, -1
        self.own: Tree = {}
        work = parts.single if isinstance(parts.many, VmapWork) else parts.many  # one member needs no vmap
        self._work = pull.on(work) if pull is not None else work
        params, buffers = start["params"], start["buffers"]
        if bench.saved is not None:
            held, self.step = bench.saved
            params, buffers, self.own, self.lost = held["params"], held["buffers"], held["own"], held["lost"]
        self.state = State.start(params, buffers)
        self._rows: dict[str, list[Any]] = {}

    def run(self, after: Callable[[int, State], None] | None = None, own: Callable[[], Tree] = dict) -> None:
        """To the end; ``after(updates made, state)`` is called each time, ``own`` is checkpointed as :attr:`own`."""
        due = time.monotonic() + self.bench.cell.checkpoint_s
        while self.step < self.steps:
            self._update()
            if after is not None:
                after(self.step, self.state)
            stopping = self.bench.stop()
            if stopping or time.monotonic() >= due:
                self._write()
                held = {"params": self.state.params, "buffers": self.state.buffers, "own": own(), "lost": self.lost}
                self.bench.checkpoint(held, self.step)
                due = time.monotonic() + self.bench.cell.checkpoint_s
            elif len(self._rows.get("step", ())) >= HELD:
                self._write()
            self.bench.advance()
        self._write()

    def diverged(self) -> dict[str, int]:
        """Run id -> first recorded step that is not finite."""
        return {} if self.lost < 0 else {self.bench.runs[0]: self.lost}

    def _update(self) -> None:
        state, at = self.state, np.array([self.step])
        replicate = np.array(self.bench.replicates[:1])
        index = torch.from_numpy(self.parts.sampler.indices(replicate, np.zeros(1, dtype=np.int64), at))
        found = self._work.work(state, Selection(self.parts.train, index.to(self.parts.train[0].device)), None)
        last = self.step + 1 == self.steps
        if self.step % self.every == 0 or last:
            self._record(found)
        for name, p in state.params.items():
            p.add_(found.grads[name], alpha=-self.lr)
        for name, b in found.buffers.items():
            state.buffers[name].copy_(b)
        self.step += 1
        if last or (self.evaluate_every and self.step % self.evaluate_every == 0):
            self._evaluate()

    def _record(self, found: Any) -> None:
        norm = torch.sqrt(sum((g.double().square().sum() for g in found.grads.values()), torch.zeros(())))
        loss, accuracy = float(found.loss[0]), float(found.accuracy[0])
        values: dict[str, float | None] = {"step": self.step, "train_loss": loss, "train_accuracy": accuracy}
        values |= {"grad_norm": float(norm), "lr": self.lr, "test_loss": None, "test_accuracy": None}
        if self.lost < 0 and not np.isfinite([loss, float(norm)]).all():
            self.lost = self.step
        for name, value in values.items():
            self._rows.setdefault(name, []).append(value)

    def _evaluate(self) -> None:
        """Onto the row of the step just made, or a row of its own."""
        loss, accuracy = self.parts.evaluator.evaluate(self.state, *self.parts.test)
        if not self._rows.get("step") or self._rows["step"][-1] != self.step - 1:
            empty = dict.fromkeys(self._rows or ("step", "train_loss", "train_accuracy", "grad_norm", "lr"))
            for name, value in {**empty, "step": self.step - 1, "lr": self.lr}.items():
                self._rows.setdefault(name, []).append(value)
            self._rows.setdefault("test_loss", [None])
            self._rows.setdefault("test_accuracy", [None])
        self._rows["test_loss"][-1], self._rows["test_accuracy"][-1] = float(loss[0]), float(accuracy[0])

    def _write(self) -> None:
        if self._rows.get("step"):
            self.bench.rows(self._rows)
        self._rows = {}
