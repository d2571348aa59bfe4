"""Timelines: which workers contribute to each server update, the version of the weights each had read, and when.

A delay that ignores the weights is a table computed ahead. Every class here gives ``ticks(workers, steps, streams,
replicate)``, one :class:`~descentlab.core.protocols.Tick` per update t = 0, 1, …; version v means "after v updates",
so a gradient of update t at version t is fresh. ``time_s``: virtual seconds from the start to the update.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from ..core.errors import UserError
from ..core.protocols import Delay, Planned, Tick
from ..core.streams import Streams
from .delays import GaussianDelay


def _round_ends(delay: Delay, workers: int, steps: int, streams: Streams, replicate: int) -> list[float]:
    """End of each round ``[T]`` when a round lasts as long as its slowest worker."""
    return np.cumsum(delay.seconds(workers, steps, streams, replicate).max(axis=1)).tolist()


@final
@dataclass(frozen=True)
class BarrierTimeline:
    """All read the current version; a round lasts as long as its slowest worker, so delays move only the clock."""

    delay_s: float = 0.0
    std_s: float = 0.0

    def ticks(self, workers: int, steps: int, streams: Streams, replicate: int) -> list[Tick]:
        """See :class:`~descentlab.core.protocols.Timeline`."""
        ends = _round_ends(GaussianDelay(self.delay_s, self.std_s), workers, steps, streams, replicate)
        return [Tick(tuple(range(workers)), (t,) * workers, end) for t, end in enumerate(ends)]


@final
@dataclass(frozen=True)
class ConstantStalenessTimeline:
    """All workers contribute to every update, at version max(0, t - ``staleness``); rounds last as a barrier's."""

    staleness: int
    delay_s: float = 0.0

    def ticks(self, workers: int, steps: int, streams: Streams, replicate: int) -> list[Tick]:
        """See :class:`~descentlab.core.protocols.Timeline`."""
        ends = _round_ends(GaussianDelay(self.delay_s), workers, steps, streams, replicate)
        everyone = tuple(range(workers))
        return [Tick(everyone, (max(0, t - self.staleness),) * workers, end) for t, end in enumerate(ends)]


@final
@dataclass(frozen=True)
class RoundRobinTimeline:
    """Workers take turns: update t applies the gradient of worker t mod W.

    Stale: each worker reads right after its own update, so its next gradient is W - 1 versions old (version
    max(0, t - (W - 1))); the workers overlap, staggered evenly, and update t comes at delay_s * (1 + t / W).
    Not stale: each waits for its predecessor and reads version t, so nothing overlaps: delay_s * (t + 1).
    """

    stale: bool = True
    delay_s: float = 0.0

    def ticks(self, workers: int, steps: int, streams: Streams, replicate: int) -> list[Tick]:
        """See :class:`~descentlab.core.protocols.Timeline`."""
        lag, overlap = (workers - 1, workers) if self.stale else (0, 1)
        return [Tick((t % workers,), (max(0, t - lag),), self.delay_s * (t + overlap) / overlap) for t in range(steps)]


@final
@dataclass(frozen=True)
class AsynchronousTimeline:
    """Nobody waits: a worker reads the weights, computes, its gradient is one update, and it reads again.

    Events on a virtual clock: update t is the t-th gradient to be ready, of two at once that of the lower worker. The
    i-th gradient of worker w takes ``delay.seconds(…)[i, w]`` and is taken at the version that w's own last update
    made, 0 at first.
    """

    delay: Delay

    def ticks(self, workers: int, steps: int, streams: Streams, replicate: int) -> list[Tick]:
        """See :class:`~descentlab.core.protocols.Timeline`.

        Raises:
            UserError: for a delay law that gives another shape, negative or non-finite times.
        """
        seconds = np.asarray(self.delay.seconds(workers, steps, streams, replicate), dtype=np.float64)
        if seconds.shape != (steps, workers) or not np.isfinite(seconds).all() or (seconds < 0).any():
            what = f"{type(self.delay).__name__} with times of shape {seconds.shape}"
            raise UserError("timeline.delay", what, f"finite times of at least 0 of shape {(steps, workers)}")
        done, version = [0] * workers, [0] * workers
        ready = [(float(seconds[0, w]), w) for w in range(workers)] if steps else []
        heapq.heapify(ready)
        ticks = []
        for t in range(steps):
            time_s, w = heapq.heappop(ready)
            ticks.append(Tick((w,), (version[w],), time_s))
            done[w], version[w] = done[w] + 1, t + 1
            if done[w] < steps:
                heapq.heappush(ready, (time_s + float(seconds[done[w], w]), w))
        return ticks


@final
@dataclass(frozen=True)
class RecordedTimeline:
    """A given table, such as the log of a real asynchronous run; the same for every replicate."""

    recorded: Sequence[Tick]

    def ticks(self, workers: int, steps: int, streams: Streams, replicate: int) -> list[Tick]:
        """See :class:`~descentlab.core.protocols.Timeline`; ValueError when the record is shorter than ``steps``."""
        if steps > len(self.recorded):
            raise ValueError(f"steps = {steps}: the recorded timeline ends after {len(self.recorded)} updates")
        return list(self.recorded[:steps])


def place(planned: Planned, ticks: Sequence[Tick]) -> Planned:
    """``planned`` moved to the first update from ``planned.step`` on to which its worker contributes.

    A fault happens while a worker computes a gradient, so it belongs to the update that applies this gradient. Where
    workers take turns that is not every update; the table ignores the weights, so the fault moves to the same update
    for every optimizer. Raises UserError when the worker does not contribute any more.
    """
    for t in range(planned.step, len(ticks)):
        if planned.worker in ticks[t].workers:
            return replace(planned, step=t)
    expected = f"a step after which worker {planned.worker} still contributes within {len(ticks)} updates"
    raise UserError("fault.step", planned.step, expected)
