"""Settings of what goes wrong between workers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from ..core.specs import Option, Registry


class ConstantDelay(Option):
    """Every gradient takes the same time; worker 0 may be slower."""

    name: Literal["constant"] = "constant"
    mean_s: NonNegativeFloat = Field(0.03, description="time one worker needs for one gradient, in seconds")
    slow_factor: PositiveFloat = Field(1.0, description="worker 0 needs so many times as long")

    def build(self) -> Any:
        from .timeline import GaussianDelay

        return GaussianDelay(self.mean_s, 0.0, self.slow_factor)


class GaussianDelayLaw(Option):
    """A normal draw per worker and gradient, cut off at zero; worker 0 may be slower."""

    name: Literal["gaussian"] = "gaussian"
    mean_s: NonNegativeFloat = Field(0.03, description="mean time of one gradient, in seconds")
    std_s: NonNegativeFloat = Field(0.005, description="its standard deviation, in seconds")
    slow_factor: PositiveFloat = Field(1.0, description="worker 0 has so many times the mean and the deviation")

    def build(self) -> Any:
        from .timeline import GaussianDelay

        return GaussianDelay(self.mean_s, self.std_s, self.slow_factor)


DELAYS = Registry("delay", ConstantDelay, GaussianDelayLaw)
DelayChoice = DELAYS.field()


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


class Asynchronous(Option):
    """Nobody waits: every gradient is one update, as old as its worker was slow."""

    name: Literal["asynchronous"] = "asynchronous"
    delay: DelayChoice = GaussianDelayLaw()  # type: ignore[valid-type]

    def build(self) -> Any:
        from .timeline import AsynchronousTimeline

        delay: Option = self.delay
        return AsynchronousTimeline(delay.build())


TIMELINES = Registry("timeline", Barrier, ConstantStaleness, RoundRobin, Asynchronous)
TimelineChoice = TIMELINES.field()


class NoStalenessRule(Option):
    """A late gradient counts like any other."""

    name: Literal["none"] = "none"

    def build(self) -> Any:
        return None


class InverseStalenessRule(Option):
    """A gradient that is tau > 1 updates old is divided by tau (arXiv 1511.05950)."""

    name: Literal["inverse_staleness"] = "inverse_staleness"

    def build(self) -> Any:
        from .staleness import InverseStaleness

        return InverseStaleness()


STALENESS_RULES = Registry("staleness_rule", NoStalenessRule, InverseStalenessRule)
StalenessRuleChoice = STALENESS_RULES.field()
