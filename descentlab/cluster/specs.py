"""Settings of what goes wrong between workers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from ..core.specs import Option, Registry


class Barrier(Option):
    """Synchronous: every worker reads the current version, one update per round."""

    name: Literal["barrier"] = "barrier"
    delay_s: NonNegativeFloat = Field(0.0, description="time one worker needs for one gradient, in seconds")

    def build(self) -> Any:
        from .timeline import BarrierTimeline

        return BarrierTimeline(self.delay_s)


class ConstantStaleness(Option):
    """Every worker's gradient is taken at the weights ``staleness`` updates ago (0 = barrier); one update per round."""

    name: Literal["constant"] = "constant"
    staleness: NonNegativeInt = 2
    delay_s: NonNegativeFloat = 0.0

    def build(self) -> Any:
        from .timeline import ConstantStalenessTimeline

        return ConstantStalenessTimeline(self.staleness, self.delay_s)


class RoundRobin(Option):
    """Asynchronous: workers take turns; each update applies one gradient, W - 1 versions old (not stale: 0)."""

    name: Literal["round_robin"] = "round_robin"
    stale: bool = True
    delay_s: NonNegativeFloat = 0.0

    def build(self) -> Any:
        from .timeline import RoundRobinTimeline

        return RoundRobinTimeline(self.stale, self.delay_s)


TIMELINES = Registry("timeline", Barrier, ConstantStaleness, RoundRobin)
TimelineChoice = TIMELINES.field()
