"""The simulated link between workers: every collective takes a + b bytes."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import final

from ..core.protocols import Collective, Gather
from ..core.ring import all_gather_s, all_reduce_s


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
