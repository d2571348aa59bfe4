"""Recovery arms from settings: what they need of optimizer and model is looked at before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import ValidationError

from ..core.errors import UserError
from ..core.protocols import Apply, Arm
from ..core.specs import External, Option
from ..optim.eager import step
from ..optim.specs import OPTIMIZERS
from ..optim.stacked import StackedOptimizer
from ..optim.switched import Switched
from ..perturb.arm_specs import Reexecute, Switch, Watching
from ..perturb.arms import FIRST_MOMENTS
from ..perturb.inversion import AdamInverse, inverse_of

METHODS = ("start", "edit", "check", "act")


def arm_of(cell: Any) -> Arm | None:
    """The recovery arm of a cell; None without one. A third party's class that is no arm is a UserError."""
    spec = getattr(cell, "arm", None)
    if spec is None:
        return None
    try:
        arm = spec.build()
    except TypeError as error:
        raise UserError("arm.options", getattr(spec, "options", {}), f"arguments of {spec.name} ({error})") from None
    if isinstance(spec, External):
        missing = [name for name in (*METHODS, "name", "keeps", "rewinds") if not hasattr(arm, name)]
        if missing:
            raise UserError("arm", spec.name, f"a recovery arm: {', '.join(missing)} missing")
    if isinstance(spec, Reexecute) and spec.keep == "gradients":
        arm.inverse = _inverse(cell)
    return arm


def _inverse(cell: Any) -> AdamInverse:
    timeline = getattr(getattr(cell, "timeline", None), "name", "barrier")
    found = inverse_of(cell.optimizer) if timeline == "barrier" else f"timeline barrier, not {timeline}"
    if isinstance(found, str):
        raise UserError("arm.keep", "gradients", found)
    return found


def with_switch(cell: Any, optimizer: Any) -> Apply:
    """The optimizer of a cell, with the one its members may go over to."""
    spec = getattr(cell, "arm", None)
    if not isinstance(spec, Switch):
        return optimizer
    other = _other(spec)
    return Switched(optimizer, StackedOptimizer(other.build()), float(other.lr))  # type: ignore[attr-defined]


def _other(spec: Switch) -> Option:
    try:
        return OPTIMIZERS.parse(spec.to)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["arm.to", *(str(part) for part in first["loc"])])
        raise UserError(key, first.get("input"), f"an optimizer's setting ({first['msg']})") from None
    except UserError as error:
        raise UserError("arm.to", spec.to, f"an optimizer ({error})") from None


def check_arm(cell: Any, buffers: Iterable[str]) -> None:
    """A UserError when the arm needs state that the optimizer or the model (``buffers``: names) has not."""
    spec = getattr(cell, "arm", None)
    if arm_of(cell) is None or spec is None:
        return
    if isinstance(spec, Switch):
        _other(spec)
    if not isinstance(spec, Watching):
        return
    slots, name = gradient_slots(cell), cell.optimizer.name
    normed = any(buffer.endswith("running_var") for buffer in buffers)
    if spec.check == "published" and not slots & FIRST_MOMENTS:
        raise UserError("arm.check", "published", f"an optimizer with a first moment, which {name} has not")
    if spec.slot_bound is not None and not slots:
        raise UserError(
            "arm.slot_bound", spec.slot_bound, f"an optimizer that remembers gradients, which {name} does not"
        )
    if spec.variance_bound is not None and not normed:
        raise UserError("arm.variance_bound", spec.variance_bound, "a model with BatchNorm")
    if not slots and not normed:
        expected = (
            f"an optimizer that remembers gradients or a model with BatchNorm ({name} and the model have neither)"
        )
        raise UserError("arm", spec.name, expected)


def gradient_slots(cell: Any) -> frozenset[str]:
    """Slots of the cell's optimizer that have the shape of the weights, found by one step on a small tensor."""
    rule = cell.optimizer.build()
    p = torch.ones(2, 3, requires_grad=True)
    p.grad = torch.ones(2, 3)
    optimizer = rule.make([p], rule.lr)
    step(optimizer)
    found = optimizer.state[p].items()
    return frozenset(k for k, v in found if isinstance(v, torch.Tensor) and v.shape == p.shape)
