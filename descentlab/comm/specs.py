"""Settings of what travels between workers."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..core.specs import Option, Registry


class FixedRank(Option):
    """One rank from the first update to the last: ``compressor.rank``."""

    name: Literal["fixed"] = "fixed"

    def build(self) -> Any:
        return None


class ScheduledRank(Option):
    """Ranks that change at given updates; residuals and the columns that stay are kept."""

    name: Literal["schedule"] = "schedule"
    ranks: list[PositiveInt] = Field([4, 1], min_length=1, description="one more than steps")
    steps: list[PositiveInt] = Field([50], description="updates from which the next of the ranks holds, ascending")
    unit: Literal["step", "epoch"] = Field("step", description="what steps counts")

    @model_validator(mode="after")
    def _fits(self) -> ScheduledRank:
        if any(a >= b for a, b in itertools.pairwise(self.steps)):
            raise ValueError(f"steps = {self.steps}: expected ascending updates")
        if len(self.ranks) != len(self.steps) + 1:
            raise ValueError(
                f"ranks = {self.ranks}: expected {len(self.steps) + 1} ranks for {len(self.steps)} changes"
            )
        return self

    def build(self) -> Any:
        from .policies import RankSchedule

        return RankSchedule(tuple(self.ranks), tuple(self.steps), self.unit == "epoch")


class AccordionRank(Option):
    """Rank high while gradients change fast from epoch to epoch, low otherwise (arXiv 2010.16248)."""

    name: Literal["accordion"] = "accordion"
    low: PositiveInt = Field(1, description="rank while gradients change little")
    high: PositiveInt = Field(8, description="rank while they change much")
    threshold: PositiveFloat = Field(0.5, description="relative change of the epoch's gradient norm that is much")
    interval: PositiveInt = Field(10, description="epochs between two looks")
    warm_epochs: NonNegativeInt = Field(20, description="epochs at the start with the high rank")
    lr_cooldown: NonNegativeInt = Field(20, description="epochs with the high rank after the learning rate drops")
    rank_cooldown: NonNegativeInt = Field(0, description="epochs after a change in which nothing changes")
    lr_drop: float = Field(0.2, gt=0, lt=1, description="relative fall from one update to the next that is a drop")
    per_layer: bool = Field(False, description="decide for every matrix by its own gradient")

    @model_validator(mode="after")
    def _ordered(self) -> AccordionRank:
        if self.low > self.high:
            raise ValueError(f"low = {self.low}: expected at most high = {self.high}")
        return self

    def build(self) -> Any:
        from .adaptive import Accordion, AccordionRule

        keys = ("low", "high", "threshold", "interval", "warm_epochs", "lr_cooldown", "rank_cooldown")
        rule = AccordionRule(**{key: getattr(self, key) for key in keys})
        return Accordion(rule, self.per_layer, self.lr_drop)


class CalibratedRank(Option):
    """The largest rank whose sending takes at most a share of an update's time; again when the link's speed changes."""

    name: Literal["calibration"] = "calibration"
    candidates: list[PositiveInt] = Field([1, 2, 4, 8], min_length=1, description="ranks to try")
    comm_ratio_threshold: float = Field(0.3, gt=0, le=1, description="largest share of the time spent on sending")
    warmup_iters: NonNegativeInt = Field(5, description="messages not counted, where processes measure the link")
    measure_iters: PositiveInt = Field(20, description="messages counted, where processes measure the link")
    check_every: PositiveInt = Field(100, description="updates between looks at the link's speed")
    tolerance: PositiveFloat = Field(0.25, description="relative change of the time of sending that asks for a new one")
    then: Literal["fixed", "accordion"] = Field("fixed", description="stay at the rank, or go up to it by accordion")
    accordion: AccordionRank = Field(AccordionRank(), description="its settings; high is the calibrated rank")

    def build(self) -> Any:
        from .adaptive import Calibration

        accordion = self.accordion.build() if self.then == "accordion" else None
        return Calibration(
            self.candidates,
            self.comm_ratio_threshold,
            accordion,
            check=self.check_every,
            tolerance=self.tolerance,
            measuring=(self.warmup_iters, self.measure_iters),
        )


class BudgetRank(Option):
    """Ranks per matrix within a budget per update, spread by how much of the gradient each direction holds."""

    semantics: ClassVar[int] = 2
    name: Literal["budget"] = "budget"
    kilobytes: PositiveFloat | None = Field(None, description="of low-rank factors one worker may send in one update")
    milliseconds: PositiveFloat | None = Field(None, description="that sending may take; given instead of kilobytes")
    max_rank: PositiveInt = Field(8, description="largest rank, that of every look")
    look: PositiveInt = Field(5, description="updates of a look, in which all matrices have max_rank")
    every: PositiveInt = Field(500, description="updates from one look to the next")

    @model_validator(mode="after")
    def _one_budget(self) -> BudgetRank:
        if (self.kilobytes is None) == (self.milliseconds is None):
            raise ValueError("expected one of kilobytes and milliseconds")
        if self.look >= self.every:
            raise ValueError(f"look = {self.look}: expected fewer updates than every = {self.every}")
        return self

    def build(self) -> Any:
        from .adaptive import Budget

        unit, budget = ("bytes", self.kilobytes or 0.0) if self.milliseconds is None else ("seconds", self.milliseconds)
        scale = 1e3 if unit == "bytes" else 1e-3
        return Budget(budget * scale, unit, most=self.max_rank, look=self.look, every=self.every)  # type: ignore[arg-type]


POLICIES = Registry("policy", FixedRank, ScheduledRank, AccordionRank, CalibratedRank, BudgetRank)
PolicyChoice = POLICIES.field()


class NoCompression(Option):
    """Gradients travel as they are and are averaged."""

    name: Literal["none"] = "none"

    def build(self) -> Any:
        from .dense import Dense

        return Dense()


class HalfPrecision(Option):
    """Gradients travel rounded to 16-bit floats; what rounding takes away is added to the next gradient."""

    def build(self) -> Any:
        from .half import HalfPrecision as Built

        return Built(self.name)  # type: ignore[arg-type]


class Fp16(HalfPrecision):
    """16-bit floats of IEEE 754 (largest number 65504), with error feedback."""

    name: Literal["fp16"] = "fp16"


class Bf16(HalfPrecision):
    """16-bit floats with the range of 32-bit ones (bfloat16), with error feedback."""

    name: Literal["bf16"] = "bf16"


class TopKElements(Option):
    """The largest elements of every tensor travel, with their places; the others are added to the next gradient."""

    name: Literal["topk"] = "topk"
    fraction: float = Field(0.01, gt=0, le=1, description="share of each tensor's elements that is sent")

    def build(self) -> Any:
        from .topk import TopK

        return TopK(self.fraction)


class Signs(Option):
    """One bit per element and one scale per tensor, with error feedback (arXiv 1901.09847)."""

    name: Literal["sign"] = "sign"

    def build(self) -> Any:
        from .sign import SignSgd

        return SignSgd()


class PowerSgd(Option):
    """Low-rank compression with error feedback and warm start (arXiv 1905.13727, Algorithm 1)."""

    name: Literal["powersgd"] = "powersgd"
    rank: PositiveInt = Field(1, description="rank of the approximation of every matrix-shaped gradient")
    policy: PolicyChoice = FixedRank()  # type: ignore[valid-type]
    min_compression_rate: float = Field(
        1.0,
        ge=1,
        description="a matrix travels whole unless its two factors are so many times smaller (torch's hook: 2)",
    )
    start_iteration: NonNegativeInt = Field(0, description="updates at the start that travel whole")
    error_feedback: bool = Field(True, description="add what was not sent to the next gradient")
    warm_start: bool = Field(True, description="begin with the last update's Q, not a fresh one")

    def identity(self) -> dict[str, Any]:
        """As for every block; ``policy`` is left out at its default, as in ids made before it existed."""
        out = super().identity()
        if self.policy == FixedRank():
            del out["policy"]
        return out

    @model_validator(mode="after")
    def _one_rank(self) -> PowerSgd:
        policy: Option = self.policy
        if policy.name != "fixed" and self.rank != 1:
            raise ValueError(f"rank = {self.rank}: expected no rank beside policy = {policy.name}")
        return self

    def build(self) -> Any:
        from .powersgd import PowerSGD

        return PowerSGD(
            self.rank,
            min_compression_rate=self.min_compression_rate,
            start_iteration=self.start_iteration,
            error_feedback=self.error_feedback,
            warm_start=self.warm_start,
        )


class TorchPowerSgd(Option):
    """torch's own PowerSGD hook, to compare with: real processes, one bucket, two updates whole at the start."""

    name: Literal["torch_powersgd"] = "torch_powersgd"
    rank: PositiveInt = Field(1, description="rank of the approximation of every matrix-shaped gradient")
    min_compression_rate: float = Field(2.0, ge=1, description="as for powersgd")

    def build(self) -> Any:
        """Its stand-in where a compressor object is asked for; the hook is made by the processes."""
        from .powersgd import PowerSGD

        return PowerSGD(self.rank, min_compression_rate=self.min_compression_rate, start_iteration=2)


COMPRESSORS = Registry("compressor", NoCompression, Fp16, Bf16, TopKElements, Signs, PowerSgd, TorchPowerSgd)
CompressorChoice = COMPRESSORS.field()
