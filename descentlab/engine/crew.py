"""The server's view of its workers: who has which task, who is late, lost or talks nonsense, and who replaces them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch

from ..core.errors import StudyError
from ..core.tree import Tree, leaves
from .transport import Crewing, Hub
from .wire import FAILED, GARBLED, GRADIENT, READY, TASK, Corrupted, Header, Layout, Views, opened, seal, text_of

SLIPS = 3  # answers in a row that cannot be used, after which a worker is replaced
KEPT = "the log of updates is kept; the same command goes on from there"
Note = Callable[[str, str], None]  # (kind of event, what happened)


@final
@dataclass(frozen=True)
class Limits:
    """How long a worker may be silent, how long it may take to start, how many may be replaced in the whole run."""

    timeout_s: float = 60.0
    start_timeout_s: float = 120.0
    restarts: int = 10


class Gradient(NamedTuple):
    """An answer that is whole; its tensors are good until the worker's next task."""

    worker: int
    task: Header
    found: Views


@dataclass
class _Member:
    """``task``: what it works on; None: nothing. ``since``: the moment its limit counts from."""

    since: float
    ready: bool = False
    task: Header | None = None
    slips: int = 0


@dataclass
class _Memory:
    """Views of a worker's messages, made anew only where they lie elsewhere than before."""

    task: Views | None = None
    reply: Views | None = None
    where: Any = None


@final
@dataclass
class Crew:
    """Gives tasks to workers and gets gradients back. Every wait ends; no gradient is passed on twice.

    A worker that dies, stays silent or answers nonsense is replaced by a new one, and its task is void: whoever asks
    finds the worker :attr:`idle` again when it is back. Each such thing is told to ``note``.
    """

    hub: Hub
    crewing: Crewing
    task: Layout
    reply: Layout
    limits: Limits
    note: Note = lambda kind, text: None
    members: list[_Member] = field(default_factory=list, init=False)
    _memory: list[_Memory] = field(default_factory=list, init=False)
    replaced: int = field(default=0, init=False)
    last: Header | None = field(default=None, init=False)

    def open(self) -> None:
        """Start every worker."""
        self.hub.open(self.crewing)
        for worker in range(self.crewing.workers):
            self.members.append(_Member(time.monotonic()))
            self._memory.append(_Memory())
            self.hub.start(worker)

    @property
    def idle(self) -> list[int]:
        """Workers that could be given a task, those that wait longest first."""
        free = [w for w, m in enumerate(self.members) if m.ready and m.task is None]
        return sorted(free, key=lambda w: self.members[w].since)

    @property
    def busy(self) -> int:
        """How many tasks are under way."""
        return sum(m.task is not None for m in self.members)

    @property
    def starting(self) -> int:
        """How many workers are not up yet."""
        return sum(not m.ready for m in self.members)

    def give(self, worker: int, task: Header, given: Tree) -> Tree:
        """Send ``task`` with the weights and buffers ``given``; the copy of these that is good until the next one."""
        memory = self._memory[worker]
        if memory.task is None:
            memory.task = self.task.views(self.hub.outbox(worker))
        torch._foreach_copy_(memory.task.all, list(leaves(given)))
        self.members[worker].task = task._replace(kind=TASK, size=self.task.size)
        self._send(worker)
        return memory.task.tree

    def repeat(self, worker: int, why: str) -> None:
        """Give the same task again, or the worker's place to another after :data:`SLIPS` times."""
        member = self.members[worker]
        member.slips += 1
        if member.slips >= SLIPS:
            self._replace(worker, f"{why}, {member.slips} times in a row")
            return
        self.note("worker_slip", f"worker {worker} {why}; it is asked again")
        self._send(worker)

    def accept(self, worker: int) -> None:
        """The last gradient of ``worker`` is used: its task is done."""
        member = self.members[worker]
        member.task, member.slips, member.since = None, 0, time.monotonic()

    def _send(self, worker: int) -> None:
        member = self.members[worker]
        assert member.task is not None
        size = seal(self.hub.outbox(worker), member.task)
        member.since = time.monotonic()
        self.hub.send(worker, size)

    def next(self) -> Gradient | None:
        """The next gradient, or None when something else happened that may have made a worker idle.

        Raises:
            StudyError: a worker says that it failed, or is lost and there is no replacement left.
        """
        now = time.monotonic()
        waited = [(self._deadline(m), w) for w, m in enumerate(self.members) if not m.ready or m.task is not None]
        assert waited, "nobody has anything to do"
        deadline, latest = min(waited)
        arrival = self.hub.receive(max(0.0, deadline - now))
        if arrival is None:
            limit = self.limits.timeout_s if self.members[latest].ready else self.limits.start_timeout_s
            what = "no answer" if self.members[latest].ready else "not started"
            self._replace(latest, f"{what} within {limit:g} s")
            return None
        if arrival.message is None:
            self._replace(arrival.worker, arrival.lost)
            return None
        return self._read(arrival.worker, arrival.message)

    def _deadline(self, member: _Member) -> float:
        if not member.ready or member.task is None:
            return member.since + self.limits.start_timeout_s
        return member.since + self.limits.timeout_s + member.task.seconds

    def _read(self, worker: int, message: memoryview) -> Gradient | None:
        member = self.members[worker]
        try:
            header = opened(message)
            if header.kind == GRADIENT and header.size != self.reply.size:
                raise Corrupted(f"{header.size} bytes instead of {self.reply.size}")
        except Corrupted as error:
            if member.task is None:
                self._replace(worker, f"sent what is no message: {error}")
            else:
                self.repeat(worker, f"sent a corrupted answer to task {member.task.number}: {error}")
            return None
        if header.kind == FAILED:
            first, _, rest = text_of(message).partition("\n")
            self.note("worker_failed", f"worker {worker}: {first}\n{rest}")
            raise StudyError(f"worker {worker} failed: {first}")
        if header.kind == READY and not member.ready:
            member.ready, member.since = True, time.monotonic()
        elif header.kind == GARBLED and member.task is not None:
            self.repeat(worker, f"got task {member.task.number} corrupted")
        elif header.kind == GRADIENT and member.task is not None and header.number == member.task.number:
            memory = self._memory[worker]
            if memory.reply is None or memory.where is not message.obj:
                memory.reply, memory.where = self.reply.views(message), message.obj
            return Gradient(worker, member.task, memory.reply)
        else:
            self.note("worker_slip", f"worker {worker} answered task {header.number}, which it does not have; ignored")
        return None

    def _replace(self, worker: int, why: str) -> None:
        """The worker is gone (or is ended now): start another in its place."""
        self.hub.stop(worker)
        if self.replaced >= self.limits.restarts:
            count = f"engine.restarts = {self.limits.restarts}"
            raise StudyError(f"worker {worker} is lost ({why}) and none is replaced any more ({count}); {KEPT}")
        self.replaced += 1
        self.note("worker_replaced", f"worker {worker}: {why}; replacement {self.replaced} of {self.limits.restarts}")
        self.members[worker] = _Member(time.monotonic())
        self.hub.start(worker)

    def close(self) -> None:
        """End every worker."""
        self.hub.close()
