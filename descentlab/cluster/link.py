"""The simulated link between workers: every collective takes a + b bytes."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import final

from ..core.protocols import Collective, Gather


def all_reduce_s(payload: float, workers: int, bandwidth_mbps: float, latency_s: float) -> float:
    """Seconds of a ring all-reduce of ``payload`` bytes: 2 (W - 1) hops, each with one W-th of the payload.

    ``bandwidth_mbps``: 10^6 bits a second in each direction of every worker's link; 0 = no limit.
    """
    hops = 2 * (workers - 1)
    return hops * latency_s + _wire_s(hops / workers * payload, bandwidth_mbps)


def all_gather_s(payload: float, workers: int, bandwidth_mbps: float, latency_s: float) -> float:
    """Seconds of a ring all-gather in which every worker contributes ``payload`` bytes: W - 1 hops with all of it."""
    hops = workers - 1
    return hops * latency_s + _wire_s(hops * payload, bandwidth_mbps)


def _wire_s(carried: float, bandwidth_mbps: float) -> float:
    return 8 * carried / (1e6 * bandwidth_mbps) if bandwidth_mbps else 0.0


@final
@dataclass(frozen=True)
class SimulatedLink:
    """The :class:`~descentlab.core.protocols.Link` of workers in a ring, all with links alike.

    ``bandwidth_mbps`` holds one rate, or one more than ``steps``: the i-th from update ``steps[i - 1]`` on.
    ``latency_s``: of one hop.
    """

    bandwidth_mbps: tuple[float, ...]
    latency_s: float = 0.0
    steps: tuple[int, ...] = ()

    def rate(self, step: int) -> float:
        """The rate during update ``step``, in Mbit/s; 0 = no limit."""
        return self.bandwidth_mbps[bisect_right(self.steps, step)]

    def seconds(self, request: Collective, workers: int, step: int) -> float:
        """See :class:`~descentlab.core.protocols.Link`."""
        cost = all_gather_s if isinstance(request, Gather) else all_reduce_s
        return cost(request.bytes_per_worker, workers, self.rate(step), self.latency_s)
