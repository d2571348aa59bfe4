"""Cells with an event, what is planned for them, and a twin beside a faulted run; shared by the tests of events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from small import quadratic

from descentlab.core.protocols import Planned
from descentlab.engine.parts import Parts
from descentlab.engine.program import BlockPlan, RunPlan
from descentlab.launch import build
from descentlab.optim.specs import Sgd
from descentlab.perturb.event_specs import Event
from descentlab.perturb.specs import NoFault
from descentlab.studies.crossed.spec import CrossedSpec

STEPS, LR = 6, 0.1


_MADE: dict[str, tuple[build.Site, Parts]] = {}


def made(cell: CrossedSpec) -> tuple[build.Site, Parts]:
    """What an event may hit and the parts of the engine, once for all cells that differ in their event only."""
    key = cell.model_copy(update={"fault": NoFault()}).model_dump_json()
    if key not in _MADE:
        _MADE[key] = build.survey(cell), build.build_parts(cell, "vmap")
    return _MADE[key]


def plan(cell: CrossedSpec, replicate: int = 0) -> Planned:
    return build.plan_fault(cell, replicate, replicate, made(cell)[0])


def pair(cell: CrossedSpec, replicates: Sequence[int] = (0,), steps: int = STEPS) -> BlockPlan:
    """A twin and a faulted run of each replicate."""
    runs = []
    for r in replicates:
        p = plan(cell, r)
        runs += [
            RunPlan(f"{r}-{role}", r, steps, cell.optimizer.lr, (p,), role == "fault") for role in ("twin", "fault")
        ]
    return BlockPlan("k", 0, "vmap", tuple(runs))


def of(fault: Event, **settings: Any) -> CrossedSpec:
    """The quadratic on one worker, float64."""
    return quadratic(**{"workers": 1, "optimizer": Sgd(lr=LR, momentum=0.9), "fault": fault, **settings})
