"""Settings of events: perturbations of anything but the operations themselves. The language is docs/events.md."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..core.specs import Option

Target = Literal["weights", "gradient", "worker_gradient", "slot", "buffer", "loss", "labels", "inputs", "batch", "lr"]
Op = Literal["set", "add", "mul", "flip", "noise", "kick", "swap"]
Moment = Literal["pre_forward", "post_forward", "pre_apply", "post_apply"]
SlotKind = Literal["momentum", "first_moment", "second_moment", "accumulator"]

_ARITHMETIC = ("set", "add", "mul", "flip", "noise")
# target -> (what can be done to it, when; the first moment is the default)
MEANING: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "weights": ((*_ARITHMETIC, "kick"), ("pre_forward", "pre_apply", "post_apply")),
    "gradient": ((*_ARITHMETIC, "kick"), ("pre_apply",)),
    "worker_gradient": ((*_ARITHMETIC, "kick"), ("post_forward",)),
    "slot": ((*_ARITHMETIC, "kick"), ("pre_apply", "post_apply")),
    "buffer": ((*_ARITHMETIC, "kick"), ("pre_forward", "post_forward")),
    "loss": (("mul",), ("post_forward",)),
    "labels": (("swap", "set", "add", "mul", "noise"), ("pre_forward",)),
    "inputs": (_ARITHMETIC, ("pre_forward",)),
    "batch": (("swap",), ("pre_forward",)),
    "lr": (("set", "add", "mul"), ("pre_apply",)),
}
NAMED = ("weights", "gradient", "worker_gradient", "slot", "buffer")  # targets that are tensors with a name
WHOLE = ("loss", "batch", "lr")  # targets without elements


class Event(Option):
    """Something goes wrong outside the operations: in weights, gradients, slots, buffers, loss, data or learning rate.

    ``op`` is done to the elements of ``target`` on every step on which the event acts: from ``step`` on for
    ``duration`` steps (none = to the end), on each ``every``-th of them, with chance ``probability`` after the first.
    """

    name: Literal["event"] = "event"
    target: Target = "weights"
    op: Op = "flip"
    magnitude: float | None = Field(None, description="the number that op needs; flip and swap need none")
    relative: bool = Field(False, description="magnitude in units of the target's own size before the event")
    parameter: str | None = Field(None, description="name of a tensor or its last part; none = all")
    slot: SlotKind | None = Field(None, description="which slot of the optimizer, where the target is slot")
    elements: PositiveInt | None = Field(None, description="number of elements, of one tensor, drawn uniformly")
    fraction: PositiveFloat | None = Field(None, le=1.0, description="share of the elements")
    index: list[NonNegativeInt] | None = Field(None, description="flat elements of the tensor 'parameter'")
    bit: NonNegativeInt | None = Field(None, description="bit that flip turns, 0 = sign; none = drawn")
    where: Moment | None = Field(None, description="moment of the step; none = the first that fits the target")
    step: NonNegativeInt | None = Field(None, description="first step; none = uniform over epochs 0 to last_epoch")
    last_epoch: NonNegativeInt = 3
    duration: PositiveInt | None = Field(1, description="steps from the first to the last; none = to the end")
    every: PositiveInt = 1
    probability: float = Field(1.0, gt=0.0, le=1.0, description="chance to act on each step after the first")
    drift: PositiveFloat = Field(1.0, description="factor on the magnitude for each step since the first")
    worker: NonNegativeInt = 0

    @property
    def moment(self) -> str:
        """When in the step the event acts."""
        return self.where or MEANING[self.target][1][0]

    @model_validator(mode="after")
    def _meaningful(self) -> Event:
        for problem in (self._target_problem(), self._mask_problem(), self._size_problem(), self._time_problem()):
            if problem:
                raise ValueError(problem)
        return self

    def _target_problem(self) -> str:
        ops, moments = MEANING[self.target]
        if self.op not in ops:
            return f"op = '{self.op}': expected one of {', '.join(ops)} for target {self.target}"
        if self.moment not in moments:
            return f"where = '{self.where}': expected one of {', '.join(moments)} for target {self.target}"
        if (self.slot is None) == (self.target == "slot"):
            return f"slot = {self.slot!r}: expected a kind of slot for target slot, none for any other"
        if self.parameter is not None and self.target not in NAMED:
            return f"parameter = '{self.parameter}': expected none for target {self.target}, which has no named tensors"
        if self.worker and self.target in ("weights", "gradient", "slot", "lr"):
            return f"worker = {self.worker}: expected 0 for target {self.target}, which is on the server"
        return ""

    def _mask_problem(self) -> str:
        given = {k: v for k in ("elements", "fraction", "index") if (v := getattr(self, k)) is not None}
        if len(given) > 1:
            key, value = given.popitem()
            return f"{key} = {value}: expected one of elements, fraction and index"
        if given and self.target in WHOLE:
            key, value = given.popitem()
            return f"{key} = {value}: expected none for target {self.target}, which has no elements"
        if self.index is not None and (not self.index or len(set(self.index)) < len(self.index)):
            return f"index = {list(self.index)}: expected different elements, at least one"
        if self.index is not None and self.parameter is None and self.target in NAMED:
            return f"index = {list(self.index)}: expected a parameter in which these elements lie"
        return ""

    def _size_problem(self) -> str:
        needed = self.op not in ("flip", "swap")
        if needed != (self.magnitude is not None):
            return f"magnitude = {self.magnitude}: expected {'a number' if needed else 'none'} for op {self.op}"
        if self.op in ("noise", "kick") and self.magnitude is not None and self.magnitude < 0:
            return f"magnitude = {self.magnitude}: expected 0 or more for op {self.op}"
        if self.relative and (self.op not in ("set", "add", "noise", "kick") or self.target in ("lr", "labels")):
            return "relative = True: expected op set, add, noise or kick on a tensor; mul is relative by itself"
        if self.drift != 1.0 and not needed:
            return f"drift = {self.drift}: expected 1 for op {self.op}, which has no magnitude"
        if self.bit is not None and self.op != "flip":
            return f"bit = {self.bit}: expected none for op {self.op}"
        return ""

    def _time_problem(self) -> str:
        once = self.duration == 1
        for key, plain in (("every", 1), ("probability", 1.0), ("drift", 1.0)):
            value = getattr(self, key)
            if once and value != plain:
                return f"{key} = {value}: expected {plain:g}, for duration = 1 means one step"
        if self.target == "slot" and self.moment == "pre_apply" and self.step == 0:
            return "step = 0: expected 1 or more; an optimizer has no slots before its first update"
        return ""

    def build(self) -> Any:
        from .events import EventModel

        return EventModel(self)


class LabelNoise(Event):
    """From a step on, each label of a batch is replaced by another class with chance ``fraction``."""

    name: Literal["label_noise"] = "label_noise"  # type: ignore[assignment]
    target: Literal["labels"] = "labels"
    op: Literal["swap"] = "swap"
    fraction: PositiveFloat | None = Field(0.1, le=1.0)
    duration: PositiveInt | None = None


class GradientNoise(Event):
    """From a step on, Gaussian noise of ``magnitude`` times the gradient's own size is added to the gradient."""

    name: Literal["gradient_noise"] = "gradient_noise"  # type: ignore[assignment]
    target: Literal["gradient", "worker_gradient"] = "gradient"
    op: Literal["noise"] = "noise"
    magnitude: NonNegativeFloat = 1.0
    relative: bool = True
    duration: PositiveInt | None = None


class Kick(Event):
    """Once, the weights are moved by ``magnitude`` times their norm in a random direction."""

    name: Literal["kick"] = "kick"  # type: ignore[assignment]
    target: Literal["weights"] = "weights"
    op: Literal["kick"] = "kick"
    magnitude: NonNegativeFloat = 0.1
    relative: bool = True


class LrSpike(Event):
    """Once, the learning rate is multiplied by ``magnitude``."""

    name: Literal["lr_spike"] = "lr_spike"  # type: ignore[assignment]
    target: Literal["lr"] = "lr"
    op: Literal["mul"] = "mul"
    magnitude: float = 100.0


class BatchSwap(Event):
    """Once, a worker computes on another batch of the same epoch."""

    name: Literal["batch_swap"] = "batch_swap"  # type: ignore[assignment]
    target: Literal["batch"] = "batch"
    op: Literal["swap"] = "swap"


EVENTS: tuple[type[Option], ...] = (Event, LabelNoise, GradientNoise, Kick, LrSpike, BatchSwap)
