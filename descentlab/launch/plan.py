"""Packs runs into blocks and writes the decision down once, so that resume, pool and cluster obey the same plan."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..cluster.timeline import place
from ..config.identity import canonical
from ..config.resolve import Resolved
from ..config.tree import Run, StudyDef
from ..core.errors import StudyError, UserError
from ..core.opmode import Site as OpSite
from ..core.protocols import Planned
from ..core.stage import Stage, stage_keys
from ..engine.program import MEMBERS_PER_BLOCK, BlockPlan, Route, RunPlan
from ..engine.support import ROOMS, refusal
from .build import Site, plan_fault, survey

SEMANTICS = 1  # raised when the same plan would compute something else


class Program(Protocol):
    """What a study's ``program`` module says about one cell."""

    def engine(self, cell: Any) -> str:
        """``lockstep`` or ``virtual``."""
        ...

    def horizon(self, cell: Any, planned: Sequence[Planned]) -> tuple[int, int]:
        """(updates to make, step from which evaluations are counted)."""
        ...

    def stages(self, cell: Any) -> Sequence[Stage]:
        """What is done to one cell, inputs first; the last ``train`` stage is what its blocks compute."""
        ...


@dataclass(frozen=True)
class Block:
    """A block and the settings its parts are built from."""

    plan: BlockPlan
    engine: str
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        return self.plan.key


def program_of(study: StudyDef) -> Any:
    """The study's program module."""
    return importlib.import_module(study.module)


def group_text(cell: Any) -> str:
    """Cells that differ in their fault only may share blocks: canonical text of everything else."""
    settings = cell.model_dump(mode="json")
    for key in ("fault", *(k for k, f in type(cell).model_fields.items() if _is_extent(f))):
        settings.pop(key, None)
    return canonical(settings)


def _is_extent(field: Any) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("extent"))


