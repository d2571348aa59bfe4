"""Who waits for whom: synchronous rounds with and without backup workers, and everything asynchronous.

All are tables computed ahead (:mod:`descentlab.cluster.timeline`) from a :class:`~descentlab.cluster.pace.Pace`. A
timeline of T updates of W workers looks at T rows of times at most, so a longer run begins with the shorter one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np

from ..core.protocols import Tick
from ..core.streams import Streams
from .pace import Line, Pace


@final
@dataclass(frozen=True)
class Rounds:
    """Rounds: all workers get the same weights, and the first W - ``backup`` gradients to arrive are averaged.

    At least one is. The others' gradients are dropped and their workers begin the next round with everybody else
    (backup workers, arXiv 1604.00981); their batch comes again. ``backup`` = 0 is the barrier. ``staleness``: weights
    are those of so many updates ago (0: the current ones), as in a pipeline of that depth.
    """

    pace: Pace
    backup: int = 0
    staleness: int = 0

    def ticks(self, workers: int, steps: int, streams: Streams, replicate: int) -> list[Tick]:
        """See :class:`~descentlab.core.protocols.Timeline`."""
        seconds = self.pace.seconds(workers, steps, streams, replicate)
        begin, found = 0.0, []
        for t in range(steps):
            down, up = self.pace.line(), self.pace.line()
            ready = np.array([down.arrival(begin) for _ in range(workers)]) + seconds[t]
            order = np.argsort(ready, kind="stable")[: max(1, workers - self.backup)]
            begin = max(up.arrival(float(ready[w])) for w in order)
            chosen = tuple(sorted(int(w) for w in order))
            found.append(Tick(chosen, (max(0, t - self.staleness),) * len(chosen), begin))
        return found


@final
@dataclass(frozen=True)
class Waiting:
    """Asynchronous updates of ``group`` gradients each, with workers at most ``bound`` gradients apart.

    A worker reads the weights, computes, sends, and waits for the update its gradient goes into; then it reads again.
    ``group`` = 1, no bound: fully asynchronous. ``group`` = K: the server updates with the mean of every K gradients
    that arrive (K-async, arXiv 1803.01113; n-softsync of arXiv 1511.05950 has K = W / n, there a worker goes on at
    once and may give several of the K). ``bound`` = s: a worker that is more than s gradients ahead of the slowest
    waits for it before it reads (stale synchronous parallel, Ho et al., NIPS 2013: c - min c <= s).
    Of two things at once that of the lower worker comes first.
    """

    pace: Pace
    group: int = 1
    bound: int | None = None

    def ticks(self, workers: int, steps: int, streams: Streams, replicate: int) -> list[Tick]:
        """See :class:`~descentlab.core.protocols.Timeline`."""
        if not steps:
            return []
        seconds = self.pace.seconds(workers, steps, streams, replicate)
        run = _Events(seconds, self.pace.line(), self.pace.line(), self.group, self.bound)
        return run.until(steps)


@final
@dataclass(frozen=True)
class Softsyncs:
    """:class:`Waiting` in groups of W // ``splits`` gradients, at least one."""

    pace: Pace
    splits: int = 2

    def ticks(self, workers: int, steps: int, streams: Streams, replicate: int) -> list[Tick]:
        """See :class:`~descentlab.core.protocols.Timeline`."""
        return Waiting(self.pace, max(1, workers // self.splits)).ticks(workers, steps, streams, replicate)


@dataclass
class _Events:
    """The event list of one replicate."""

    seconds: np.ndarray
    up: Line
    down: Line
    group: int
    bound: int | None
    ticks: list[Tick] = field(default_factory=list)

    def __post_init__(self) -> None:
        workers = self.seconds.shape[1]
        self.done, self.version = [0] * workers, [0] * workers
        self.waiting: list[int] = []  # gradients that have arrived and are in no update yet
        self.blocked: set[int] = set()  # workers too far ahead to begin
        self.events: list[tuple[float, int, bool]] = []  # (time, worker, has arrived), a heap
        for w in range(workers):
            self._begin(w, 0.0)

    def until(self, steps: int) -> list[Tick]:
        """The first ``steps`` updates."""
        while len(self.ticks) < steps:
            time_s, w, arrived = heapq.heappop(self.events)
            if not arrived:
                heapq.heappush(self.events, (self.up.arrival(time_s), w, True))
                continue
            self.waiting.append(w)
            if len(self.waiting) == self.group:
                self._update(time_s)
        return self.ticks

    def _update(self, time_s: float) -> None:
        contributors: Sequence[int] = sorted(self.waiting)
        versions = tuple(self.version[w] for w in contributors)
        self.ticks.append(Tick(tuple(contributors), versions, time_s))
        self.waiting = []
        for w in contributors:
            self.done[w] += 1
        self.blocked |= set(contributors)
        slowest = min(self.done)
        for w in sorted(self.blocked):
            if self.bound is None or self.done[w] - slowest <= self.bound:
                self.blocked.remove(w)
                self._begin(w, time_s)

    def _begin(self, w: int, time_s: float) -> None:
        """Worker ``w`` reads the weights as they are and computes its next gradient."""
        self.version[w] = len(self.ticks)
        if self.done[w] < len(self.seconds):
            ready = self.down.arrival(time_s) + float(self.seconds[self.done[w], w])
            heapq.heappush(self.events, (ready, w, False))
