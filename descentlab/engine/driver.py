"""The loop all engines share: fork, draw, work, exchange, apply, measure. One turn = one server update.

Engines differ in one thing, which versions of the weights the workers of an update had read; see
:mod:`descentlab.engine.lockstep` and :mod:`descentlab.engine.virtual`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.opmode import Ops
from ..core.protocols import Grads, Mean, Measured, Selection
from ..core.state import State
from ..core.tree import Tree, clone, stack, tree_map
from .hits import Hits
from .measuring import Measuring
from .parts import Parts
from .program import BlockPlan, Slot, parents
from .recorder import Recorder


@dataclass
class Round:
    """One server update: contributing workers and the versions they had read, ``[M, K]`` each; its virtual time."""

    workers: np.ndarray
    versions: np.ndarray
    time_s: np.ndarray


@dataclass
class Progress:
    """Where a block stands after an update."""

    step: int
    member_steps: int
    recorder: Recorder
    state: State


@dataclass
class Engine(ABC):
    """Runs one block. ``state`` and ``step`` are all that a checkpoint has to hold beside the plan."""

    plan: BlockPlan
    parts: Parts
    state: State = field(default=None)  # type: ignore[assignment]
    step: int = 0
    recorder: Recorder = field(default_factory=Recorder)

    def __post_init__(self) -> None:
        self.hits = Hits(self.parts, self.recorder)
        self.measuring = Measuring(self.parts, self.recorder)
        self.slots = self.plan.slots(max(self.step - 1, 0))  # as they were when the state was saved
        if self.state is None:
            self.state = self.initial_state()

    def initial_state(self) -> State:
        """Members in slot order, each initialised from its replicate's stream."""
        fresh = [self.parts.fresh(slot.replicate) for slot in self.slots]
        params, buffers = stack([p for p, _ in fresh]), stack([b for _, b in fresh])
        state = State.start(params, buffers)
        members, workers = len(self.slots), self.parts.workers
        memory, shared = self.parts.compressor.start(params, workers, self.parts.streams, self.replicates)
        worker: Tree = {"cursor": torch.zeros(members, workers, dtype=torch.int64), "memory": memory}
        if workers > 1:
            worker["buffers"] = tree_map(lambda b: b.unsqueeze(1).repeat(1, workers, *[1] * (b.dim() - 1)), buffers)
        return State(state.server, worker, shared, state.clock)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The members as they stand now."""
        return self._slots

    @slots.setter
    def slots(self, slots: tuple[Slot, ...]) -> None:
        self._slots = slots
        self.replicates = np.array([slot.replicate for slot in slots], dtype=np.int64)
        self._base_rates = [slot.lr for slot in slots]
        self.measuring.bind(slots)

    @abstractmethod
    def round(self) -> Round:
        """Who contributes to update ``self.step``, at which versions."""

    @abstractmethod
    def view(self, versions: np.ndarray) -> Tree:
        """The parameters ``[M, …]`` of the given version of each member ``[M]``."""

    def after_update(self) -> None:  # noqa: B027  (a hook, not every engine needs it)
        """Called when the parameters have moved to version ``self.step + 1``."""

    def on_fork(self, chosen: Sequence[int]) -> None:  # noqa: B027  (a hook)
        """Called when the members became copies of the ``chosen`` old ones."""

    def run(self) -> Iterator[Progress]:
        """One item per update, until every run has stopped."""
        while self.step < self.plan.stop:
            self._fork()
            yield self._update()

    def _fork(self) -> None:
        if self.step not in self.plan.changes:
            return
        slots = self.plan.slots(self.step)
        if slots != self.slots:
            chosen = parents(self.slots, slots)
            self.slots, self.state = slots, self.state.take(chosen)
            self.on_fork(chosen)

    def _update(self) -> Progress:
        state, now = self.state, self.round()
        contributions = [self._work(now, k) for k in range(now.workers.shape[1])]
        due = self.measuring.due(self.step)
        recording = bool(due) or self.step % self.parts.every == 0
        before = clone(state.params) if self.measuring.needs_before and recording else None
        grads = self._exchange(now, [g.grads for g in contributions])
        lr = self._rates()
        self.parts.optimizer.apply(state, grads, lr)
        self._put_buffers(now, [g.buffers for g in contributions])
        self.after_update()
        loss = torch.stack([g.loss for g in contributions]).mean(0)
        accuracy = torch.stack([g.accuracy for g in contributions]).mean(0)
        self._advance(now)
        if recording:
            self.measuring.record(self.step, Measured(state, grads, loss, accuracy, lr, before, None), due)
        self.step += 1
        return Progress(self.step, len(self.slots), self.recorder, state)

    def _rates(self) -> Tensor:
        asked = list(zip(self._base_rates, self.state.opt_step.tolist(), strict=True))
        rates = {pair: self.parts.schedule(*pair) for pair in set(asked)}
        return torch.tensor([rates[pair] for pair in asked], dtype=torch.float64)

    def _work(self, now: Round, k: int) -> Grads:
        """The k-th contribution of every member; members whose hit is due take the single-member route."""
        state, workers = self.state, now.workers[:, k]
        rows = torch.arange(len(self.slots))
        cursor = state.worker["cursor"][rows, torch.from_numpy(workers)].numpy()
        index = torch.from_numpy(self.parts.sampler.indices(self.replicates, workers, cursor))
        batch = Selection(self.parts.train, index.to(self.parts.train[0].device))
        buffers = state.buffers
        if "buffers" in state.worker:
            at = torch.from_numpy(workers)
            buffers = tree_map(lambda b: b[rows, at], state.worker["buffers"])
        view = State({**state.server, "params": self.view(now.versions[:, k]), "buffers": buffers}, clock=state.clock)
        masks = self._masks(workers, cursor)
        due = self.hits.due(self.slots, self.step, workers) if self.step in self.plan.planned_steps else []
        if not due:
            return self.parts.many.work(view, batch, Ops(masks=masks) if masks else None)
        return self.hits.work(self.slots, self.step, view, batch, masks, due)

    def _masks(self, workers: np.ndarray, cursor: np.ndarray) -> dict[tuple[str, int], Tensor]:
        """Keep masks of every dropout site, drawn from the streams: ``[M, B, …]``."""
        masks = {}
        for record in self.parts.operations:
            if record.kind == "dropout":
                n = int(np.prod(record.a))
                purpose = f"dropout/{record.layer}/{record.call}"
                u = self.parts.streams.uniform(purpose, n, replicate=self.replicates, worker=workers, step=cursor)
                keep = torch.from_numpy(u >= record.p).view(len(self.slots), *record.a)
                masks[record.layer, record.call] = keep.to(self.parts.train[0].device)
        return masks

    def _exchange(self, now: Round, grads: list[Tree]) -> Tree:
        """Drive the compressor's coroutine: the mean over the K contributions answers each collective."""
        state, k = self.state, len(grads)
        if k == 1:  # views, no copy
            stacked = {n: g.unsqueeze(1) for n, g in grads[0].items()}
        else:
            stacked = {n: torch.stack([g[n] for g in grads], dim=1) for n in grads[0]}
        rows, at = torch.arange(len(self.slots)).unsqueeze(1), torch.from_numpy(now.workers)
        memory = tree_map(lambda t: t[rows, at], state.worker["memory"])
        exchange = self.parts.compressor.exchange(stacked, memory, state.shared)
        sent = 0
        answer: Any = None
        while True:
            try:
                request = exchange.send(answer)
            except StopIteration as stop:
                mean, memory, shared = stop.value
                break
            assert isinstance(request, Mean)
            sent += request.bytes_per_worker * k if self.parts.workers > 1 else 0
            answer = request.tensor.mean(1) if k > 1 else request.tensor.squeeze(1)

        def write(t: Tensor, new: Tensor) -> Tensor:
            t[rows, at] = new
            return t

        tree_map(write, state.worker["memory"], memory)
        tree_map(lambda t, new: t.copy_(new), state.shared, shared)
        state.clock["bytes_sent"].add_(sent)
        return mean

    def _put_buffers(self, now: Round, buffers: list[Tree]) -> None:
        """Workers keep their own BatchNorm buffers; the server's are their average, used for evaluation."""
        state = self.state
        if "buffers" not in state.worker:
            tree_map(lambda t, new: t.copy_(new), state.buffers, buffers[0])
            return
        rows = torch.arange(len(self.slots))
        for k, new in enumerate(buffers):
            at = torch.from_numpy(now.workers[:, k])
            for name, value in new.items():
                state.worker["buffers"][name][rows, at] = value
        for name, value in state.worker["buffers"].items():
            mean = value.mean(1) if value.is_floating_point() else value.amax(1)
            state.buffers[name].copy_(mean)

    def _advance(self, now: Round) -> None:
        clock, k = self.state.clock, now.workers.shape[1]
        rows = torch.arange(len(self.slots)).unsqueeze(1)
        self.state.worker["cursor"][rows, torch.from_numpy(now.workers)] += 1
        clock["step"].add_(1)
        clock["samples"].add_(k * self.parts.sampler.batch_size)
        clock["virtual_s"].copy_(torch.from_numpy(now.time_s))
        epoch_samples = self.parts.sampler.steps_per_epoch * self.parts.sampler.batch_size
        clock["epoch"].copy_((clock["samples"] - 1) // epoch_samples)
