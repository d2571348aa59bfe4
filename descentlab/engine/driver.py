"""The loop all engines share: fork, draw, work, exchange, apply, measure. One turn = one server update.

Engines differ in one thing, which versions of the weights the workers of an update had read; see
:mod:`descentlab.engine.lockstep` and :mod:`descentlab.engine.virtual`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.opmode import OpRecord, Ops
from ..core.protocols import (
    Apply,
    Batch,
    Compressor,
    Grads,
    Hit,
    Mean,
    Measured,
    Observable,
    Perturbation,
    Selection,
    Work,
)
from ..core.state import State
from ..core.streams import Streams
from ..core.tree import Tree, cat, clone, stack, tree_map
from .program import BlockPlan, Slot, parents
from .recorder import Recorder


class Sampler(Protocol):
    """Which samples the ``positions``-th batch of a worker holds."""

    batch_size: int
    steps_per_epoch: int

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray: ...


@dataclass
class Parts:
    """Everything a block needs, built from its settings; the engine reaches every room through these protocols only."""

    many: Work
    single: Work
    optimizer: Apply
    compressor: Compressor
    perturbation: Perturbation | None
    sampler: Sampler
    streams: Streams
    schedule: Callable[[float, int], float]
    observables: Sequence[Observable]
    on_schedule: Sequence[Observable]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    fresh: Callable[[int], tuple[Tree, Tree]]  # replicate -> (params, buffers) of one member, without the M axis
    operations: Sequence[OpRecord] = ()
    evaluator: Work = field(kw_only=True)
    workers: int = 1
    every: int = 1
    evaluate_every: int = 10
    hit_artifacts: bool = False


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
        self.slots = self.plan.slots(max(self.step - 1, 0))  # as they were when the state was saved
        if self.state is None:
            self.state = self.initial_state()
        needs: set[str] = set().union(*(o.needs for o in self.parts.observables))
        self._keep_before = "update" in needs

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
        self._by_schedule: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for m, slot in enumerate(slots):
            self._by_schedule.setdefault(slot.schedule, []).append(m)

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
        due = self._evaluations_due()
        recording = bool(due) or self.step % self.parts.every == 0
        before = clone(state.params) if self._keep_before and recording else None
        grads = self._exchange(now, [g.grads for g in contributions])
        lr = self._rates()
        self.parts.optimizer.apply(state, grads, lr)
        self._put_buffers(now, [g.buffers for g in contributions])
        self.after_update()
        loss = torch.stack([g.loss for g in contributions]).mean(0)
        accuracy = torch.stack([g.accuracy for g in contributions]).mean(0)
        self._advance(now)
        if recording:
            self._record(Measured(state, grads, loss, accuracy, lr, before, None), due)
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
        view = State({**state.server, "params": self.view(now.versions[:, k]), "buffers": buffers})
        masks = self._masks(workers, cursor)
        hit = self.step in self.plan.planned_steps
        due = [m for m, slot in enumerate(self.slots) if self._due(slot, int(workers[m]))] if hit else []
        if not due:
            return self.parts.many.work(view, batch, Ops(masks=masks) if masks else None)
        return self._work_split(view, batch, masks, due)

    def _due(self, slot: Slot, worker: int) -> bool:
        found = slot.planned_at(self.step)
        return found is not None and found[0].worker == worker

    def _work_split(self, view: State, batch: Batch, masks: dict, due: list[int]) -> Grads:
        rest = [m for m in range(len(self.slots)) if m not in due]
        groups = [[m] for m in due] + ([rest] if rest else [])
        results = []
        for members in groups:
            work = self.parts.many if members is rest else self.parts.single
            part = {k: mask[members] for k, mask in masks.items()}
            ops = Ops(self._edits(members[0]) if members is not rest else {}, part)
            needed = ops if ops.edits or ops.masks else None
            part_view, part_batch = view.take(members), batch.take(members)
            if members is not rest:
                self._keep_scene(members[0], part_view, part_batch)
            results.append(work.work(part_view, part_batch, needed))
        order = torch.argsort(torch.tensor([m for members in groups for m in members]))
        joined = Grads(
            cat([g.grads for g in results]),
            cat([g.buffers for g in results]),
            torch.cat([g.loss for g in results]),
            torch.cat([g.accuracy for g in results]),
        )
        pick = order.tolist()
        return Grads(
            tree_map(lambda t: t[pick], joined.grads),
            tree_map(lambda t: t[pick], joined.buffers),
            joined.loss[pick],
            joined.accuracy[pick],
        )

    def _keep_scene(self, m: int, view: State, batch: Batch) -> None:
        """What a replay of the hit of member ``m`` needs: weights and buffers before it, and the batch."""
        found = self.slots[m].planned_at(self.step)
        if self.parts.hit_artifacts and found is not None and found[1]:
            tensors = {f"params/{k}": p for k, p in view.params.items()}
            tensors |= {f"buffers/{k}": b for k, b in view.buffers.items()} | {"x": batch.x, "y": batch.y}
            self.recorder.scene(self.slots[m], {name: t[0].cpu().numpy() for name, t in tensors.items()})

    def _edits(self, m: int) -> dict:
        """The edit of a perturbed member; for its twin the identity at the same site, so both take the same route."""
        slot = self.slots[m]
        found = slot.planned_at(self.step)
        assert found is not None and self.parts.perturbation is not None
        planned, perturbed = found
        if not perturbed:
            return {planned.site: lambda x: x}
        hits: list[Hit] = []
        attempt = int(self.state.clock["attempt"][m])
        ops = self.parts.perturbation.realise(planned, hits, attempt=attempt)

        def recorded(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def apply(x: Tensor) -> Tensor:
                out = edit(x)
                self.recorder.hit(slot, hits[-1])
                return out

            return apply

        return {site: recorded(edit) for site, edit in ops.edits.items()}

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

    def _record(self, m: Measured, due: Sequence[int]) -> None:
        """One row per run; scheduled observables only for the members ``due``."""
        scheduled: dict[str, dict[int, float]] = {}
        if due:
            part = self.state.take(due)

            def evaluate(x: Tensor = self.parts.test[0], y: Tensor = self.parts.test[1]) -> tuple[Tensor, Tensor]:
                return self.parts.evaluator.evaluate(part, x, y)

            loss, accuracy, lr = (t[list(due)] for t in (m.loss, m.accuracy, m.lr))
            look = Measured(part, {}, loss, accuracy, lr, None, evaluate, self.parts.test)
            for observable in self.parts.on_schedule:
                for name, values in observable.measure(look).items():
                    scheduled[name] = dict(zip(due, values.tolist(), strict=True))
        clock = self.state.clock
        row = {k: clock[k] for k in ("attempt", "epoch", "samples", "virtual_s", "bytes_sent")}
        row["step"] = torch.full_like(clock["step"], self.step)
        for observable in self.parts.observables:
            row.update(observable.measure(m))
        self.recorder.rows(self.slots, row, scheduled)

    def _evaluations_due(self) -> list[int]:
        """The members whose evaluation falls on this step, in order."""
        found = [
            members
            for schedule, members in self._by_schedule.items()
            if any(self._evaluation_due(stop, anchor) for stop, anchor in schedule)
        ]
        return sorted(m for members in found for m in members)

    def _evaluation_due(self, stop: int, anchor: int) -> bool:
        every, step = self.parts.evaluate_every, self.step
        return step == stop - 1 or (every > 0 and (step - anchor) % every == 0)
