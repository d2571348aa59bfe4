"""How the recovery study runs: train to the fault, fork, train on for ``recovery_steps`` updates."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.protocols import Planned
from .spec import RecoverySpec


def engine(cell: RecoverySpec) -> str:
    """One worker, no delays."""
    return "lockstep"


def horizon(cell: RecoverySpec, planned: Sequence[Planned]) -> tuple[int, int]:
    """The hit step and ``recovery_steps`` more; evaluations are counted from the hit."""
    hit = planned[0].step
    return hit + 1 + cell.recovery_steps, hit
