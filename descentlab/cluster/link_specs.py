"""Settings of the link between workers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from ..core.specs import Option, Registry


class SimulatedLinkSpec(Option):
    """A clock instead of a network: a collective takes a + b bytes, as a ring of workers does. Needs no privileges."""

    name: Literal["simulated"] = "simulated"
    bandwidth_mbps: NonNegativeFloat = Field(100.0, description="10^6 bits a second each way; 0 = no limit")
    latency_ms: NonNegativeFloat = Field(0.0, description="of one hop, in milliseconds")
    changes: dict[PositiveInt, NonNegativeFloat] = Field(
        default_factory=dict, description="update -> bandwidth_mbps from it on, such as {200: 20}"
    )

    def build(self) -> Any:
        from .link import SimulatedLink

        steps = tuple(sorted(self.changes))
        rates = (self.bandwidth_mbps, *(self.changes[step] for step in steps))
        return SimulatedLink(rates, self.latency_ms / 1e3, steps)


class RealLinkSpec(Option):
    """Network namespaces of this machine, one for each worker, joined by a bridge with a token bucket at both ends.

    Needs root (or CAP_NET_ADMIN and CAP_SYS_ADMIN) and the programs ip and tc.
    """

    name: Literal["real"] = "real"
    bandwidth_mbps: NonNegativeFloat = Field(100.0, description="10^6 bits a second each way; 0 = no limit")
    ingress_mbps: NonNegativeFloat | None = Field(None, description="towards a worker, where that differs")
    latency_ms: NonNegativeFloat = Field(0.0, description="one way, by netem or a link in user space")
    jitter_ms: NonNegativeFloat = Field(0.0, description="standard deviation of latency_ms")
    loss_pct: float = Field(0.0, ge=0, lt=100, description="packets lost, in percent")
    burst_kb: NonNegativeInt = Field(0, description="token bucket, in kilobytes; 0 = 4 up to 100 Mbit/s, else 256")
    changes: dict[PositiveInt, NonNegativeFloat] = Field(
        default_factory=dict, description="update -> bandwidth_mbps from about it on, such as {200: 20}"
    )

    @model_validator(mode="after")
    def _fits(self) -> RealLinkSpec:
        if self.jitter_ms and not self.latency_ms:
            raise ValueError(f"jitter_ms = {self.jitter_ms:g}: expected a latency_ms beside it")
        return self

    def build(self) -> Any:
        """Nothing to simulate: the processes' clock says what sending costs."""
        return None


class NoLink(Option):
    """Processes talk as fast as this machine lets them; in lockstep sending takes no time."""

    name: Literal["none"] = "none"

    def build(self) -> Any:
        return None


LINKS = Registry("link", NoLink, SimulatedLinkSpec, RealLinkSpec)
LinkChoice = LINKS.field()
