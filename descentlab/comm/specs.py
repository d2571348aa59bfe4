"""Settings of what travels between workers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from ..core.specs import Option, Registry


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

    def build(self) -> Any:
        from .powersgd import PowerSGD

        return PowerSGD(self.rank)


COMPRESSORS = Registry("compressor", NoCompression, PowerSgd)
CompressorChoice = COMPRESSORS.field()
