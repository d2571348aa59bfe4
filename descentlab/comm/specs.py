"""Settings of what travels between workers."""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

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

        return RankSchedule(tuple(self.ranks), tuple(self.steps))


POLICIES = Registry("policy", FixedRank, ScheduledRank)
PolicyChoice = POLICIES.field()


class NoCompression(Option):
    """Gradients travel as they are and are averaged."""

    name: Literal["none"] = "none"

    def build(self) -> Any:
        from .dense import Dense

        return Dense()


class PowerSgd(Option):
    """Low-rank compression with error feedback and warm start (arXiv 1905.13727, Algorithm 1)."""

    name: Literal["powersgd"] = "powersgd"
    rank: PositiveInt = Field(1, description="rank of the approximation of every matrix-shaped gradient")
    policy: PolicyChoice = FixedRank()  # type: ignore[valid-type]

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

        return PowerSGD(self.rank)


COMPRESSORS = Registry("compressor", NoCompression, PowerSgd)
CompressorChoice = COMPRESSORS.field()
