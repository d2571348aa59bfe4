"""How the recovery study runs: train to the fault, fork, train on for ``recovery_steps`` updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core.protocols import Planned
from ...core.stage import Stage
from .spec import RecoverySpec


def engine(cell: RecoverySpec) -> str:
    """One worker, no delays."""
    return "lockstep"


def horizon(cell: RecoverySpec, planned: Sequence[Planned]) -> tuple[int, int]:
    """The hit step and ``recovery_steps`` more; evaluations are counted from the hit."""
    hit = planned[0].step
    return hit + 1 + cell.recovery_steps, hit


def stages(cell: RecoverySpec) -> list[Stage]:
    """The campaign needs no weights; the prefix depends on it only through its length; the fork on both."""
    settings = cell.identity()
    fault = settings.pop("fault")
    workload = {k: settings.get(k) for k in ["dataset", "model", "seed", "batch_size", "dtype"]}
    workload |= {k: settings[k] for k in ["sampler"] if k in settings}
    after = {"recovery_steps": settings.pop("recovery_steps", None)}
    return [
        Stage("campaign", "derive", {**workload, "fault": fault}),
        *(_led(cell, settings, after) if cell.protocol != "scratch" else _trained(settings, after)),
        Stage("comparison", "derive", {}, ("recovery",)),
    ]


def _trained(settings: dict[str, Any], after: dict[str, Any]) -> list[Stage]:
    """One optimizer from the start to the end."""
    return [
        Stage("prefix", "train", settings, ("campaign",)),
        Stage("recovery", "train", after, ("campaign", "prefix"), fork=2),
    ]


def _led(cell: RecoverySpec, settings: dict[str, Any], after: dict[str, Any]) -> list[Stage]:
    """The baseline up to the fault, the update with it and without, and from there every optimizer; what tracks the
    gradients begins with the prefix."""
    keys = ("protocol", "optimizer", "carry_state")
    own: dict[str, Any] = {key: settings.pop(key) for key in keys if key in settings}
    tracked = {"tracked": own["optimizer"]} if cell.protocol == "shadow" else {}
    return [
        Stage("prefix", "train", {**settings, **tracked}, ("campaign",)),
        Stage("strike", "train", {}, ("campaign", "prefix"), fork=2),
        Stage("recovery", "train", {**after, **own}, ("strike",)),
    ]
