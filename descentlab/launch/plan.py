"""Packs runs into blocks and writes the decision down once, so that resume, pool and cluster obey the same plan."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from ..cluster.timeline import place
from ..config.identity import canonical
from ..config.resolve import Resolved
from ..config.tree import Run, StudyDef
from ..core.errors import StudyError, UserError
from ..core.opmode import Site as OpSite
from ..core.protocols import Planned
from ..core.stage import Stage, stage_keys
from ..engine.program import ONE_BY_ONE, BlockPlan, Prefix, RunPlan
from ..engine.support import ROOMS, refusal
from .arms import check_arm
from .build import Site, plan_fault, survey
from .conditions import check_classes, conditions
from .memory import members_at_most
from .packing import Ensemble, Update, choose_update, ensemble_text, group_text, led, merged, settings_text, split_from
from .sending import check_sending, members_of

SEMANTICS = 2  # raised when the same plan would compute something else


class Program(Protocol):
    """What a study's ``program`` module says about one cell."""

    def engine(self, cell: Any) -> str:
        """``lockstep``, ``virtual`` or ``process``."""
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
    variants: tuple[dict[str, Any], ...] = ({},)  # what members have for themselves, by ``RunPlan.variant``
    update: Update = "slices"

    @property
    def key(self) -> str:
        return self.plan.key


def program_of(study: StudyDef) -> Any:
    """The study's program module."""
    return importlib.import_module(study.module)


