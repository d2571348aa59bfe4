"""Settings of what goes wrong inside one step."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from ..core.specs import Option, Registry


class NoFault(Option):
    """Nothing goes wrong."""

    name: Literal["none"] = "none"

    def build(self) -> Any:
        return None


class ForwardFault(Option):
    """A transient hardware fault in the output of one forward operation.

    The value is drawn log-uniformly from ``[value_low, value_high]``, one value for all elements of a fault.
    """

    value_low: PositiveFloat = 3.6e2
    value_high: PositiveFloat = 1.2e8
    layer: str | None = Field(None, description="name of the layer to hit; none = uniform over all that can be hit")
    step: NonNegativeInt | None = Field(None, description="step to hit; none = uniform over epochs 0 to last_epoch")
    last_epoch: NonNegativeInt = 3

    @model_validator(mode="after")
    def _ordered(self) -> ForwardFault:
        if self.value_low > self.value_high:
            raise ValueError(f"value_low = {self.value_low}: expected at most value_high = {self.value_high}")
        return self

    def build(self) -> Any:
        from .forward import ForwardFaultModel

        return ForwardFaultModel(self)


class SingleForwardFault(ForwardFault):
    """One element of the output is replaced by a wrong value."""

    name: Literal["RD"] = "RD"


class VectorForwardFault(ForwardFault):
    """Sixteen consecutive elements along channels are replaced by a wrong value."""

    name: Literal["N16_RD"] = "N16_RD"


FAULTS = Registry("fault", NoFault, VectorForwardFault, SingleForwardFault)
FaultChoice = FAULTS.field()
