"""Settings of what goes wrong between workers."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..core.specs import Option, Registry, Spec

LEVELS = {  # what the published flags call intensities; help text and results differ by a factor of three
    "small": 0.03,
    "medium": 0.06,
    "long": 0.09,
    "documented_small": 0.01,
    "documented_medium": 0.02,
    "documented_long": 0.03,
}
Level = Literal["small", "medium", "long", "documented_small", "documented_medium", "documented_long"]


class _Law(Option):
    """What all delay laws share."""

    slow_factor: PositiveFloat = Field(1.0, description="worker 0 has so many times the mean and the spread")
    only_slow: bool = Field(False, description="worker 0 alone is delayed, the others are not at all")

    def identity(self) -> dict[str, Any]:
        """As for every block; ``level``, added later, is left out where it is not given."""
        return {k: v for k, v in super().identity().items() if v is not None}


class _Levelled(_Law):
    """Laws with a mean that may be given by name."""

    mean_s: NonNegativeFloat = Field(0.03, description="mean time of one gradient, in seconds")
    level: Level | None = Field(None, description="the mean by its published name, in place of mean_s")

    @model_validator(mode="after")
    def _one_mean(self) -> Self:
        if self.level is not None and self.mean_s != 0.03:  # the default, as a stored block has it
            raise ValueError(f"mean_s = {self.mean_s:g}: expected no mean beside level = {self.level}")
        return self

    @property
    def mean(self) -> float:
        """Seconds."""
        return self.mean_s if self.level is None else LEVELS[self.level]


class ConstantDelay(_Levelled):
    """Every gradient takes the same time; worker 0 may be slower."""

    name: Literal["constant"] = "constant"

    def build(self) -> Any:
        from .delays import GaussianDelay

        return GaussianDelay(self.mean, 0.0, self.slow_factor, self.only_slow)


class GaussianDelayLaw(_Levelled):
    """A normal draw per worker and gradient, cut off at zero; worker 0 may be slower."""

    name: Literal["gaussian"] = "gaussian"
    std_s: NonNegativeFloat = Field(0.005, description="its standard deviation, in seconds")

    def build(self) -> Any:
        from .delays import GaussianDelay

        return GaussianDelay(self.mean, self.std_s, self.slow_factor, self.only_slow)


class ExponentialDelay(_Law):
    """Exponentially distributed times: memoryless, standard deviation = mean."""

    name: Literal["exponential"] = "exponential"
    mean_s: NonNegativeFloat = Field(0.03, description="mean time of one gradient, in seconds")

    def build(self) -> Any:
        from .delays import GammaDelay

        return GammaDelay(self.mean_s, 1.0, self.slow_factor, self.only_slow)


class GammaDelayLaw(_Law):
    """Gamma-distributed times: shape 1 is exponential, a large shape nearly constant."""

    name: Literal["gamma"] = "gamma"
    mean_s: NonNegativeFloat = Field(0.03, description="mean time of one gradient, in seconds")
    shape: PositiveFloat = Field(4.0, description="variance = mean^2 / shape")

    def build(self) -> Any:
        from .delays import GammaDelay

        return GammaDelay(self.mean_s, self.shape, self.slow_factor, self.only_slow)


class HeavyTailDelay(_Law):
    """Pareto-distributed times: rare gradients take very long."""

    name: Literal["heavy_tail"] = "heavy_tail"
    mean_s: NonNegativeFloat = Field(0.03, description="mean time of one gradient, in seconds")
    exponent: float = Field(1.5, gt=1.0, description="of the tail, above 1; up to 2 the variance is infinite")

    def build(self) -> Any:
        from .delays import ParetoDelay

        return ParetoDelay(self.mean_s, self.exponent, self.slow_factor, self.only_slow)


class CyclicDelayLaw(_Law):
    """A sine over each worker's gradients, workers out of phase: load that comes and goes."""

    name: Literal["cyclic"] = "cyclic"
    mean_s: NonNegativeFloat = Field(0.03, description="mean time of one gradient, in seconds")
    amplitude: float = Field(0.5, ge=0.0, le=1.0, description="share of the mean by which times swing")
    period: PositiveFloat = Field(50.0, description="gradients of one worker in a cycle")

    def build(self) -> Any:
        from .delays import CyclicDelay

        return CyclicDelay(self.mean_s, self.amplitude, self.period, self.slow_factor, self.only_slow)


class TraceDelayLaw(Option):
    """Measured times from a text file, a row per gradient and a column per worker (or one for all)."""

    name: Literal["trace"] = "trace"
    path: str = Field("", description="the file; times in seconds, not negative")

    def build(self) -> Any:
        from .delays import TraceDelay

        return TraceDelay(self.path)


DELAYS = Registry(
    "delay",
    ConstantDelay,
    GaussianDelayLaw,
    ExponentialDelay,
    GammaDelayLaw,
    HeavyTailDelay,
    CyclicDelayLaw,
    TraceDelayLaw,
)
DelayChoice = DELAYS.field()


class Cost(Spec):
    """What a gradient costs besides the delay, and the link it travels on."""

    compute_s: NonNegativeFloat = Field(0.0, description="time computing one gradient takes, in seconds")
    latency_s: NonNegativeFloat = Field(0.0, description="of every message, in seconds")
    bytes_per_s: PositiveFloat | None = Field(None, description="bandwidth of a link; null = infinite")
    shared_link: bool = Field(False, description="the server sends and receives one message at a time")
    message_bytes: PositiveInt | None = Field(None, description="size of a message; null = that of the weights")


