"""A real asynchronous parameter server: workers are processes, staleness is whatever happens.

The optimizer lives on the server. A worker gets weights and the number of one of its batches, answers with the
gradient, and waits. The server applies gradients in the order in which they arrive, ``quorum`` of them per update, and
logs who contributed with which version before it says so to anybody. That log is a timeline: replayed by the virtual
engine it gives the same weights, and replayed by a server that was killed it gives back every update it had made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from torch import Tensor

from ..core.errors import StudyError
from ..core.flat import base_of
from ..core.protocols import Delay, Grads, Tick
from ..core.state import State
from ..core.tree import Tree, clone, tree_map
from .crew import Crew, Gradient, Limits, Note
from .driver import Engine, Progress, Round
from .journal import Entry, Journal
from .lateness import lateness
from .local import LocalProcesses
from .program import BlockPlan
from .replica import Build, Worker, reply_layout, task_layout
from .transport import Answers, Crewing, Hub
from .wire import HEADER_BYTES, TASK, TEXT_BYTES, Header


def _ignore(kind: str, text: str) -> None:
    """Nobody wants to know."""


@final
@dataclass
class ParameterServer(Engine):
    """Runs one run on ``parts.workers`` processes until ``plan.stop`` updates are applied.

    ``build`` makes the parts anew in each process. Every update takes ``quorum`` gradients of different workers, who
    wait for it: 1 is asynchronous, the number of workers a barrier. ``bound``: how many gradients a worker may be ahead
    of the slowest. ``delay``: how long a worker sleeps before it answers. ``journal``: where updates are logged; what
    it holds beyond ``step`` is made again first. No more gradients are asked for than are applied. ``note`` is told of
    replaced workers and refused answers.

    ``log`` lists one Tick per update, with seconds since all workers were ready. ``state.worker["held"]`` are the
    weights each worker has read, ``[1, W, …]``, at ``held_version`` (-1: none); :meth:`before_checkpoint` brings them
    up to date. Conditions it cannot meet are listed in :mod:`descentlab.engine.support`.

    A gradient that is not finite is computed again by the server. If that is not finite either, training has diverged
    and it is applied; else the worker is at fault and is asked again.
    """

    build: Build = field(kw_only=True)
    hub: Hub = field(default_factory=LocalProcesses, kw_only=True)
    limits: Limits = field(default_factory=Limits, kw_only=True)
    quorum: int = field(default=1, kw_only=True)
    bound: int | None = field(default=None, kw_only=True)
    delay: Delay | None = field(default=None, kw_only=True)
    journal: Journal | None = field(default=None, kw_only=True)
    note: Note = field(default=_ignore, kw_only=True)
    worker: Callable[[int, Build, BlockPlan], Answers] = field(default=Worker, kw_only=True)
    log: list[Tick] = field(default_factory=list, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.plan.runs) != 1 or self.plan.runs[0].planned:
            raise ValueError("the parameter server takes one run without a planned perturbation")
        if self.state.shared.keys() - {"rule"}:  # what a rule remembers stays on the server
            raise ValueError("the parameter server sends gradients whole")
        if not 1 <= self.quorum <= self.parts.workers:
            raise ValueError(f"quorum = {self.quorum}: expected 1 to {self.parts.workers}")
        self._again = list(self.journal.entries) if self.journal is not None else []
        if len(self._again) < self.step:
            raise self._lost_log()
        self.log += [entry.tick() for entry in self._again]
        self._numbers = [-1] * self.parts.workers  # of each worker's last gradient that is applied
        for entry in self._again:
            for worker, number in zip(entry.workers, entry.numbers, strict=True):
                self._numbers[worker] = number
        self._next_number = 1 + max(self._numbers)
        self._arrived: dict[int, Gradient] = {}  # worker -> what waits to be applied
        self._now: list[Grads] = []
        held = self.state.worker["held"].values()
        self._held = [[t[:, worker] for t in held] for worker in range(self.parts.workers)]
        self._lent: dict[int, Tree] = {}  # worker -> the weights of its last task, where they lie in its message
        self._sleeps = self._delays()

    def initial_state(self) -> State:
        state, workers = super().initial_state(), self.parts.workers
        state.worker["held"] = tree_map(lambda p: p.new_zeros(1, workers, *p.shape[1:]), state.params)
        state.worker["held_version"] = torch.full((1, workers), -1, dtype=torch.int64)
        return state

    def _lost_log(self) -> StudyError:
        assert self.journal is not None or self.step
        path = self.journal.path if self.journal is not None else "nowhere"
        held = f"{len(self._again)} updates and the checkpoint has {self.step}"
        return StudyError(f"the log of updates ({path}) has {held}; delete the block folder to compute it again")

    def _delays(self) -> np.ndarray | None:
        """Seconds ``[T, W]`` that worker w sleeps at its i-th gradient; None: nobody sleeps."""
        if self.delay is None:
            return None
        replicate = self.plan.runs[0].replicate
        return self.delay.seconds(self.parts.workers, self.plan.stop, self.parts.streams, replicate)

    def run(self) -> Iterator[Progress]:
        """One item per update; first those that the log holds and the state does not."""
        try:
            yield from self._make_again()
            if self.step < self.plan.stop:
                self._open()
                yield from super().run()
        finally:
            self._settle()
            if hasattr(self, "crew"):
                self.crew.close()
            if self.journal is not None:
                self.journal.close()

    def _make_again(self) -> Iterator[Progress]:
        """The logged updates after ``step``, computed here."""
        self._again = self._again[: self.plan.stop]
        if self.step < len(self._again):
            self.note("replayed", f"updates {self.step} to {len(self._again) - 1} are made again from the log")
        while self.step < len(self._again):
            self._hold_what_comes()
            yield self.update()

    def _hold_what_comes(self) -> None:
        """Keep the current weights for every worker whose next logged gradient was taken at them."""
        coming: dict[int, int] = {}
        for entry in self._again[self.step :]:
            for worker, version in zip(entry.workers, entry.versions, strict=True):
                coming.setdefault(worker, version)
            if len(coming) == self.parts.workers:
                break
        for worker, version in coming.items():
            if version == self.step:
                self._hold(worker, version)
            elif version < self.step and version != int(self.state.worker["held_version"][0, worker]):
                raise self._lost_log()

    def _open(self) -> None:
        """Start the workers and wait until all are up: the first would be alone for a while."""
        task, reply = task_layout(self), reply_layout(self)
        sizes = HEADER_BYTES + task.size, HEADER_BYTES + max(reply.size, TEXT_BYTES)
        crewing = Crewing(self.parts.workers, self._make_worker, *sizes, modules=self._modules())
        self.crew = Crew(self.hub, crewing, task, reply, self.limits, self.note)
        self.crew.open()
        while self.crew.starting:
            self.crew.next()
        self._started = time.monotonic() - (self.log[-1].time_s if self.log else 0.0)

    def _modules(self) -> tuple[str, ...]:
        """What every worker imports; the first optimizer of a process imports ``torch._dynamo``, which is slow."""
        return "torch", "torch._dynamo", __name__, getattr(self.build, "func", self.build).__module__

    def _make_worker(self, worker: int) -> Answers:
        return self.worker(worker, self.build, self.plan)

    def _hold(self, worker: int, version: int) -> None:
        """The current weights, of ``version``, are what ``worker`` has read."""
        torch._foreach_copy_(self._held[worker], list(self.state.params.values()))
        self.state.worker["held_version"][:, worker] = version

    def _settle(self) -> None:
        """Put the weights that workers have read where a checkpoint finds them: until then a task is a copy itself."""
        for worker, weights in self._lent.items():
            torch._foreach_copy_(self._held[worker], list(weights.values()))

    def _hand_out(self, version: int, advanced: Sequence[int] = ()) -> None:
        """Tasks to whoever is free, as many as are still needed. ``version``: of the weights as they are. ``advanced``:
        workers whose last batch is done although their cursor does not say so yet."""
        asked = self.crew.busy + len(self._arrived)
        left = (self.plan.stop - version) * self.quorum - asked
        if left <= 0:
            return
        done = [c + (w in advanced) for w, c in enumerate(self.state.worker["cursor"][0].tolist())]
        ahead = max(done) if self.bound is None else min(done) + self.bound
        for worker in [w for w in self.crew.idle if w not in self._arrived and done[w] <= ahead][:left]:
            batch = done[worker]
            seconds = 0.0 if self._sleeps is None else float(self._sleeps[min(batch, len(self._sleeps) - 1), worker])
            number, self._next_number = self._next_number, self._next_number + 1
            task = Header(TASK, number, version, batch, self._numbers[worker], seconds)
            given = {"params": self.state.params, "buffers": self._buffers_of(worker)}
            self._lent[worker] = self.crew.give(worker, task, given)["params"]
            self.state.worker["held_version"][:, worker] = version

    def _buffers_of(self, worker: int) -> Tree:
        own = self.state.worker.get("buffers")
        return self.state.buffers if own is None else tree_map(lambda b: b[:, worker], own)

    def round(self) -> Round:
        """Waits for the next ``quorum`` gradients, and logs whose they are."""
        if self.step < len(self._again):
            entry = self._again[self.step]
            if entry.batches != tuple(int(self.state.worker["cursor"][0, w]) for w in entry.workers):
                raise self._lost_log()
            return self._round_of(entry)
        if not self.crew.busy:  # the first update; later ones find their tasks given out
            self._hand_out(self.step)
        while len(self._arrived) < self.quorum:
            found = self.crew.next()
            if found is None:  # a worker came or went: there may be a task to give, to it or to another
                self._hand_out(self.step)
            elif self._can_be_used(found):
                self.crew.accept(found.worker)
                self._arrived[found.worker] = found
        entry = self._enter()
        return self._round_of(entry)

    def _enter(self) -> Entry:
        chosen = [self._arrived.pop(worker) for worker in sorted(self._arrived)]
        keep = self.step % self.parts.every == 0 or bool(self.measuring.due(self.step))
        self._now = [_grads(g.found.tree, keep) for g in chosen]
        tasks = [g.task for g in chosen]
        entry = Entry(
            self.step,
            tuple(g.worker for g in chosen),
            tuple(t.version for t in tasks),
            tuple(t.batch for t in tasks),
            tuple(t.number for t in tasks),
            time.monotonic() - self._started,
        )
        if self.journal is not None:
            self.journal.append(entry)
        self.log.append(entry.tick())
        for worker, number in zip(entry.workers, entry.numbers, strict=True):
            self._numbers[worker] = number
        return entry

    def _round_of(self, entry: Entry) -> Round:
        return Round(np.array([entry.workers]), np.array([entry.versions]), np.array([entry.time_s]))

    def _can_be_used(self, gradient: Gradient) -> bool:
        """Whether it is finite; or not, and rightly so. Else the worker is asked again."""
        worker, task, found = gradient
        flat = base_of(found.tree["grads"])  # side by side in the message: one pass
        grads = found.tree["grads"].values() if flat is None else [flat]
        if _finite([*grads, found.tree["loss"]]):
            return True
        if not _finite(list(self.view(np.array([task.version])).values())):
            return True  # at weights like these nothing else can be
        now = Round(np.array([[worker]]), np.array([[task.version]]), np.zeros(1))
        again = super()._work(now, 0)
        if not _finite([*again.grads.values(), again.loss]):
            return True
        self.crew.repeat(worker, f"returned a gradient with NaN or infinity for task {task.number}, which is finite")
        return False

    def _work(self, now: Round, k: int) -> Grads:
        return super()._work(now, k) if self.step < len(self._again) else self._now[k]

    def view(self, versions: np.ndarray) -> Tree:
        """The weights that a worker holds at this version."""
        held = torch.nonzero(self.state.worker["held_version"][0] == int(versions[0]))
        worker = int(held[0, 0])
        if worker in self._lent:
            return self._lent[worker]
        return tree_map(lambda t: t[:, worker], self.state.worker["held"])

    def lateness(self, now: Round) -> dict[str, Tensor]:
        """See :func:`~descentlab.engine.lateness.lateness`."""
        return lateness(self, now)

    def after_update(self) -> None:
        """The next tasks go out before the update is recorded, so that nobody waits for measurements."""
        if self.step + 1 > len(self._again):
            self._hand_out(self.step + 1, self.log[-1].workers)

    def before_checkpoint(self) -> None:
        """A checkpoint never knows of an update that the log on the disk does not."""
        self._settle()
        if self.journal is not None:
            self.journal.sync()


def _grads(found: Tree, keep: bool) -> Grads:
    """``keep``: gradients are looked at after the worker was given its next task, so they are copied out of the
    message; what the driver reads then is copied always."""
    grads = clone(found["grads"]) if keep else found["grads"]
    return Grads(grads, found["buffers"], found["loss"].clone(), found["accuracy"].clone())


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every number is; the sum tells almost always, and it is one pass."""
    return all(math.isfinite(t.sum().item()) or bool(torch.isfinite(t).all()) for t in tensors)


def train(
    plan: BlockPlan, build: Build, *, timeout_s: float = 120.0, restarts: int = 0, quorum: int = 1
) -> tuple[State, list[Tick]]:
    """Run to the end on processes of this machine: (final state, log of updates)."""
    server = ParameterServer(
        plan,
        build(),
        build=build,
        hub=LocalProcesses(timeout_s),
        limits=Limits(timeout_s, timeout_s, restarts),
        quorum=quorum,
    )
    for _ in server.run():
        pass
    return server.state, server.log
