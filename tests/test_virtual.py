"""Workers on a virtual clock: what must equal lockstep or sequential training, and staleness as it was asked for."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from small import digits, finish, numbers, plan_fault, plan_of, quadratic
from torch import Tensor, nn

from descentlab.cluster.specs import TIMELINES
from descentlab.cluster.timeline import (
    BarrierTimeline,
    ConstantStalenessTimeline,
    RecordedTimeline,
    RoundRobinTimeline,
    place,
)
from descentlab.comm.specs import PowerSgd
from descentlab.core.errors import UserError
from descentlab.core.protocols import Batch, Grads, Tick
from descentlab.core.state import State
from descentlab.core.streams import Streams
from descentlab.core.tree import leaves
from descentlab.engine.driver import Engine
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.parts import Parts
from descentlab.engine.program import BlockPlan, RunPlan
from descentlab.engine.virtual import Virtual
from descentlab.launch.build import build_parts, workload
from descentlab.optim.specs import Adam, Sgd
from descentlab.perturb.specs import Rd
from descentlab.workloads.specs import SmallCnn

STREAMS = Streams(0)
DELAYS = [BarrierTimeline(), BarrierTimeline(0.03), BarrierTimeline(0.03, 0.005), BarrierTimeline(0.01, 5.0)]


def state_tensors(engine: Engine) -> dict[str, list[Tensor]]:
    """Everything but the clock and the ring of old versions."""
    s = engine.state
    worker = {k: v for k, v in s.worker.items() if k != "ring"}
    return {"server": list(leaves(s.server)), "worker": list(leaves(worker)), "shared": list(leaves(s.shared))}


def assert_same_bits(a: Engine, b: Engine) -> None:
    for name, tensors in state_tensors(a).items():
        for x, y in zip(tensors, state_tensors(b)[name], strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("timeline", DELAYS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": Sgd(lr=0.1, momentum=0.9)},
        {"optimizer": Adam(lr=0.01)},
        {"model": SmallCnn(pool=1)},
        {"compressor": PowerSgd()},
    ],
    ids=["momentum", "adam", "batch_norm", "powersgd"],
)
def test_barrier_equals_lockstep_to_the_bit(timeline: BarrierTimeline, settings: dict[str, Any]) -> None:
    """Invariant 3: delays move the clock, nothing else.

    Broken on purpose: a barrier whose workers read version t - 1 fails every case.
    """
    cell = digits(workers=3, **settings)
    route = "member" if "model" in settings else "vmap"
    plan = plan_of(cell, 5, route=route)
    expected = finish(Lockstep(plan, build_parts(cell, route)))
    found = finish(Virtual(plan, build_parts(cell, route), timeline=timeline))
    assert_same_bits(expected, found)


def plain_loop(cell: Any, parts: Parts, replicate: int, turns: Sequence[int]) -> nn.Module:
    """Sequential SGD in plain torch on the batches of worker turns[0], turns[1], …, each worker counting its own."""
    module = workload(cell).module(parts.streams, replicate)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    x, y = parts.train
    for t, w in enumerate(turns):
        index = parts.sampler.indices(np.array([replicate]), np.array([w]), np.array([turns[:t].count(w)]))[0]
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x[index]), y[index]).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("workers", [1, 3])
def test_round_robin_without_staleness_is_sequential_sgd_to_the_bit(workers: int) -> None:
    """Invariant 3: W workers that take turns at the current weights are one worker on the interleaved batches.

    Broken on purpose: one batch cursor for all workers, or ``stale=True``, fails for three workers.
    """
    cell = digits(workers=workers)
    parts = build_parts(cell, "member")
    plan = plan_of(cell, 11, route="member")
    engine = finish(Virtual(plan, parts, timeline=RoundRobinTimeline(stale=False)))
    for m in range(2):
        module = plain_loop(cell, parts, m, [t % workers for t in range(11)])
        for name, p in module.named_parameters():
            assert torch.equal(engine.state.params[name][m], p), name


@pytest.mark.parametrize("route", ["vmap", "member"])
def test_one_asynchronous_worker_is_sequential_to_the_bit(route: Any) -> None:
    """Invariant 3: with nobody else there is nothing to be stale against.

    Broken on purpose: a lag of W instead of W - 1 in the round-robin table fails.
    """
    cell = digits(workers=1, optimizer=Adam(lr=0.01))
    plan = plan_of(cell, 8, route=route)
    expected = finish(Lockstep(plan, build_parts(cell, route)))
    assert_same_bits(expected, finish(Virtual(plan, build_parts(cell, route), timeline=RoundRobinTimeline())))


@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
@pytest.mark.parametrize("workers", [1, 2])
def test_constant_staleness_matches_numpy(staleness: int, workers: int) -> None:
    """Broken on purpose: a ring one place too small (S = staleness) fails for every staleness above 0."""
    cell = quadratic(workers=workers, optimizer=Sgd(lr=0.2, momentum=0.5))
    parts = build_parts(cell, "vmap")
    engine = finish(Virtual(plan_of(cell, 20), parts, timeline=ConstantStalenessTimeline(staleness)))
    for m in range(2):
        theta, a, batch = numbers(parts, m)
        versions, v = [theta], 0.0
        for t in range(20):
            stale = versions[max(0, t - staleness)]
            z = np.mean([batch(w, t).mean(0) for w in range(workers)], axis=0)
            v = 0.5 * v + (stale @ a.T - z) @ a
            versions.append(versions[-1] - 0.2 * v)
        np.testing.assert_allclose(engine.state.params["theta"][m].numpy(), versions[-1], rtol=0, atol=1e-12)


class CountingWork:
    """Gradient 1 everywhere, so that sgd at lr 1 makes theta = theta_0 - version; lists the versions it was shown."""

    def __init__(self, start: Tensor) -> None:
        self.start, self.seen = start, []

    def work(self, view: State, batch: Batch, ops: Any = None) -> Grads:
        theta = view.params["theta"]
        self.seen.append((self.start - theta)[:, 0, 0].round().long().tolist())
        zero = torch.zeros(view.members)
        return Grads({"theta": torch.ones_like(theta)}, {}, zero, zero)

    def evaluate(self, view: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(view.members), torch.zeros(view.members)


@pytest.mark.parametrize("seed", range(5))
def test_every_version_is_the_one_asked_for(seed: int) -> None:
    """Random tables with up to 7 versions of lag, a different one per replicate; two or three workers per update.

    Broken on purpose: storing after the update under version t instead of t + 1 fails; so does reading the ring
    by one member's version for all.
    """
    rng = np.random.default_rng(seed)

    class Random:
        def ticks(self, workers: int, steps: int, streams: Streams, replicate: int) -> list[Tick]:
            table = tables[replicate]
            return [Tick(tuple(range(workers)), tuple(row), 0.0) for row in table]

    workers, steps = int(rng.integers(2, 4)), 30
    tables = [
        [[int(rng.integers(max(0, t - 7), t + 1)) for _ in range(workers)] for t in range(steps)] for _ in range(2)
    ]
    cell = quadratic(workers=workers, optimizer=Sgd(lr=1.0))
    parts = build_parts(cell, "vmap")
    start = torch.stack([parts.fresh(r)[0]["theta"] for r in range(2)])
    parts.many = counting = CountingWork(start)
    finish(Virtual(plan_of(cell, steps), parts, timeline=Random()))
    expected = [[tables[m][t][k] for m in range(2)] for t in range(steps) for k in range(workers)]
    assert counting.seen == expected


@pytest.mark.parametrize("cut", [1, 4, 6, 9])
def test_resume_in_the_middle_to_the_bit(cut: int) -> None:
    """Saved and loaded after ``cut`` updates: before, at and after step 6, at which the faulted run leaves its twin.

    Broken on purpose: the ring kept on the engine instead of in the state fails at every cut, and nothing else does.
    """
    cell = quadratic(fault=Rd(step=6, value_mode="log_uniform"), compressor=PowerSgd(), optimizer=Adam(lr=0.05))
    fault = plan_fault(build_parts(cell, "vmap"), 0)
    runs = (RunPlan("twin", 0, 12, 0.05, (fault,)), RunPlan("hit", 0, 12, 0.05, (fault,), True))
    plan = BlockPlan("k", 0, "vmap", (*runs, RunPlan("other", 1, 10, 0.05)))
    timeline = ConstantStalenessTimeline(3)

    whole = finish(Virtual(plan, build_parts(cell, "vmap"), timeline=timeline))
    first = finish(Virtual(plan, build_parts(cell, "vmap"), timeline=timeline), until=cut)
    file = io.BytesIO()
    torch.save(first.state.state_dict(), file)
    file.seek(0)
    state = State.from_state_dict(torch.load(file))
    second = finish(Virtual(plan, build_parts(cell, "vmap"), state=state, step=cut, timeline=timeline))
    assert_same_bits(whole, second)
    twin, hit = whole.state.params["theta"]
    assert not torch.equal(twin, hit)


def test_a_fault_happens_when_its_worker_contributes() -> None:
    """Round robin, three workers, a fault of worker 1 asked for at step 3: it happens at update 4, once, and counts
    as a gradient at version 2; before it the twin is the same to the bit.

    Broken on purpose: a :func:`place` that leaves the step alone, or an engine that takes such a plan, fails.
    """
    cell = quadratic(workers=3, fault=Rd(step=3, value_mode="fixed", value=5.0))
    parts = build_parts(cell, "vmap")
    timeline = RoundRobinTimeline()
    ticks = timeline.ticks(3, 8, STREAMS, 0)
    asked = replace(plan_fault(parts, 0), worker=1)
    fault = place(asked, ticks)
    assert (asked.step, fault.step, ticks[4].versions) == (3, 4, (2,))

    def plan(planned: Any) -> BlockPlan:
        runs = (RunPlan("twin", 0, 8, 0.1, (planned,)), RunPlan("hit", 0, 8, 0.1, (planned,), True))
        return BlockPlan("k", 0, "vmap", runs)

    with pytest.raises(ValueError, match="worker 1 does not contribute to update 3"):
        Virtual(plan(asked), parts, timeline=timeline)
    engine = finish(Virtual(plan(fault), parts, timeline=timeline))
    _, hits = engine.recorder.flush()
    assert [(h["run"], h["step"]) for h in hits] == [("hit", 4)]
    theta, a, batch = numbers(parts, 0)
    updates = [(tick.workers, tick.versions) for tick in ticks]
    for m, faults in enumerate([{}, {(4, 1): (fault.index, 5.0)}]):
        expected = oracles.train(theta, a, batch, updates, rule=oracles.Momentum(), lr=lambda t: 0.1, faults=faults)
        np.testing.assert_allclose(engine.state.params["theta"][m].numpy(), expected[-1], rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="worker 1 still contributes"):
        place(replace(asked, step=8), ticks)


def test_times() -> None:
    """Barrier: the slowest worker; round robin: overlapping workers deliver W times as often."""
    barrier = BarrierTimeline(0.5, 0.2).ticks(3, 400, STREAMS, 0)
    step, worker = np.meshgrid(np.arange(400), np.arange(3), indexing="ij")
    z = STREAMS.normal("delay", 1, replicate=0, worker=worker, step=step)[..., 0]
    slowest = np.maximum(0.0, 0.5 + 0.2 * z).max(1)
    np.testing.assert_allclose([t.time_s for t in barrier], np.cumsum(slowest))
    assert 0.6 < slowest.mean() < 0.74  # E max of three normals = mean + 0.846 sd
    assert BarrierTimeline(0.5).ticks(3, 4, STREAMS, 0)[-1].time_s == pytest.approx(2.0)
    assert ConstantStalenessTimeline(2, 0.5).ticks(3, 4, STREAMS, 0)[-1].time_s == pytest.approx(2.0)
    overlapping = [t.time_s for t in RoundRobinTimeline(True, 0.6).ticks(3, 4, STREAMS, 0)]
    assert overlapping == pytest.approx([0.6, 0.8, 1.0, 1.2])
    waiting = [t.time_s for t in RoundRobinTimeline(False, 0.6).ticks(3, 4, STREAMS, 0)]
    assert waiting == pytest.approx([0.6, 1.2, 1.8, 2.4])


def test_the_clock_carries_the_virtual_time() -> None:
    cell = quadratic()
    engine = finish(Virtual(plan_of(cell, 4), build_parts(cell, "vmap"), timeline=BarrierTimeline(0.25)))
    assert engine.state.clock["virtual_s"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", TIMELINES.names())
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_timeline_is_causal_and_a_prefix_of_a_longer_one(name: str, workers: int) -> None:
    """No version from the future, time never runs backwards, and asking for more updates changes none of the first."""
    timeline = TIMELINES.lookup(name)().build()
    long = timeline.ticks(workers, 40, STREAMS, 3)
    assert timeline.ticks(workers, 15, STREAMS, 3) == long[:15]
    assert all(0 <= v <= t for t, tick in enumerate(long) for v in tick.versions)
    assert all(a.time_s <= b.time_s for a, b in itertools.pairwise(long))
    assert {w for tick in long for w in tick.workers} == set(range(workers))


@pytest.mark.parametrize(
    ("tick", "message"),
    [
        (Tick((0,), (1,), 0.0), "versions"),
        (Tick((2,), (0,), 0.0), "there are 2"),
        (Tick((0, 0), (0, 0), 0.0), "workers"),
        (Tick((), (), 0.0), "workers"),
    ],
)
def test_an_impossible_table_is_refused(tick: Tick, message: str) -> None:
    cell = quadratic()
    with pytest.raises(ValueError, match=message):
        Virtual(plan_of(cell, 1), build_parts(cell, "vmap"), timeline=RecordedTimeline([tick]))
    with pytest.raises(ValueError, match="ends after 1"):
        Virtual(plan_of(cell, 2), build_parts(cell, "vmap"), timeline=RecordedTimeline([tick]))
