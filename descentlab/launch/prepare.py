"""Everything that is decided before the first update and before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config.resolve import Resolved


def prepare(resolved: Resolved, out: Path, overwrite: bool) -> dict[str, Any]:
    """{"plan": plan.json, "campaign": campaign.jsonl, "device", "notices": lines for the user, "data_order": a
    hash}: continues the plan in ``out`` unless overwriting."""
    # imports torch, which a command that starts worker processes does not need
    from .build import data_order, resolve_device
    from .compiled import KEY, decide
    from .memory import naming_the_knob
    from .notices import notices as notices_of
    from .plan import make_plan

    old = out / "plan.json"
    known = json.loads(old.read_text()) if old.is_file() and not overwrite else {}
    if known and resolved.cells[0].members_per_block:
        known = {**known, "blocks": [b for b in known["blocks"] if _stays(b, out, resolved.cells[0].members_per_block)]}
    with naming_the_knob("planning"):
        plan, campaign = make_plan(resolved, known)
    plan[KEY], notices = decide(known, resolved.cells)
    notices += notices_of(resolved.cells)
    device = str(resolve_device(resolved.cells[0].device))
    order = data_order(resolved.cells[0])
    return {"plan": plan, "campaign": campaign, "device": device, "notices": notices, "data_order": order}


def warm_up(resolved: Resolved) -> None:
    """Load what the blocks of a study need first: its data and the compiled code."""
    from .build import workload
    from .compiled import missing

    workload(resolved.cells[0])
    missing(resolved.cells[0].dtype)


def _stays(block: dict[str, Any], out: Path, most: int) -> bool:
    """Whether a block of an earlier plan is kept: not if nothing of it is stored and it is too large now."""
    folder = out / "blocks" / block["key"]
    return len(block["runs"]) <= most or any((folder / name).exists() for name in ("checkpoint.pt", "done.json"))


def layers_of(cell: Any) -> list[str]:
    """The layers that the cell's fault, or any forward hardware fault where it has none, can hit; first one first."""
    from ..perturb.hardware import layers_with
    from .build import survey

    return layers_with(survey(cell).operations, getattr(getattr(cell, "fault", None), "direction", "forward"))


def resolved_rows(resolved: Resolved) -> list[dict[str, Any]]:
    """One line per run: id, cell, replicate, role, labels, settings."""
    settings = [cell.model_dump(mode="json") for cell in resolved.cells]
    return [
        {
            "id": r.id,
            "cell": r.cell,
            "replicate": r.replicate,
            "role": r.role,
            "labels": dict(r.labels),
            "settings": settings[r.cell],
        }
        for r in resolved.runs
    ]
