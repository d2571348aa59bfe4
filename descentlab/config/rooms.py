"""What there is to choose from, for lists and help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..cluster.link_specs import LINKS
from ..cluster.specs import DELAYS, STALENESS_RULES, TIMELINES
from ..comm.specs import COMPRESSORS, POLICIES
from ..core.errors import UserError, nearest
from ..core.specs import Option, Registry
from ..engine.specs import ENGINES
from ..observe.specs import EVALUATED, EXTRA, PER_STEP, Observe
from ..optim.specs import OPTIMIZERS, SCHEDULES
from ..perturb.arm_specs import ARMS
from ..perturb.specs import FAULTS
from ..workloads.partition_specs import PARTITIONS
from ..workloads.specs import DATASETS, MODELS, SAMPLERS
from . import schema

REGISTRIES: dict[str, tuple[Registry, ...]] = {
    "workloads": (DATASETS, MODELS),
    "datasets": (DATASETS,),
    "models": (MODELS,),
    "samplers": (SAMPLERS,),
    "optimizers": (OPTIMIZERS,),
    "schedules": (SCHEDULES,),
    "faults": (FAULTS,),
    "arms": (ARMS,),
    "compressors": (COMPRESSORS,),
    "policies": (POLICIES,),
    "links": (LINKS,),
    "engines": (ENGINES,),
    "timelines": (TIMELINES,),
    "delays": (DELAYS,),
    "partitions": (PARTITIONS,),
    "staleness_rules": (STALENESS_RULES,),
}


@dataclass(frozen=True)
class Entry:
    """One thing to choose: the key it is chosen with, its name, one line about it, and its settings with defaults."""

    key: str
    name: str
    summary: str
    defaults: dict[str, Any]


def kinds() -> list[str]:
    """The kinds of things that :func:`entries` knows."""
    return [*REGISTRIES, "observables"]


def entries(kind: str) -> list[Entry]:
    """All entries of one kind; an unknown kind is a UserError with the nearest known one."""
    if kind == "observables":
        return _observables()
    if kind not in REGISTRIES:
        raise UserError("KIND", kind, f"one of {', '.join(kinds())}", hint=nearest(kind, kinds()))
    return [_entry(registry.room, name, cls) for registry in REGISTRIES[kind] for name, cls in registry.options.items()]


def _entry(room: str, name: str, cls: type[Option]) -> Entry:
    summary = (cls.__doc__ or "").strip().split("\n")[0].replace("``", "'")
    return Entry(room, name, summary, {k: schema.default_of(cls.model_fields[k]) for k in schema.settings_of(cls)})


def _observables() -> list[Entry]:
    schedule = Observe()
    every, evaluate = {"observe.every": schedule.every}, {"observe.evaluate_every": schedule.evaluate_every}
    return (
        [Entry("observe", name, text, every) for name, text in PER_STEP.items()]
        + [Entry("observe", name, text, evaluate) for name, text in EVALUATED.items()]
        + [
            Entry("observe.extra", name, f"with observe.extra=[{name}]: {text}", evaluate)
            for name, (_, text) in EXTRA.items()
        ]
    )
