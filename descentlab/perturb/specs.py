"""Settings of what goes wrong inside one step."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..core.specs import Option, Registry
from .catalogue import TYPES, FaultType
from .event_specs import EVENTS
from .replay_specs import Replay

Word = Literal["float32", "bfloat16", "float16"]
Direction = Literal["forward", "grad_input", "grad_weight", "backward", "any"]
ValueMode = Literal["native", "fixed", "log_uniform", "list"]
Places = Annotated[list[NonNegativeInt], Field(min_length=1)]

_READS = {"native": (), "fixed": ("value",), "log_uniform": ("value_low", "value_high"), "list": ("values",)}


class NoFault(Option):
    """Nothing goes wrong."""

    name: Literal["none"] = "none"

    def build(self) -> Any:
        return None


class HardwareFault(Option):
    """A transient fault in one operation of one step. Where and what follows from the type and these settings.

    In ``log_uniform`` and ``list`` mode one value is drawn and given to all elements of a fault. A value that differs
    from its default although the chosen mode does not read it is an error.
    """

    direction: Direction = Field(
        "forward", description="the operation that goes wrong: the result, the gradient of the input or of the weight; "
        "backward = uniform over both gradients, any = uniform over all three",
    )  # fmt: skip
    layer: str | None = Field(
        None, description="name of the layer to hit; none = uniform over all; each (recovery) = every one in turn"
    )
    step: NonNegativeInt | None = Field(None, description="step to hit; none = uniform over epochs 0 to last_epoch")
    last_epoch: NonNegativeInt = 3
    index: Places | list[Places] | None = Field(
        None, description="elements to hit, flat in torch's order or as coordinates; none = drawn"
    )
    value_mode: ValueMode = Field("native", description="native = as the type of fault makes them")
    value: float | None = Field(None, description="of value_mode=fixed")
    value_low: PositiveFloat = Field(3.6e2, description="of value_mode=log_uniform")
    value_high: PositiveFloat = Field(1.2e8, description="of value_mode=log_uniform")
    values: list[float] = Field([], description="of value_mode=list; one is drawn uniformly")

    @property
    def kind(self) -> FaultType:
        """What the type means."""
        return TYPES[self.name]

    @model_validator(mode="after")
    def _consistent(self) -> HardwareFault:
        self._refuse_unread()
        if self.value_low > self.value_high:
            raise ValueError(f"value_low = {self.value_low}: expected at most value_high = {self.value_high}")
        if self.value_mode == "fixed" and self.value is None:
            raise ValueError("value = None: expected a number, for value_mode = fixed")
        if self.value_mode == "list" and not self.values:
            raise ValueError("values = []: expected at least one number, for value_mode = list")
        return self

    def _refuse_unread(self) -> None:
        """A setting that the others make meaningless is refused: it would be ignored otherwise."""
        for mode, keys in _READS.items():
            for key in keys if mode != self.value_mode else ():
                if self._changed(key):
                    hint = f"value_mode = {mode}, for this is {self.value_mode} (fault={self.name} drops it)"
                    raise ValueError(f"{key} = {getattr(self, key)}: expected {hint}")
        if self._changed("word") and self.value_mode != "native":
            raise ValueError(
                f"word = {getattr(self, 'word', None)}: expected value_mode = native, the one that draws bits"
            )
        if self._changed("max_span") and self.index is not None:
            raise ValueError(
                f"max_span = {getattr(self, 'max_span', None)}: expected no index, which fixes the elements"
            )

    def _changed(self, key: str) -> bool:
        field = type(self).model_fields.get(key)
        return field is not None and getattr(self, key) != field.get_default(call_default_factory=True)

    def identity(self) -> dict[str, Any]:
        """As for any block, but ``value_mode`` always enters unless it is log_uniform: that was once the only mode, and
        runs of that time keep their ids."""
        out = super().identity() | {"value_mode": self.value_mode}
        if self.value_mode == "log_uniform":
            del out["value_mode"]
        return out

    def build(self) -> Any:
        from .hardware import HardwareFaultModel

        return HardwareFaultModel(self)


class _Bits(HardwareFault):
    """A fault that touches bits."""

    word: Word = Field("float32", description="number format whose bits are flipped or drawn")


class _Span(HardwareFault):
    """A fault that lasts several cycles."""

    max_span: PositiveInt | None = Field(
        64, description="most consecutive runs of a span; null = up to the end of the tensor, as published"
    )


class Input(_Bits):
    """One element of the input: one bit flipped."""

    name: Literal["INPUT"] = "INPUT"


class Input16(_Bits):
    """One element of the input, as 16 multiply lanes see it: one bit flipped."""

    name: Literal["INPUT_16"] = "INPUT_16"


class Wt(_Bits):
    """One element of the weight: one bit flipped."""

    name: Literal["WT"] = "WT"


class Wt16(_Bits):
    """One element of the weight, as 16 multiply lanes see it: one bit flipped."""

    name: Literal["WT_16"] = "WT_16"


class Rbflip(_Bits):
    """One element of the result: one bit flipped."""

    name: Literal["RBFLIP"] = "RBFLIP"


class Rd(_Bits):
    """One element of the result: a random finite bit pattern."""

    name: Literal["RD"] = "RD"


class RdCorrect(HardwareFault):
    """One element of the result: a copy of another element."""

    name: Literal["RD_CORRECT"] = "RD_CORRECT"


class Zero(HardwareFault):
    """One element of the result: 0."""

    name: Literal["ZERO"] = "ZERO"


class N16Rd(_Bits):
    """16 elements of the result along channels: random finite bit patterns."""

    name: Literal["N16_RD"] = "N16_RD"


class N16RdCorrect(HardwareFault):
    """16 elements of the result along channels: copies of other elements."""

    name: Literal["N16_RD_CORRECT"] = "N16_RD_CORRECT"


class RdGlb(_Bits, _Span):
    """A span of runs of 16 elements of the result: random finite bit patterns."""

    name: Literal["RD_GLB"] = "RD_GLB"


class RdCorrectGlb(_Span):
    """A span of runs of 16 elements of the result: copies of other elements."""

    name: Literal["RD_CORRECT_GLB"] = "RD_CORRECT_GLB"


class N64Input(HardwareFault):
    """64 elements of the input along channels: copies of other elements."""

    name: Literal["N64_INPUT"] = "N64_INPUT"


class N64Wt(HardwareFault):
    """64 elements of the weight along output channels: copies of other elements."""

    name: Literal["N64_WT"] = "N64_WT"


class N64Input16(HardwareFault):
    """64 elements of the input, as 16 multiply lanes see them: copies of other elements."""

    name: Literal["N64_INPUT_16"] = "N64_INPUT_16"


class N64Wt16(HardwareFault):
    """64 elements of the weight, as 16 multiply lanes see them: copies of other elements."""

    name: Literal["N64_WT_16"] = "N64_WT_16"


class N64InputGlb(_Span):
    """A span of runs of 64 elements of the input: copies of other elements."""

    name: Literal["N64_INPUT_GLB"] = "N64_INPUT_GLB"


class N64WtGlb(_Span):
    """A span of runs of 64 elements of the weight: copies of other elements."""

    name: Literal["N64_WT_GLB"] = "N64_WT_GLB"


HARDWARE: tuple[type[HardwareFault], ...] = (
    Input, Input16, Wt, Wt16, Rbflip, Rd, RdCorrect, Zero, N16Rd, N16RdCorrect, RdGlb, RdCorrectGlb,
    N64Input, N64Wt, N64Input16, N64Wt16, N64InputGlb, N64WtGlb,
)  # fmt: skip
FAULTS = Registry("fault", NoFault, *HARDWARE, *EVENTS, Replay)
FaultChoice = FAULTS.field()