def make_plan(resolved: Resolved, known: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(plan.json, campaign.jsonl) for the resolved study.

    ``known`` is the plan already on disk: its blocks stay as they are, only runs it does not hold are packed anew.
    """
    program = program_of(resolved.study)
    held = {run for block in known.get("blocks", []) for run in block["runs"]}
    blocks, campaign = list(known.get("blocks", [])), []
    groups: dict[str, list[Run]] = {}
    for run in resolved.runs:
        groups.setdefault(group_text(resolved.cells[run.cell]), []).append(run)
    sites: dict[str, Site] = {}
    for runs in groups.values():
        cells = {run.cell: resolved.cells[run.cell] for run in runs}
        for cell in cells.values():
            _check_supported(program.engine(cell), cell)
        first = next(iter(cells.values()))
        site = sites.setdefault(_model_text(first), survey(first))
        planned = _plan_group(cells, runs, site)
        campaign += _campaign_rows(planned, site, cells)
        plans = [_run_plan(program, cells[r.cell], r, planned) for r in runs if r.id not in held]
        share = bool(getattr(first, "share_prefix", True))
        settings = next((c for c in cells.values() if _faulted(c)), first)
        stages = stage_entries(program.stages(first))
        trained = next(s["key"] for s in reversed(stages) if s["kind"] == "train")
        for members in _pack(plans, site.route):
            blocks.append(_block_json(trained, stages, members, site.route, share, program.engine(first), settings))
    _check_route(known)
    spec = f"{resolved.study.spec.__module__}:{resolved.study.spec.__qualname__}"
    return {"semantics": SEMANTICS, "spec": spec, "threads_per_process": 1, "blocks": blocks}, _unique(campaign)


def _faulted(cell: Any) -> bool:
    return hasattr(cell, "fault") and cell.fault.name != "none"


def _check_route(known: dict[str, Any]) -> None:
    if known and known.get("semantics") != SEMANTICS:
        raise StudyError("plan.json was made by another version of descentlab; use --overwrite or another --out")


def _check_supported(engine: str, cell: Any) -> None:
    """Conditions that an engine cannot meet together are refused with the reason, never ignored."""
    chosen = {room: getattr(cell, room).name for room in ROOMS if hasattr(cell, room)}
    reason = refusal(engine, {f"{room}:{name}" for room, name in chosen.items()})
    if reason is not None:
        raise UserError("engine", engine, f"an engine that runs {', '.join(chosen.values())}", hint=reason)


def _model_text(cell: Any) -> str:
    return canonical([cell.model.model_dump(), cell.dataset.model_dump(), cell.batch_size, cell.seed, cell.dtype])


def _plan_group(cells: dict[int, Any], runs: Sequence[Run], site: Site) -> dict[tuple[int, int], Planned]:
    """(cell, replicate) -> what is planned there."""
    planned = {}
    for run in runs:
        cell = cells[run.cell]
        if getattr(cell, "fault", None) is not None and (run.cell, run.replicate) not in planned:
            case = int(run.labels.get("case", run.replicate))
            fault = plan_fault(cell, case, run.replicate, site)
            if fault is not None and hasattr(cell, "timeline"):
                _check_in_time(cell, fault, cell.steps)
                ticks = cell.timeline.build().ticks(cell.workers, cell.steps, site.streams, run.replicate)
                fault = place(fault, ticks)
            if fault is not None:
                planned[run.cell, run.replicate] = fault
    return planned


def _run_plan(program: Program, cell: Any, run: Run, planned: dict[tuple[int, int], Planned]) -> RunPlan:
    own = planned.get((run.cell, run.replicate))
    shadows = [p for (c, replicate), p in planned.items() if replicate == run.replicate]
    faults = (own,) if own is not None else tuple(p for i, p in enumerate(shadows) if p not in shadows[:i])
    stop, anchor = program.horizon(cell, faults)
    perturbed = run.role == "fault"
    if perturbed and own is not None:
        _check_in_time(cell, own, stop)
    return RunPlan(run.id, run.replicate, stop, float(cell.optimizer.lr), faults, perturbed, anchor)


def _check_in_time(cell: Any, planned: Planned, stop: int) -> None:
    if planned.step >= stop:
        expected = f"epochs within training: a fault at step {planned.step} never fires in {stop} steps"
        raise UserError("fault.last_epoch", getattr(cell.fault, "last_epoch", None), expected)


def _pack(plans: Sequence[RunPlan], route: Route) -> list[list[RunPlan]]:
    """Whole replicates together, about ``MEMBERS_PER_BLOCK`` members to a block."""
    by_replicate: dict[int, list[RunPlan]] = {}
    for plan in plans:
        by_replicate.setdefault(plan.replicate, []).append(plan)
    packed: list[list[RunPlan]] = []
    for members in by_replicate.values():
        if packed and len(packed[-1]) + len(members) <= MEMBERS_PER_BLOCK[route]:
            packed[-1] += members
        else:
            packed.append(list(members))
    return packed


def stage_entries(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The stages of a cell with their keys, as plan.json stores them."""
    keys = stage_keys(stages)
    return [
        {"name": s.name, "kind": s.kind, "key": keys[s.name], "inputs": list(s.inputs), "fork": s.fork} for s in stages
    ]


def _block_json(
    trained: str,
    stages: list[dict[str, Any]],
    members: list[RunPlan],
    route: Route,
    share: bool,
    engine: str,
    settings: Any,
) -> dict[str, Any]:
    key = hashlib.sha256(json.dumps([trained, [m.id for m in members], route]).encode()).hexdigest()[:12]
    block = BlockPlan(key, 0, route, tuple(members), share)
    return {
        "key": key,
        "runs": [m.id for m in members],
        "steps": block.stop,
        "member_steps": block.work_units(),
        "route": route,
        "engine": engine,
        "share_prefix": share,
        "stages": stages,
        "settings": settings.model_dump(mode="json"),
        "plans": [_run_json(m) for m in members],
    }


def _run_json(run: RunPlan) -> dict[str, Any]:
    return {
        "id": run.id,
        "replicate": run.replicate,
        "stop": run.stop,
        "lr": run.lr,
        "perturbed": run.perturbed,
        "anchor": run.anchor,
        "planned": [planned_json(p) for p in run.planned],
    }


def planned_json(p: Planned) -> dict[str, Any]:
    """One planned perturbation as campaign.jsonl and plan.json store it."""
    return {
        "case": p.case,
        "step": p.step,
        "worker": p.worker,
        "site": f"{p.site.direction}/{p.site.operand}",
        "layer": p.site.layer,
        "call": p.site.call,
        "rule": dict(p.rule),
        "index": list(p.index),
        "shape": list(p.shape),
    }


def planned_from_json(d: dict[str, Any]) -> Planned:
    """Inverse of :func:`planned_json`."""
    direction, operand = d["site"].split("/")
    site = OpSite(d["layer"], d["call"], direction, operand)
    return Planned(d["case"], d["step"], site, tuple(d["index"]), d["rule"], tuple(d["shape"]), d["worker"])


def read_block(block: dict[str, Any]) -> Block:
    """A block of plan.json, ready to run."""
    runs = tuple(
        RunPlan(
            r["id"],
            r["replicate"],
            r["stop"],
            r["lr"],
            tuple(planned_from_json(p) for p in r["planned"]),
            r["perturbed"],
            r["anchor"],
        )
        for r in block["plans"]
    )
    plan = BlockPlan(block["key"], 0, block["route"], runs, block["share_prefix"])
    return Block(plan, block["engine"], block["settings"])


def _campaign_rows(planned: dict[tuple[int, int], Planned], site: Site, cells: dict[int, Any]) -> list[dict[str, Any]]:
    return [
        {
            "replicate": replicate,
            "epoch": p.step // site.steps_per_epoch,
            "fault": cells[cell].fault.name,
            "cell": cell,
            **planned_json(p),
        }
        for (cell, replicate), p in planned.items()
    ]


def _unique(campaign: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per case: cells that plan the same perturbation are listed together."""
    merged: dict[str, dict[str, Any]] = {}
    for row in campaign:
        cell = row.pop("cell")
        merged.setdefault(json.dumps(row, sort_keys=True), {**row, "cells": []})["cells"].append(cell)
    return sorted(merged.values(), key=lambda row: (row["cells"][0], row["case"]))
