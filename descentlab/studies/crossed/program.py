"""How the crossed study runs: virtual workers on a virtual clock, all conditions for the same number of updates."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.protocols import Planned
from ...core.stage import Stage
from .spec import CrossedSpec


def engine(cell: CrossedSpec) -> str:
    """The virtual clock, unless real processes are asked for: with a barrier it equals lockstep to the bit."""
    return cell.engine.name


def horizon(cell: CrossedSpec, planned: Sequence[Planned]) -> tuple[int, int]:
    """``steps`` updates; evaluated so that the last one is."""
    every = cell.observe.evaluate_every or cell.steps
    return cell.steps, (cell.steps - 1) % every


def stages(cell: CrossedSpec) -> list[Stage]:
    """One training stage per combination of conditions; the contrasts are derived from all of them."""
    settings = cell.identity()
    fault = settings.pop("fault")
    return [
        Stage("campaign", "derive", {"fault": fault, "seed": settings.get("seed")}),
        Stage("training", "train", settings, ("campaign",)),
        Stage("contrasts", "derive", {}, ("training",)),
    ]
