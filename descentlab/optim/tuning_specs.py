"""Settings of the search for learning rates that is made before a comparison."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from ..core.specs import Option, Registry


class NoTune(Option):
    """Every optimizer has the learning rate of the settings."""

    name: Literal["none"] = "none"


class GridTune(Option):
    """Each optimizer gets the rate of the smallest validation loss on a logarithmic grid around its own."""

    name: Literal["grid"] = "grid"
    each_side: NonNegativeInt = Field(3, le=20, description="rates tried above the optimizer's own, and below it")
    ratio: float = Field(2.0, gt=1, description="of one rate to the next smaller")
    steps: PositiveInt = Field(200, description="fault-free updates after which the validation loss is looked at")
    replicates: PositiveInt = Field(3, description="seeds the loss is averaged over")
    seed_offset: PositiveInt = Field(1000, description="added to seed, so that none is one of the comparison's")
    tolerance: NonNegativeFloat = Field(0.05, description="nats within which optimizers count as equally good")

    def factors(self) -> list[float]:
        """What the optimizer's own rate is multiplied by."""
        return [self.ratio**k for k in range(-self.each_side, self.each_side + 1)]


TUNES = Registry("tune", NoTune, GridTune)
TuneChoice = TUNES.field()
