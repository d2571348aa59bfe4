"""The loop all engines share: fork, draw, work, exchange, apply, measure. One turn = one server update.

Engines differ in one thing, which versions of the weights the workers of an update had read; see
:mod:`descentlab.engine.lockstep` and :mod:`descentlab.engine.virtual`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..core.flat import base_of
from ..core.opmode import Ops
from ..core.protocols import Grads, Lateness, Measured, Selection
from ..core.state import State
from ..core.tree import Tree, stack, tree_map
from .events import Events
from .exchanging import Exchanging
from .guard import Guard
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
    slots: tuple[Slot, ...] = ()  # the members of ``state``, also those that end here


@dataclass
class Engine(ABC):
    """Runs one block. ``state`` and ``step`` are all that a checkpoint has to hold beside the plan."""

    plan: BlockPlan
    parts: Parts
    state: State = field(default=None)  # type: ignore[assignment]
    step: int = 0
    recorder: Recorder = field(default_factory=Recorder)

    def __post_init__(self) -> None:
        self.hits, self.events = Hits(self.parts, self.recorder), Events(self.parts, self.recorder)
        self.measuring, self.exchanging = Measuring(self.parts, self.recorder), Exchanging(self.parts)
        self.guard = Guard(self.parts.arm) if self.parts.arm is not None else None
        self._reuses = self._lends()
        self._spent: Grads | None = None  # of the last update, where nobody can need it
        self.slots = self._planned(max(self.step - 1, 0))  # as they were when the state was saved
        if self.state is None:
            self.state = self.initial_state()

    def _lends(self) -> bool:
        """Whether the last gradient may be written over by the next: nobody else can have kept it."""
        parts = self.parts
        keeping = [o for o in parts.observables if "grad" in o.needs and not getattr(o, "keeps_nothing", False)]
        if keeping or self.guard or parts.staleness_rule or parts.rank_policy or not self.exchanging.idle:
            return False
        return type(self)._work is Engine._work and bool(getattr(parts.many, "reuses", False))

    def initial_state(self) -> State:
        """Members in slot order, each initialised from its replicate's stream."""
        made = {replicate: self.parts.fresh(replicate) for replicate in dict.fromkeys(self.replicates.tolist())}
        fresh = [made[slot.replicate] for slot in self.slots]
        params, buffers = stack([p for p, _ in fresh]), stack([b for _, b in fresh])
        state = State.start(params, buffers)
        members, workers = len(self.slots), self.parts.workers
        memory, shared = self.parts.compressor.start(params, workers, self.parts.streams, self.replicates)
        worker: Tree = {"cursor": torch.zeros(members, workers, dtype=torch.int64), "memory": memory}
        if workers > 1:
            worker["buffers"] = tree_map(lambda b: b.unsqueeze(1).repeat(1, workers, *[1] * (b.dim() - 1)), buffers)
        shared = {**shared, **self.exchanging.start(params, members)}
        start = getattr(self.parts.staleness_rule, "start", None)
        if start is not None:
            shared = {**shared, "rule": start(params)}
        if self.parts.arm is not None:
            shared = {**shared, "arm": self.parts.arm.start(members)}
        if self.parts.average is not None:
            self.parts.average.start(state)
        return State(state.server, worker, shared, state.clock)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The members as they stand now."""
        return self._slots

    @slots.setter
    def slots(self, slots: tuple[Slot, ...]) -> None:
        self._slots = slots
        self.replicates = np.array([slot.replicate for slot in slots], dtype=np.int64)
        self._base_rates = [(slot.variant, slot.lr) for slot in slots]
        self._distinct_rates = set(self._base_rates)
        self._rated: tuple[dict[tuple[int, float], float], Tensor] | None = None
        if len(self.parts.schedules) > 1:
            self.parts.optimizer.assign([slot.variant for slot in slots])
        self.measuring.bind(slots)
        self.events.bind(slots)

    @abstractmethod
    def round(self) -> Round:
        """Who contributes to update ``self.step``, at which versions."""

    @abstractmethod
    def view(self, versions: np.ndarray) -> Tree:
        """The parameters ``[M, …]`` of the given version of each member ``[M]``."""

    def after_update(self) -> None:  # noqa: B027  (a hook, not every engine needs it)
        """Called when the parameters have moved to version ``self.step + 1``."""

    def lateness(self, now: Round) -> dict[str, Tensor]:
        """Columns ``[M]`` on how old the contributions are; nothing where that is no question."""
        return {}

    def on_change(self) -> None:  # noqa: B027  (a hook)
        """Called when the parameters of version ``self.step`` were changed at rest."""

    def on_fork(self, chosen: Sequence[int]) -> None:  # noqa: B027  (a hook)
        """Called when the members became copies of the ``chosen`` old ones."""

    def before_checkpoint(self) -> None:  # noqa: B027  (a hook)
        """Called before the state is stored."""

    def run(self) -> Iterator[Progress]:
        """One item per update, until every run has stopped."""
        while self.step < self.plan.stop and self.slots:
            self._fork()
            if self.slots:
                yield self.update()

    def _planned(self, step: int) -> tuple[Slot, ...]:
        """The members at ``step``, without the runs that have ended before their time."""
        slots = self.plan.slots(step)
        return slots if self.parts.stopping is None else self.parts.stopping.left(slots)

    def _leave(self) -> None:
        """Members whose runs have ended go."""
        if self.parts.stopping is None:
            return
        slots = self.parts.stopping.left(self.slots)
        if slots != self.slots:
            chosen = parents(self.slots, slots)
            self.slots = slots
            if slots:
                self.state = self.state.take(chosen)
                self.on_fork(chosen)

    def _fork(self) -> None:
        if self.step not in self.plan.changes:
            return
        slots = self._planned(self.step)
        if slots != self.slots:
            chosen, old = parents(self.slots, slots), self.slots
            self.slots, self.state = slots, self.state.take(chosen)
            for m, slot in enumerate(slots):
                own = slot.runs[0].prefix
                if old[chosen[m]].prefix is not None and slot.prefix is None:
                    assert self.parts.takeover is not None and own is not None
                    self.parts.takeover(self.state, m, own.variant, slot.variant, own.how)
            self.on_fork(chosen)

    def beside(self, slots: tuple[Slot, ...], state: State, step: int, recorder: Recorder) -> Engine:
        """This engine with other members at another step, on the same parts; what :class:`Guard` repeats steps with."""
        other = copy.copy(self)
        other.recorder, other.state, other.step, other._spent = recorder, state, step, None
        other.exchanging = Exchanging(self.parts)
        other.hits, other.events = Hits(self.parts, recorder), Events(self.parts, recorder)
        other.measuring, other.slots = Measuring(self.parts, recorder), slots
        return other

    def update(self) -> Progress:
        """One server update of every member."""
        state, now, guard = self.state, self.round(), self.guard
        if guard is not None:
            guard.keep(self)
        if self.events.before_work(state, self.step):
            self.on_change()
        contributions = [self._work(now, k) for k in range(now.workers.shape[1])]
        due = self.measuring.due(self.step)
        recording = bool(due) or self.step % self.parts.every == 0
        before = self.measuring.before(state.params) if recording or guard is not None else None
        lr = self._rates()
        late = self.lateness(now) if recording else {}
        grads = self._exchange(now, [g.grads for g in contributions], lr)
        self.events.before_apply(state, self.step, grads, lr)
        if guard is not None:
            grads = guard.edit(grads, lr)
        self.parts.optimizer.apply(state, grads, lr)
        self.events.after_apply(state, self.step)
        self._put_buffers(now, [g.buffers for g in contributions])
        if self.parts.average is not None:
            self.parts.average.update(state)
        self.after_update()
        loss, accuracy = _mean([g.loss for g in contributions]), _mean([g.accuracy for g in contributions])
        self._advance(now)
        if guard is not None:
            guard.check(self)
        measured = Measured(state, grads, loss, accuracy, lr, before, None, late=late)
        if recording:
            self.measuring.record(self.step, measured, due, guard.columns() if guard else {})
        elif guard is not None and guard.alarms:
            self.measuring.record_alarms(self.step, measured, guard.columns())
        self.step += 1
        if self._reuses and len(contributions) == 1 and base_of(contributions[0].grads) is not None:
            self._spent = contributions[0]
        if guard is not None:
            guard.rewind(self)
        members = self.slots
        self._leave()
        return Progress(self.step, len(members), self.recorder, state, members)

    def _rates(self) -> Tensor:
        steps = self.state.clock["step"].tolist()
        if steps.count(steps[0]) == len(steps):  # the usual case: all members are at the same step
            same = {who: self.parts.schedules[who[0]](who[1], steps[0]) for who in self._distinct_rates}
            if self._rated is None or self._rated[0] != same:
                found = torch.tensor([same[who] for who in self._base_rates], dtype=torch.float64)
                self._rated = same, found
            return self._rated[1].clone()  # events may change it
        asked = list(zip(self._base_rates, steps, strict=True))
        rates = {who: self.parts.schedules[who[0][0]](who[0][1], who[1]) for who in set(asked)}
        return torch.tensor([rates[who] for who in asked], dtype=torch.float64)

    def _work(self, now: Round, k: int) -> Grads:
        """The k-th contribution of every member; members whose hit is due take the single-member route."""
        state, workers = self.state, now.workers[:, k]
        cursor = state.worker["cursor"].numpy()[np.arange(len(workers)), workers]
        index = torch.from_numpy(self.parts.sampler.indices(self.replicates, workers, cursor))
        selection = Selection(self.parts.train, index.to(self.parts.train[0].device))
        batch = self.events.batch(state, self.step, selection, workers, cursor)
        buffers = state.buffers
        if "buffers" in state.worker:
            rows, at = torch.arange(len(self.slots)), torch.from_numpy(workers)
            buffers = tree_map(lambda b: b[rows, at], state.worker["buffers"])
        self.events.buffers(state, self.step, buffers, workers)
        view = State({**state.server, "params": self.view(now.versions[:, k]), "buffers": buffers}, clock=state.clock)
        masks = self._masks(workers, cursor)
        due = self.hits.due(self.slots, self.step, workers) if self.step in self.plan.planned_steps else []
        if due or batch is not selection:
            result = self.hits.work(self.slots, self.step, view, batch, masks, due)
        else:
            ops, (spent, self._spent) = Ops(masks=masks) if masks else None, (self._spent, None)
            work = self.parts.many.work
            result = work(view, batch, ops) if spent is None else work(view, batch, ops, spent)  # type: ignore[call-arg]
        self.events.after_work(state, self.step, result, workers)
        return result

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

    def _exchange(self, now: Round, grads: list[Tree], lr: Tensor) -> Tree:
        """The averaged gradient of the K contributions, as it arrives through the compressor."""
        if self.parts.rank_policy is not None:
            self._resize(lr)
        if self.parts.staleness_rule is not None:
            grads = [self._adjusted(now, i, g) for i, g in enumerate(grads)]
        if self.exchanging.idle and self.parts.rank_policy is None:
            return grads[0]
        if len(grads) == 1:  # views, no copy
            stacked = {n: g.unsqueeze(1) for n, g in grads[0].items()}
        else:
            stacked = {n: torch.stack([g[n] for g in grads], dim=1) for n in grads[0]}
        mean = self.exchanging.run(self.state, self.step, now.workers, stacked)
        if self.parts.rank_policy is not None:
            self.exchanging.observe(self.state, self.exchanging.moment(self.state, self.step, lr), mean)
        return mean

    def _adjusted(self, now: Round, k: int, grads: Tree) -> Tree:
        """The k-th contribution after the staleness rule."""
        assert self.parts.staleness_rule is not None
        versions = torch.from_numpy(self.step - now.versions[:, k])
        memory = self.state.shared.get("rule", {})
        late = Lateness(versions, self.view(now.versions[:, k]), self.state.params, memory)
        return self.parts.staleness_rule.adjust(grads, late)

    def _resize(self, lr: Tensor | None = None) -> None:
        """Bring the compressor to the rank its policy asks for."""
        lr = self._rates() if lr is None else lr
        self.exchanging.resize(self.state, self.exchanging.moment(self.state, self.step, lr))

    def _put_buffers(self, now: Round, buffers: list[Tree]) -> None:
        """Workers keep their own BatchNorm buffers; the server's are their average, used for evaluation."""
        state = self.state
        if "buffers" not in state.worker:
            if state.buffers:
                torch._foreach_copy_(list(state.buffers.values()), [buffers[0][name] for name in state.buffers])
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
        cursor = self.state.worker["cursor"].numpy()
        if cursor.shape[1] == 1:
            cursor += 1
        else:
            cursor[np.arange(len(now.workers))[:, None], now.workers] += 1
        held = {name: t.numpy() for name, t in clock.items()}  # the same memory, cheaper operations
        held["step"] += 1
        held["samples"] += k * self.parts.sampler.batch_size
        held["virtual_s"][:] = now.time_s
        if self.parts.link is not None:
            clock["virtual_s"].add_(self.state.shared["link"]["seconds"])
        epoch_samples = self.parts.sampler.steps_per_epoch * self.parts.sampler.batch_size
        held["epoch"][:] = (held["samples"] - 1) // epoch_samples


def _mean(values: list[Tensor]) -> Tensor:
    """Mean over the contributions; of one, itself."""
    return torch.stack(values).mean(0) if len(values) > 1 else values[0]