class Barrier(Option):
    """Synchronous: every worker reads the current version, one update per round."""

    name: Literal["barrier"] = "barrier"
    delay_s: NonNegativeFloat = Field(0.0, description="time one worker needs for one gradient, in seconds")

    def build(self) -> Any:
        from .timeline import BarrierTimeline

        return BarrierTimeline(self.delay_s)

    def paced(self, pace: Any, workers: int) -> Any:
        """With the times of a :class:`~descentlab.cluster.pace.Pace`."""
        from .schemes import Rounds

        return Rounds(pace)


class ConstantStaleness(Option):
    """Every worker's gradient is taken at the weights ``staleness`` updates ago (0 = barrier); one update per round."""

    name: Literal["constant"] = "constant"
    staleness: NonNegativeInt = 2
    delay_s: NonNegativeFloat = 0.0

    def build(self) -> Any:
        from .timeline import ConstantStalenessTimeline

        return ConstantStalenessTimeline(self.staleness, self.delay_s)

    def paced(self, pace: Any, workers: int) -> Any:
        """With the times of a :class:`~descentlab.cluster.pace.Pace`."""
        from .schemes import Rounds

        return Rounds(pace, staleness=self.staleness)


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

    def paced(self, pace: Any, workers: int) -> Any:
        """With the times of a :class:`~descentlab.cluster.pace.Pace`."""
        from .schemes import Waiting

        return Waiting(pace)


class BoundedStaleness(Option):
    """Asynchronous, but a worker more than ``bound`` gradients ahead of the slowest waits for it."""

    name: Literal["bounded"] = "bounded"
    bound: NonNegativeInt = Field(3, description="gradients a worker may be ahead of the slowest one")
    delay: DelayChoice = GaussianDelayLaw()  # type: ignore[valid-type]

    def build(self) -> Any:
        return self.paced(_pace(self.delay), 0)

    def paced(self, pace: Any, workers: int) -> Any:
        """With the times of a :class:`~descentlab.cluster.pace.Pace`."""
        from .schemes import Waiting

        return Waiting(pace, bound=self.bound)


class Softsync(Option):
    """Asynchronous, and every update is the mean of several gradients: of W workers, W // splits."""

    name: Literal["softsync"] = "softsync"
    splits: PositiveInt = Field(2, description="n of n-softsync: 1 = all workers, W = every gradient by itself")
    delay: DelayChoice = GaussianDelayLaw()  # type: ignore[valid-type]

    def build(self) -> Any:
        from .schemes import Softsyncs

        return Softsyncs(_pace(self.delay), self.splits)

    def paced(self, pace: Any, workers: int) -> Any:
        """With the times of a :class:`~descentlab.cluster.pace.Pace`."""
        from .schemes import Softsyncs

        return Softsyncs(pace, self.splits)


class BackupWorkers(Option):
    """Synchronous rounds that do not wait for the ``backup`` slowest workers; their gradients are dropped."""

    name: Literal["backup"] = "backup"
    backup: NonNegativeInt = Field(1, description="workers a round does not wait for, fewer than there are")
    delay: DelayChoice = GaussianDelayLaw()  # type: ignore[valid-type]

    def build(self) -> Any:
        return self.paced(_pace(self.delay), 0)

    def paced(self, pace: Any, workers: int) -> Any:
        """With the times of a :class:`~descentlab.cluster.pace.Pace`."""
        from .schemes import Rounds

        return Rounds(pace, backup=self.backup)


def _pace(delay: Option) -> Any:
    from .pace import Pace

    return Pace(delay.build())


TIMELINES = Registry(
    "timeline", Barrier, ConstantStaleness, RoundRobin, Asynchronous, BoundedStaleness, Softsync, BackupWorkers
)
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
        from .zhang2016_staleness import InverseStaleness

        return InverseStaleness()


class DelayCompensation(Option):
    """g + lambda g * g * (weights now - weights read), constant or adaptive lambda (arXiv 1609.08326)."""

    name: Literal["compensation"] = "compensation"
    lam: NonNegativeFloat | None = Field(None, description="lambda; null = 0.04, or 2 when adaptive; 0 changes nothing")
    adaptive: bool = Field(False, description="divide lambda by the running root mean square of the gradient")
    decay: float = Field(0.95, ge=0.0, lt=1.0, description="of that running mean; adaptive only")

    def build(self) -> Any:
        from .zheng2017_dcasgd import AdaptiveCompensation, ConstantCompensation

        if self.adaptive:
            return AdaptiveCompensation(2.0 if self.lam is None else self.lam, self.decay)
        return ConstantCompensation(0.04 if self.lam is None else self.lam)


class GapAwareRule(Option):
    """Each gradient element over how many usual steps its weight has moved since it was read, plus 1 (1909.10802)."""

    name: Literal["gap_aware"] = "gap_aware"
    decay: float = Field(0.99, ge=0.0, lt=1.0, description="of the running mean of a usual step")

    def build(self) -> Any:
        from .barkai2020_gap_aware import GapAware

        return GapAware(self.decay)


STALENESS_RULES = Registry("staleness_rule", NoStalenessRule, InverseStalenessRule, DelayCompensation, GapAwareRule)
StalenessRuleChoice = STALENESS_RULES.field()
