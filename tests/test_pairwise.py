"""Invariant 9: every (condition, condition, engine) matches a short numpy oracle on the quadratic, or is refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracles
import pytest
from small import builder, finish, numbers, plan_fault, plan_of, quadratic

from descentlab.cluster.specs import ConstantStaleness
from descentlab.comm.specs import PowerSgd
from descentlab.core.protocols import Planned, Tick
from descentlab.core.streams import Streams
from descentlab.engine.driver import Engine
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.process import ParameterServer
from descentlab.engine.program import BlockPlan, RunPlan
from descentlab.engine.support import ENGINES, refusal
from descentlab.engine.virtual import Virtual
from descentlab.optim.specs import Adam, Linear, Sgd
from descentlab.perturb.specs import VectorForwardFault

STEPS, LR, VALUE = 3, 0.1, 5.0
CONDITIONS: dict[str, dict[str, Any]] = {
    "fault:none": {},
    "fault:N16_RD": {"fault": VectorForwardFault(step=1, value_low=VALUE, value_high=VALUE)},
    "timeline:constant": {"timeline": ConstantStaleness(staleness=2)},
    "compressor:powersgd": {"compressor": PowerSgd()},
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
    parts = builder(cell)()
    runs = tuple(
        RunPlan(run.id, run.replicate, STEPS, LR, (plan_fault(parts, run.replicate),), True) for run in plain.runs
    )
    return BlockPlan("k", 0, "vmap", runs)


def run(engine: str, cell: Any) -> tuple[Engine, Sequence[Tick]]:
    """The engine at its end, and who contributed with which version."""
    plan, build = plans(engine, cell), builder(cell)
    current = [Tick((0, 1), (t, t), 0.0) for t in range(STEPS)]
    if engine == "lockstep":
        return finish(Lockstep(plan, build())), current
    if engine == "virtual":
        stale = [Tick((0, 1), (0, 0), 0.0) for t in range(STEPS)]  # staleness 2 in three updates: always version 0
        ticks = stale if cell.timeline.name == "constant" else current
        return finish(Virtual(plan, build(), timeline=cell.timeline.build())), ticks
    server = ParameterServer(plan, build(), build=build)
    return finish(server), server.log


def expected(cell: Any, engine: Engine, member: int, ticks: Sequence[Tick]) -> np.ndarray:
    """Theta after three updates, by numpy."""
    theta, a, batch = numbers(engine.parts, member)
    adam = cell.optimizer.name == "adam"
    low_rank = None
    if cell.compressor.name == "powersgd":
        q = Streams(cell.seed).normal("powersgd/theta", theta.shape[1], replicate=member, step=0)
        low_rank = oracles.LowRank(q[:, None])
    planned: tuple[Planned, ...] = engine.plan.runs[member].planned
    linear = [0.1, 0.06, 0.02]  # from lr 0.1 to 0.02 in two steps
    trajectory = oracles.train(
        theta,
        a,
        batch,
        [(tick.workers, tick.versions) for tick in ticks],
        rule=oracles.Adam() if adam else oracles.Momentum(cell.optimizer.momentum),
        lr=lambda t: linear[t] if cell.schedule.name == "linear" else LR,
        faults={(p.step, p.worker): (p.index, VALUE) for p in planned},
        low_rank=low_rank,
    )
    return trajectory[-1]


@pytest.mark.parametrize("case", RUNS, ids="-".join)
def test_pair_matches_numpy(case: tuple[str, str, str]) -> None:
    """Three updates, two workers, float64, 1e-10.

    Broken on purpose, one at a time: the fault on every worker, the residual dropped, the schedule read one step late,
    version t - 1 for t - 2: each fails in every pair it belongs to.
    """
    engine, a, b = case
    cell = quadratic(**CONDITIONS[a], **(CONDITIONS[b] if b != a else {}))
    done, ticks = run(engine, cell)
    for m in range(len(done.slots)):
        found = done.state.params["theta"][m].numpy()
        np.testing.assert_allclose(found, expected(cell, done, m, ticks), rtol=0, atol=1e-10)
    if "fault:N16_RD" in (a, b):
        assert len(done.recorder.flush()[1]) == len(done.slots)


@pytest.mark.parametrize("case", sorted(REFUSED), ids="-".join)
def test_pair_is_refused_with_its_reason(case: tuple[str, str, str]) -> None:
    """The reason names the condition and what to do instead."""
    reason = REFUSED[case]
    assert any(reason.startswith(condition) for condition in case[1:])
    assert "use engine virtual" in reason or "a run has one optimizer" in reason


def test_nothing_is_refused_without_need() -> None:
    """The table of refusals, written out: staleness needs versions, the parameter server is thin so far."""
    alone = {(engine, a) for engine, a, b in REFUSED if a == b}
    assert alone == {("lockstep", "timeline:constant")} | {
        ("process", c) for c in ("fault:N16_RD", "timeline:constant", "compressor:powersgd")
    }
    for engine, a, b in REFUSED:
        both_optimizers = a.startswith("optimizer:") and b.startswith("optimizer:") and a != b
        assert both_optimizers or (engine, a) in alone or (engine, b) in alone
    assert len(CASES) == 3 * 28 and len(RUNS) == 20 + 27 + 9


@pytest.mark.parametrize("case", ["lockstp/optimizer:sgd", "virtual/link:slow", "virtual/sgd"])
def test_an_unknown_name_cannot_slip_through(case: str) -> None:
    engine, condition = case.split("/")
    with pytest.raises(ValueError, match="expected"):
        refusal(engine, {condition})
