"""Invariant 9: every (condition, condition, engine) matches a short numpy oracle on the quadratic, or is refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracles
import pytest
from small import builder, finish, numbers, plan_of, quadratic

from descentlab.cluster.specs import Asynchronous, ConstantDelay, ConstantStaleness, InverseStalenessRule
from descentlab.cluster.timeline import place
from descentlab.comm.specs import PowerSgd, ScheduledRank
from descentlab.core.protocols import Planned, Tick
from descentlab.core.streams import Streams
from descentlab.engine.driver import Engine
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.process import ParameterServer
from descentlab.engine.program import BlockPlan, RunPlan
from descentlab.engine.support import ENGINES, refusal
from descentlab.engine.virtual import Virtual
from descentlab.launch import build
from descentlab.optim.specs import Adam, Linear, Sgd
from descentlab.perturb.event_specs import Event
from descentlab.perturb.specs import N16Rd

STEPS, LR, VALUE = 3, 0.1, 5.0
CONDITIONS: dict[str, dict[str, Any]] = {
    "fault:none": {},
    "fault:N16_RD": {"fault": N16Rd(step=1, value_mode="fixed", value=VALUE)},
    "fault:event": {"fault": Event(target="gradient", op="mul", magnitude=3.0, step=1)},
    "fault:slot_event": {"fault": Event(target="slot", slot="momentum", op="mul", magnitude=3.0, step=1)},
    "fault:worker_event": {"fault": Event(target="worker_gradient", op="mul", magnitude=3.0, step=1, worker=1)},
    "timeline:constant": {"timeline": ConstantStaleness(staleness=2)},
    "timeline:asynchronous": {"timeline": Asynchronous(delay=ConstantDelay(mean_s=1.0))},
    "staleness_rule:inverse_staleness": {"staleness_rule": InverseStalenessRule()},
    "compressor:powersgd": {"compressor": PowerSgd()},
    "policy:schedule": {"compressor": PowerSgd(policy=ScheduledRank(ranks=[1, 2], steps=[1]))},
    "optimizer:sgd": {"optimizer": Sgd(lr=LR, momentum=0.9)},
    "optimizer:adam": {"optimizer": Adam(lr=LR)},
    "schedule:linear": {"schedule": Linear(end=0.02, steps=2)},
}
PAIRS = list(itertools.combinations_with_replacement(CONDITIONS, 2))
CASES = [(engine, *pair) for engine in ENGINES for pair in PAIRS]
REFUSED = {(e, a, b): reason for e, a, b in CASES if (reason := refusal(e, {a, b})) is not None}
RUNS = [case for case in CASES if case not in REFUSED]


def plans(engine: str, cell: Any) -> BlockPlan:
    """Two members (one for the parameter server), each with its own fault where there is one."""
    members = [0] if engine == "process" else [0, 1]
    plain = plan_of(cell, STEPS, replicates=members)
    if cell.fault.name == "none":
        return plain
    site = build.survey(cell)
    planned = {run.replicate: build.plan_fault(cell, run.replicate, run.replicate, site) for run in plain.runs}
    if cell.timeline.name == "asynchronous":
        planned = {r: p if p.on_server else place(p, alternating()) for r, p in planned.items()}
    runs = tuple(RunPlan(run.id, run.replicate, STEPS, LR, (planned[run.replicate],), True) for run in plain.runs)
    return BlockPlan("k", 0, "vmap", runs)


def alternating() -> list[Tick]:
    """Two workers of the same speed that never wait: 0, 1, 0; each reads what its own last update made."""
    return [Tick((0,), (0,), 1.0), Tick((1,), (0,), 1.0), Tick((0,), (1,), 2.0)]


def run(engine: str, cell: Any) -> tuple[Engine, Sequence[Tick]]:
    """The engine at its end, and who contributed with which version."""
    plan, make = plans(engine, cell), builder(cell)
    current = [Tick((0, 1), (t, t), 0.0) for t in range(STEPS)]
    if engine == "lockstep":
        return finish(Lockstep(plan, make())), current
    if engine == "virtual":
        stale = [Tick((0, 1), (0, 0), 0.0) for t in range(STEPS)]  # staleness 2 in three updates: always version 0
        ticks = {"constant": stale, "asynchronous": alternating()}.get(cell.timeline.name, current)
        return finish(Virtual(plan, make(), timeline=cell.timeline.build())), ticks
    server = ParameterServer(plan, make(), build=make)
    return finish(server), server.log


def expected(cell: Any, engine: Engine, member: int, ticks: Sequence[Tick]) -> np.ndarray:
    """Theta after three updates, by numpy."""
    theta, a, batch = numbers(engine.parts, member)
    adam = cell.optimizer.name == "adam"
    low_rank = None
    if cell.compressor.name == "powersgd":
        streams = Streams(cell.seed)
        drawn = [streams.normal("powersgd/theta", theta.shape[1], replicate=member, step=j) for j in (0, 1)]
        scheduled = cell.compressor.policy.name == "schedule"
        low_rank = oracles.LowRank(np.stack(drawn[: 1 + scheduled], axis=1), ranks=[1, 2, 2] if scheduled else None)
    planned: tuple[Planned, ...] = engine.plan.runs[member].planned
    rule = oracles.Adam() if adam else oracles.Momentum(cell.optimizer.momentum)

    def event(t: int, worker: int | None, g: np.ndarray) -> np.ndarray:
        """Tripled on its step: the averaged gradient, the velocity (which Adam has not), the gradient of worker 1."""
        for p in planned:
            target = p.site.direction
            if p.step == t and target == "slot" and worker is None and isinstance(rule, oracles.Momentum):
                rule.v = rule.v if rule.v is None or rule.mu == 0 else 3.0 * rule.v
            elif p.step == t and (target, worker) in (("gradient", None), ("worker_gradient", 1)):
                g = 3.0 * g
        return g

    linear = [0.1, 0.06, 0.02]  # from lr 0.1 to 0.02 in two steps
    trajectory = oracles.train(
        theta,
        a,
        batch,
        [(tick.workers, tick.versions) for tick in ticks],
        rule=rule,
        lr=lambda t: linear[t] if cell.schedule.name == "linear" else LR,
        faults={(p.step, p.worker): (p.index, VALUE) for p in planned if not p.event},
        low_rank=low_rank,
        over_staleness=cell.staleness_rule.name == "inverse_staleness",
        event=event,
    )
    return trajectory[-1]


@pytest.mark.parametrize("case", RUNS, ids="-".join)
def test_pair_matches_numpy(case: tuple[str, str, str]) -> None:
    """Three updates, two workers, float64, 1e-10.

    Broken on purpose, one at a time: the fault on every worker, the residual dropped, the schedule read one step late,
    version t - 1 for t - 2, a staleness rule that is left out, a rank that changes one update late, an event on the
    other worker, on the slot after the update: each fails in every pair it belongs to.
    """
    engine, a, b = case
    cell = quadratic(**CONDITIONS[a] | CONDITIONS[b])
    done, ticks = run(engine, cell)
    for m in range(len(done.slots)):
        found = done.state.params["theta"][m].numpy()
        np.testing.assert_allclose(found, expected(cell, done, m, ticks), rtol=0, atol=1e-10)
    faults = [condition for condition in {a, b} if condition.startswith("fault:") and condition != "fault:none"]
    hits = done.recorder.flush()[1]
    assert len(hits) == len(faults) * len(done.slots)
    if faults == ["fault:slot_event"]:  # an optimizer without the slot says so
        assert all(hit["applied"] == (cell.optimizer.name == "sgd" and cell.optimizer.momentum > 0) for hit in hits)


@pytest.mark.parametrize("case", sorted(REFUSED), ids="-".join)
def test_pair_is_refused_with_its_reason(case: tuple[str, str, str]) -> None:
    """The reason names the condition and what to do instead."""
    reason = REFUSED[case]
    assert any(reason.startswith(condition) for condition in case[1:])
    one = [f"a run has one {room}" for room in ("optimizer", "timeline", "fault")]
    assert any(words in reason for words in ("use engine virtual", *one))


def test_nothing_is_refused_without_need() -> None:
    """The table of refusals, written out: staleness needs versions, the parameter server sends gradients whole."""
    alone = {(engine, a) for engine, a, b in REFUSED if a == b}
    timelines = ("timeline:constant", "timeline:asynchronous")
    faults = ("fault:N16_RD", "fault:event", "fault:slot_event", "fault:worker_event")
    elsewhere = (*faults, "timeline:constant", "compressor:powersgd", "policy:schedule")
    assert alone == {("lockstep", c) for c in timelines} | {("process", c) for c in elsewhere}
    for engine, a, b in REFUSED:
        one_room = a != b and a.split(":")[0] == b.split(":")[0]
        assert one_room or (engine, a) in alone or (engine, b) in alone
    conditions = 13
    assert len(CONDITIONS) == conditions and len(CASES) == 3 * conditions * (conditions + 1) // 2
    without_timelines, without_two_of_a_kind, schedule_and_optimizers = 66 - 7, 91 - 8, 21 - 1
    assert len(RUNS) == without_timelines + without_two_of_a_kind + schedule_and_optimizers


@pytest.mark.parametrize("case", ["lockstp/optimizer:sgd", "virtual/link:slow", "virtual/sgd"])
def test_an_unknown_name_cannot_slip_through(case: str) -> None:
    engine, condition = case.split("/")
    with pytest.raises(ValueError, match="expected"):
        refusal(engine, {condition})
