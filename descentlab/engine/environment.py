"""What processes measure before they decide about ranks: their link, their computing, and whether the link has changed.

All of it is done by all processes at once, and process 0's clock counts.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import final

import torch
import torch.distributed as dist

SMALL, FIRST, MOST = 8, 2**15, 2**23  # bytes of the small message; of large ones, tried from the first to the most
LONG_S = 0.03  # a large message should take as long, so that latency and a token bucket's reserve matter little


@final
@dataclass(frozen=True)
class Environment:
    """What the processes' link does: seconds of a message of eight bytes, Mbit/s of one of ``probe_bytes``. (An
    all-reduce of W processes; both as of one hop of a ring.)"""

    latency_s: float
    bandwidth_mbps: float
    probe_bytes: int = 0


def measure_environment(warmup: int = 1, repeats: int = 10) -> Environment:
    """Medians over ``repeats`` small all-reduces and a third as many large ones, after ``warmup`` that do not count; on
    every process at once. The large message grows until it takes 30 ms."""
    world = dist.get_world_size()
    small = told(_median_s(SMALL, warmup, repeats))
    size = FIRST
    while size < MOST and told(_median_s(size, 0, 1)) < LONG_S:
        size *= 4
    large = told(_median_s(size, min(warmup, 1), -(-repeats // 3)))
    hops = max(1, 2 * (world - 1))
    carried = hops / world * size
    return Environment(small / hops, 8 * carried / max(large - small, 1e-9) / 1e6, size)


def told(value: float) -> float:
    """Process 0's value, on all processes."""
    found = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(found, 0)
    return float(found)


def _median_s(size: int, warmup: int, repeats: int) -> float:
    def reduce() -> None:
        dist.all_reduce(tensor)

    tensor = torch.zeros(size // 4, dtype=torch.float32)
    return timed(reduce, warmup, repeats)


def timed(call: Callable[[], None], warmup: int, repeats: int) -> float:
    """Median seconds of a call that all processes begin together."""
    found = []
    for i in range(warmup + repeats):
        dist.barrier()
        started = time.perf_counter()
        call()
        if i >= warmup:
            found.append(time.perf_counter() - started)
    return statistics.median(found)


@final
@dataclass
class LinkWatch:
    """Tells from the collectives of the updates themselves, at no cost, whether the link's speed has changed.

    What is noted is the time of an update's collectives over what the last measurement says it should be. The median
    of the latest ``window`` updates of a kind (those with the same ranks) is held against that of its first ``window``,
    without the first ``settle``.

    Its limit: a change while a kind's first updates are noted (``settle`` + ``window`` of them, again after each new
    rank) becomes part of what is usual for that kind, and is not noticed.
    """

    settle: int = 5
    window: int = 15
    _usual: dict[Hashable, float] = field(default_factory=dict)
    _latest: dict[Hashable, deque[float]] = field(default_factory=dict)
    _seen: dict[Hashable, int] = field(default_factory=dict)

    def note(self, kind: Hashable, share: float) -> None:
        """An update whose collectives took ``share`` times what they should."""
        seen = self._seen[kind] = self._seen.get(kind, 0) + 1
        if seen <= self.settle:
            return
        latest = self._latest.setdefault(kind, deque(maxlen=self.window))
        latest.append(share)
        if kind not in self._usual and len(latest) == self.window:
            self._usual[kind] = statistics.median(latest)

    def changed(self, kind: Hashable, tolerance: float) -> bool:
        """Whether they take another time now, by more than ``tolerance`` of it; False while little is known."""
        if kind not in self._usual or len(self._latest.get(kind, ())) < self.window:
            return False
        return abs(statistics.median(self._latest[kind]) - self._usual[kind]) > tolerance * self._usual[kind]

    def measured(self, kind: Hashable, same: bool) -> None:
        """The link has been measured again, and is the ``same``: then what updates take now is usual. Else what was
        usual stays so, beside the new measurement: a change that comes right after it is seen."""
        if same:
            self._usual[kind] = statistics.median(self._latest[kind])
        self._latest.clear()
        self._seen.clear()