def make_plan(resolved: Resolved, known: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(plan.json, campaign.jsonl) for the resolved study.

    ``known`` is the plan already on disk: its blocks stay as they are, only runs it does not hold are packed anew.
    """
    program = program_of(resolved.study)
    spec = f"{resolved.study.spec.__module__}:{resolved.study.spec.__qualname__}"
    _check_route(known)
    if hasattr(program, "run_stage"):
        from .staged import staged_plan

        blocks = staged_plan(resolved, known, program)
        plan = {"semantics": SEMANTICS, "spec": spec, "program": resolved.study.module, "threads_per_process": 1}
        return {**plan, "blocks": blocks}, []
    held = {run for block in known.get("blocks", []) for run in block["runs"]}
    blocks, campaign = list(known.get("blocks", [])), []
    texts = [group_text(cell) for cell in resolved.cells]
    groups: dict[str, list[Run]] = {}
    for run in resolved.runs:
        groups.setdefault(texts[run.cell], []).append(run)
    sites: dict[str, Site] = {}
    ensembles: dict[str, Ensemble] = {}
    for runs in groups.values():
        cells = {run.cell: resolved.cells[run.cell] for run in runs}
        for cell in cells.values():
            _check_supported(program.engine(cell), cell)
            check_classes(cell)
            conditions(cell)
        first = next(iter(cells.values()))
        model = _model_text(first)
        if model not in sites:
            sites[model] = survey(first)
        site = sites[model]
        for cell in cells.values():
            check_arm(cell, site.layout.buffers)
            check_sending(cell, site.layout.params)
        planned = _plan_group(cells, runs, site)
        campaign += _campaign_rows(planned, site, cells)
        text = ensemble_text(first, site.route)
        if text not in ensembles:
            share = bool(getattr(first, "share_prefix", True))
            asked = members_of(first) or (ONE_BY_ONE if site.alone else 0)
            asked = 1 if program.engine(first) == "process" else asked  # a server has one run
            most, memory = members_at_most(site.route, asked, site.bytes_per_member, site.free_bytes)
            split = split_from(site.operations, site.alone)
            ensembles[text] = Ensemble(
                site.route, program.engine(first), share, most, site.alone, memory, site.inferred, split
            )
        ensemble = ensembles[text]
        ensemble.faulted = ensemble.faulted or next((c for c in cells.values() if _faulted(c)), None)
        plans = [_run_plan(program, cells[r.cell], r, planned) for r in runs if r.id not in held]
        ensemble.add(plans, {r.id: cells[r.cell] for r in runs}, _stages(program, cells, runs))
    for ensemble in merged(ensembles.values()):
        blocks += [_block_json(ensemble, members) for members in ensemble.blocks()]
    return {"semantics": SEMANTICS, "spec": spec, "threads_per_process": 1, "blocks": blocks}, _unique(campaign)


def _stages(program: Program, cells: dict[int, Any], runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """What is done to each run: of cells that differ only in their fault, what is done to the first."""
    made: dict[str, list[dict[str, Any]]] = {}
    texts = {index: settings_text(cell) for index, cell in cells.items()}
    for index, cell in cells.items():
        if texts[index] not in made:
            made[texts[index]] = stage_entries(program.stages(cell))
    return {run.id: made[texts[run.cell]] for run in runs}


def _faulted(cell: Any) -> bool:
    return hasattr(cell, "fault") and cell.fault.name != "none"


def _check_route(known: dict[str, Any]) -> None:
    if known and known.get("semantics") != SEMANTICS:
        found = f"plan.json has semantics {known.get('semantics')}, this version of descentlab makes {SEMANTICS}"
        raise StudyError(f"{found}; use --overwrite or another --out")


def _check_supported(engine: str, cell: Any) -> None:
    """Conditions that an engine cannot meet together are refused with the reason, never ignored."""
    chosen = {room: getattr(cell, room).name for room in ROOMS if hasattr(cell, room)}
    policy = getattr(getattr(cell, "compressor", None), "policy", None)
    if policy is not None:
        chosen["policy"] = policy.name
    reason = refusal(engine, {f"{room}:{name}" for room, name in chosen.items()})
    if reason is None and engine == "process":
        from .processes import check_process

        check_process(cell)
    if reason is not None:
        raise UserError("engine", engine, f"an engine that runs {', '.join(chosen.values())}", hint=reason)


def _model_text(cell: Any) -> str:
    """What :func:`survey` depends on."""
    keys = ("model", "dataset", "sampler", "batch_size", "seed", "dtype", "device")
    settings = cell.model_dump(mode="json")
    return canonical([*(settings[key] for key in keys), settings["observe"]])


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
                if not fault.on_server:
                    ticks = cell.timeline.build().ticks(cell.workers, cell.steps, site.streams, run.replicate)
                    fault = place(fault, ticks)
            if fault is not None:
                planned[run.cell, run.replicate] = fault
    return planned


def _run_plan(program: Program, cell: Any, run: Run, planned: dict[tuple[int, int], Planned]) -> RunPlan:
    own = planned.get((run.cell, run.replicate))
    faults = (own,) if own is not None else _shadows(run.replicate, planned)
    stop, anchor = program.horizon(cell, faults)
    perturbed = run.role == "fault"
    if perturbed and own is not None:
        _check_in_time(cell, own, stop)
    plan = RunPlan(run.id, run.replicate, stop, float(cell.optimizer.lr), faults, perturbed, anchor)
    return replace(plan, prefix=_prefix(cell, faults[0])) if led(cell) else plan


def _shadows(replicate: int, planned: dict[tuple[int, int], Planned]) -> tuple[Planned, ...]:
    """What the other cells have planned for a replicate, each once: a cell without a fault is the control of all."""
    found = [p for (_, r), p in planned.items() if r == replicate]
    return tuple(p for i, p in enumerate(found) if p not in found[:i])


def _prefix(cell: Any, fault: Planned) -> Prefix:
    """The baseline makes the updates up to and through the fault; a fault that this cannot be said of is refused."""
    if fault.duration != 1:
        expected = "scratch: this fault acts on many steps, so there is no update after it to take over from"
        raise UserError("protocol", cell.protocol, expected)
    if cell.protocol == "shadow" and fault.site.direction == "slot":
        expected = "baseline or scratch: the fault is in slots of the baseline, which the tracked optimizers never read"
        raise UserError("protocol", cell.protocol, expected)
    how: Literal["carried", "dropped", "tracked"] = "carried" if cell.carry_state else "dropped"
    return Prefix(fault.step + 1, -1, float(cell.baseline.lr), "tracked" if cell.protocol == "shadow" else how)


def _check_in_time(cell: Any, planned: Planned, stop: int) -> None:
    if planned.step >= stop:
        expected = f"epochs within training: a fault at step {planned.step} never fires in {stop} steps"
        raise UserError("fault.last_epoch", getattr(cell.fault, "last_epoch", None), expected)


def stage_entries(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The stages of a cell with their keys, as plan.json stores them."""
    keys = stage_keys(stages)
    return [
        {"name": s.name, "kind": s.kind, "key": keys[s.name], "inputs": list(s.inputs), "fork": s.fork} for s in stages
    ]


def _block_json(ensemble: Ensemble, runs: list[RunPlan]) -> dict[str, Any]:
    stages = {s["key"]: s for run in runs for s in ensemble.stages[run.id]}
    trained = dict.fromkeys(_trained(ensemble.stages[run.id]) for run in runs)
    parts = ["+".join(sorted(trained)), [m.id for m in runs], ensemble.route]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    plan = BlockPlan(key, 0, ensemble.route, tuple(runs), ensemble.share_prefix)
    return {
        "key": key,
        "runs": [m.id for m in runs],
        "steps": plan.stop,
        "member_steps": plan.work_units(),
        "route": ensemble.route,
        "update": choose_update(runs, ensemble.cells[runs[0].id].optimizer),
        "engine": ensemble.engine,
        "share_prefix": ensemble.share_prefix,
        "stages": list(stages.values()),
        "settings": ensemble.settings(runs),
        "variants": ensemble.variants(runs),
        "plans": [_run_json(m) for m in runs],
        "inferred": ensemble.inferred,
        **({"memory": ensemble.memory} if ensemble.memory else {}),
    }


def _trained(stages: list[dict[str, Any]]) -> str:
    keys = [s["key"] for s in stages if s["kind"] == "train"]
    if not keys:
        raise StudyError("stages(cell) of the study holds no stage of kind 'train'; its key names the stored work")
    return keys[-1]


def _run_json(run: RunPlan) -> dict[str, Any]:
    return {
        "id": run.id,
        "replicate": run.replicate,
        "stop": run.stop,
        "lr": run.lr,
        "perturbed": run.perturbed,
        "anchor": run.anchor,
        "variant": run.variant,
        "group": run.group,
        "planned": [planned_json(p) for p in run.planned],
        **({"prefix": asdict(run.prefix)} if run.prefix else {}),
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
        "duration": p.duration,
        "every": p.every,
    }


def planned_from_json(d: dict[str, Any]) -> Planned:
    """Inverse of :func:`planned_json`."""
    direction, operand = d["site"].split("/")
    site = OpSite(d["layer"], d["call"], direction, operand)
    when = d.get("duration", 1), d.get("every", 1)
    return Planned(d["case"], d["step"], site, tuple(d["index"]), d["rule"], tuple(d["shape"]), d["worker"], *when)


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
            r.get("variant", 0),
            r.get("group", 0),
            Prefix(**r["prefix"]) if "prefix" in r else None,
        )
        for r in block["plans"]
    )
    plan = BlockPlan(block["key"], 0, block["route"], runs, block["share_prefix"])
    variants = tuple(block.get("variants", ({},)))
    return Block(plan, block["engine"], block["settings"], variants, block.get("update", "slices"))


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
