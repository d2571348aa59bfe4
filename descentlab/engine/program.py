"""What a block is to do, decided before it starts: its runs, who shares a member until when, and by which route."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..core.opmode import OpRecord
from ..core.protocols import Planned

Route = Literal["vmap", "member"]
MEMBERS_PER_BLOCK: dict[Route, int] = {"vmap": 250, "member": 5}
ONE_BY_ONE = 500  # the same where compiled code takes one member after the other, so that no cache has to hold them all


SMALL_CONVOLUTION = 1024  # output elements per sample up to which a grouped convolution beats a loop of single ones


def choose_route(*, device: str, operations: Sequence[OpRecord]) -> Route:
    """The stated rule: vectorise, except on a CPU a model with a convolution of more than 1,024 output elements per
    sample, which runs member by member over a process pool (see docs/decisions/0003-route-rule.md).

    The rule looks at settings only, never at a clock, so every machine makes the same choice.
    """
    convolutions = [math.prod(r.out[1:]) for r in operations if r.kind == "conv"]
    if device == "cpu" and max(convolutions, default=0) > SMALL_CONVOLUTION:
        return "member"
    return "vmap"


@dataclass(frozen=True)
class Prefix:
    """The updates of a run before ``until`` are made by another optimizer; ``how`` its slots are handed over then."""

    until: int
    variant: int
    lr: float
    how: Literal["carried", "dropped", "tracked"]


@dataclass(frozen=True)
class RunPlan:
    """One run as the engine sees it.

    ``planned``: the perturbations it meets; a twin carries those of the runs it is the control of with ``perturbed``
    False, so that it takes the same route on the hit steps. ``stop`` counts updates. Evaluations happen at ``anchor``
    plus multiples of the study's interval, and after the last update.
    """

    id: str
    replicate: int
    stop: int
    lr: float
    planned: tuple[Planned, ...] = ()
    perturbed: bool = False
    anchor: int = 0
    variant: int = 0  # which of the block's optimizer settings and schedules it has
    group: int = 0  # which of the block's cells it belongs to, perturbed runs and others apart
    prefix: Prefix | None = None

    def leads(self, step: int) -> bool:
        """Whether the update ``step`` is one of its prefix."""
        return self.prefix is not None and step < self.prefix.until

    def forks_at(self) -> int | None:
        """The first step at which this run differs from its twin."""
        return min((p.step for p in self.planned), default=None) if self.perturbed else None


@dataclass(frozen=True)
class Slot:
    """One member of the ensemble: the runs it carries (several only while they are the same trajectory).

    ``prefix``: the one they are all in, None where they follow their own settings.
    """

    runs: tuple[RunPlan, ...]
    prefix: Prefix | None = None

    @property
    def replicate(self) -> int:
        return self.runs[0].replicate

    @property
    def lr(self) -> float:
        return (self.prefix or self.runs[0]).lr

    @property
    def variant(self) -> int:
        return (self.prefix or self.runs[0]).variant

    @cached_property
    def schedule(self) -> tuple[tuple[int, int], ...]:
        """(stop, anchor) of each run: what decides when this member is evaluated."""
        return tuple((run.stop, run.anchor) for run in self.runs)

    def planned_at(self, step: int) -> tuple[Planned, bool] | None:
        """The perturbation of an operation due at ``step``, and whether this member meets it or is only the twin of one
        that does. (Events need no route of their own: see :mod:`descentlab.engine.events`.)"""
        for run in self.runs:
            for p in run.planned:
                if not p.event and p.active(step):
                    return p, run.perturbed
        return None


@dataclass(frozen=True)
class BlockPlan:
    """Runs that are executed, checkpointed and resumed together. ``cell`` names their common settings."""

    key: str
    cell: int
    route: Route
    runs: tuple[RunPlan, ...]
    share_prefix: bool = True

    @cached_property
    def stop(self) -> int:
        return max(r.stop for r in self.runs)

    @cached_property
    def changes(self) -> frozenset[int]:
        """The steps at which :meth:`slots` may differ from those one step before."""
        forks = {fork for run in self.runs if (fork := run.forks_at()) is not None}
        over = {run.prefix.until for run in self.runs if run.prefix is not None}
        return frozenset({0, *(run.stop for run in self.runs), *forks, *over})

    @cached_property
    def planned_steps(self) -> frozenset[int]:
        """The steps at which any run meets a perturbation of an operation, or is the twin of one that does."""
        due = {p.steps(run.stop) for run in self.runs for p in run.planned if not p.event}
        return frozenset(step for steps in due for step in steps)

    def slots(self, step: int) -> tuple[Slot, ...]:
        """The ensemble's members at ``step``: a pure function of the plan, so a resumed block rebuilds it.

        Runs of one replicate, learning rate and variant share a member until the first of them meets its perturbation.
        In a prefix the variant and rate are the prefix's, and those that meet the same perturbation share one to its
        end; after it every run has its own.
        """
        groups: dict[Any, list[RunPlan]] = {}
        for run in self.runs:
            if run.stop <= step:
                continue
            fork = run.forks_at()
            apart = not self.share_prefix or (fork is not None and step >= fork)
            own = run.id if apart else None
            if run.prefix is None:
                groups.setdefault((run.replicate, run.lr, run.variant, own, None), []).append(run)
            elif not run.leads(step):
                groups.setdefault((run.replicate, run.lr, run.variant, run.id, None), []).append(run)
            else:
                own = self._first_alike[run.id] if apart and self.share_prefix else own
                key = run.replicate, run.prefix.lr, run.prefix.variant, own, "prefix"
                groups.setdefault(key, []).append(run)
        return tuple(Slot(tuple(runs), runs[0].prefix if runs[0].leads(step) else None) for runs in groups.values())

    @cached_property
    def _first_alike(self) -> dict[str, str]:
        """Run -> the first run that is planned the same perturbations, itself or another."""
        first: dict[str, str] = {}
        for run in self.runs:
            alike = (r for r in self.runs if r.replicate == run.replicate and r.planned == run.planned and r.perturbed)
            first[run.id] = next(alike, run).id
        return first

    def work_units(self) -> int:
        """Member-steps of the whole block, the unit of progress and cost."""
        changes = sorted(self.changes)
        return sum(len(self.slots(a)) * (b - a) for a, b in itertools.pairwise(changes))


def parents(old: Sequence[Slot], new: Sequence[Slot]) -> list[int]:
    """For each new member the index of the old one it continues."""
    where = {run.id: i for i, slot in enumerate(old) for run in slot.runs}
    return [where[slot.runs[0].id] for slot in new]
