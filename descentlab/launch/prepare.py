"""Everything that is decided before the first update and before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config.resolve import Resolved


def prepare(resolved: Resolved, out: Path, overwrite: bool) -> dict[str, Any]:
    """{"plan": plan.json, "campaign": campaign.jsonl, "device"}: continues the plan in ``out`` unless overwriting."""
    from .build import resolve_device  # imports torch, which a command that starts worker processes does not need
    from .plan import make_plan

    old = out / "plan.json"
    known = json.loads(old.read_text()) if old.is_file() and not overwrite else {}
    plan, campaign = make_plan(resolved, known)
    return {"plan": plan, "campaign": campaign, "device": str(resolve_device(resolved.cells[0].device))}


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
