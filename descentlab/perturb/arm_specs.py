"""Settings of recovery arms: what watches the training state, and what is done when something is wrong."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from ..core.specs import Option, Registry


class NoArm(Option):
    """Nothing watches, nothing is changed."""

    name: Literal["none"] = "none"

    def build(self) -> Any:
        return None


class Watching(Option):
    """Bounds on what an optimizer remembers of its gradients and on BatchNorm's running variance, per member.

    A bound that is not given is ``factor`` times the largest value this member has had accepted so far. Second
    moments count by their square root, so that one number fits every slot.
    """

    check: Literal["all", "published"] = Field(
        "all", description="published: first moments of convolution kernels from above only, no variance"
    )
    slot_bound: PositiveFloat | None = Field(None, description="largest gradient a slot may remember")
    variance_bound: PositiveFloat | None = Field(None, description="largest running variance")
    factor: float = Field(10.0, gt=1, description="calibrated bounds: so many times the largest value accepted so far")
    max_attempts: NonNegativeInt = Field(1, description="times in a row something is done before the value is accepted")

    def action(self) -> Any:
        """The :class:`~descentlab.perturb.arms.Action` of this arm."""
        raise TypeError(f"{type(self).__name__} has no action()")

    def build(self) -> Any:
        from .arms import Bounds, GuardedArm

        return GuardedArm(self.name, Bounds(self), self.action(), self.max_attempts)


class BoundCheck(Watching):
    """Bounds are checked and what is found is recorded; nothing is changed."""

    name: Literal["bounds"] = "bounds"
    max_attempts: NonNegativeInt = Field(0, le=0, description="nothing is done, so nothing is tried")

    def action(self) -> Any:
        from .arms import Action

        return Action()


class Reexecute(Watching):
    """Beyond a bound the last steps are undone and executed again."""

    name: Literal["reexecute"] = "reexecute"
    steps: PositiveInt = Field(2, description="steps to go back")
    keep: Literal["states", "gradients"] = Field(
        "states", description="gradients: undone by inverting Adam, as published; buffers are not taken back"
    )

    def action(self) -> Any:
        from .arms import Action

        return Action(keeps=self.steps, rewinds=True)


class Skip(Watching):
    """Beyond a bound the update is undone: weights, slots and buffers are as before it."""

    name: Literal["skip"] = "skip"
    keep_slots: bool = Field(False, description="undo the weights only, as published; slots and buffers stay")

    def action(self) -> Any:
        from .arms import SkipUpdate

        return SkipUpdate(self.keep_slots)


class Reset(Watching):
    """Beyond a bound the optimizer forgets everything and BatchNorm's running statistics start again."""

    name: Literal["reset"] = "reset"

    def action(self) -> Any:
        from .arms import ResetSlots

        return ResetSlots()


class Switch(Watching):
    """Beyond a bound the update is undone and another optimizer goes on at its own constant rate."""

    name: Literal["switch"] = "switch"
    to: Any = Field({"name": "sgd", "lr": 0.01}, description="an optimizer: a name or a block")

    def action(self) -> Any:
        from .arms import SwitchOptimizer

        return SwitchOptimizer()


class Clip(Option):
    """Every gradient is scaled to a norm of at most ``max_norm``; nothing is detected."""

    name: Literal["clip"] = "clip"
    max_norm: PositiveFloat = 1.0

    def build(self) -> Any:
        from .arms import ClipGradient, Detector, GuardedArm

        return GuardedArm(self.name, Detector(), ClipGradient(self.max_norm), 1)


class Sanitise(Option):
    """Non-finite gradients become 0, non-finite weights, slots and buffers what they were before the update."""

    name: Literal["sanitise"] = "sanitise"

    def build(self) -> Any:
        from .arms import GuardedArm, NonFinite, RestoreNonFinite

        return GuardedArm(self.name, NonFinite(), RestoreNonFinite(), None)


ARMS = Registry("arm", NoArm, BoundCheck, Reexecute, Skip, Clip, Reset, Switch, Sanitise)
ArmChoice = ARMS.field()
