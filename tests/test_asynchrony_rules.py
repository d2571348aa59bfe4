"""Staleness rules by hand, momentum on the workers, local steps, and what changes nothing."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from small import builder, finish, numbers, plan_of, quadratic
from test_virtual import assert_same_bits

from descentlab.cluster.barkai2020_gap_aware import GapAware
from descentlab.cluster.delays import GammaDelay
from descentlab.cluster.pace import Pace
from descentlab.cluster.schemes import Rounds, Waiting
from descentlab.cluster.specs import STALENESS_RULES, DelayCompensation
from descentlab.cluster.timeline import ConstantStalenessTimeline, RoundRobinTimeline
from descentlab.cluster.zheng2017_dcasgd import AdaptiveCompensation, ConstantCompensation
from descentlab.comm.dense import Dense
from descentlab.comm.specs import PowerSgd
from descentlab.comm.worker_momentum import WorkerMomentum
from descentlab.core.protocols import Lateness
from descentlab.core.state import State
from descentlab.engine.local_steps import LocalSteps
from descentlab.engine.virtual import Virtual
from descentlab.optim.specs import Adam, Sgd
from descentlab.workloads.sampler import Shuffled

READ = {"w": torch.tensor([[1.0, 2.0], [0.5, 0.5]], dtype=torch.float64)}
NOW = {"w": torch.tensor([[1.5, 1.0], [0.5, 0.5]], dtype=torch.float64)}
G = {"w": torch.tensor([[2.0, -3.0], [4.0, 1.0]], dtype=torch.float64)}
TWO = torch.tensor([2, 0])


def test_constant_compensation_by_hand() -> None:
    """g + lambda g^2 (now - read): 2 + .1 * 4 * .5 = 2.2 and -3 + .1 * 9 * (-1) = -3.9; no gap, no change.

    Broken by the sign of the difference, by g in place of g^2, or by weights that are the same object in both places
    (the published program's defect).
    """
    found = ConstantCompensation(0.1).adjust(G, Lateness(TWO, READ, NOW))["w"]
    torch.testing.assert_close(found, torch.tensor([[2.2, -3.9], [4.0, 1.0]], dtype=torch.float64))


def test_adaptive_compensation_by_hand() -> None:
    """MS = .05 g^2, then .95 MS + .05 g^2, and lambda / sqrt(MS + 1e-7); one port forgets the root."""
    rule = AdaptiveCompensation(2.0, 0.95)
    memory = rule.start(READ)
    ms = 0.0
    for _ in range(2):
        found = rule.adjust(G, Lateness(TWO, READ, NOW, memory))["w"][0, 0].item()
        ms = 0.95 * ms + 0.05 * 4.0
        assert found == pytest.approx(2.0 + 2.0 / np.sqrt(ms + 1e-7) * 4.0 * 0.5, rel=1e-12)
    assert memory["mean_square"]["w"][1, 1].item() == pytest.approx(0.05 * (1 + 0.95))


def test_gap_aware_by_hand() -> None:
    """The weights move by (.3, .4) a step: a usual step is sqrt((.09 + .16) / 2); gap over it plus 1 divides.

    Broken by a gap without its absolute value, a mean over members, or a bias of the running mean that is not
    corrected (its first value would be a hundredth).
    """
    rule = GapAware(0.99)
    start = {"w": torch.tensor([[1.0, 1.0], [9.0, 9.0]], dtype=torch.float64)}
    memory = rule.start(start)
    g = {"w": torch.ones(2, 2, dtype=torch.float64)}
    still = rule.adjust(g, Lateness(TWO, start, start, memory))["w"]
    assert torch.equal(still, g["w"])
    now = {"w": start["w"] + torch.tensor([[-0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)}
    found = rule.adjust(g, Lateness(TWO, start, now, memory))["w"]
    usual = np.sqrt((0.09 + 0.16) / 2)
    expected = [[1 / (0.3 / usual + 1), 1 / (0.4 / usual + 1)], [1.0, 1.0]]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_compensation_is_no_rule_to_the_bit(adaptive: bool) -> None:
    """Lambda 0 against no rule, on gradients that are stale; lambda > 0 does change them."""
    plan = plan_of(quadratic(workers=3), 12)

    def trained(rule: DelayCompensation | None) -> Virtual:
        parts = builder(quadratic(workers=3, optimizer=Sgd(lr=0.1, momentum=0.9)))()
        parts.staleness_rule = rule.build() if rule is not None else None
        engine = Virtual(plan, parts, timeline=RoundRobinTimeline())
        finish(engine)
        engine.state.shared.pop("rule", None)
        return engine

    plain = trained(None)
    assert_same_bits(plain, trained(DelayCompensation(lam=0.0, adaptive=adaptive)))
    moved = trained(DelayCompensation(lam=1.0, adaptive=adaptive))
    assert not torch.equal(plain.state.params["theta"], moved.state.params["theta"])


@pytest.mark.parametrize("name", STALENESS_RULES.names())
def test_no_rule_changes_what_is_not_late(name: str) -> None:
    """Behind a barrier every rule is none, to the bit."""
    plan = plan_of(quadratic(workers=2), 6)
    ends = []
    for rule in ("none", name):
        cell = quadratic(workers=2, staleness_rule=rule, optimizer=Adam(lr=0.05))
        engine = finish(Virtual(plan, builder(cell)(), timeline=Rounds(Pace(GammaDelay()))))
        ends.append(engine.state.params["theta"])
    assert torch.equal(*ends)


def test_compensation_through_the_engine_matches_numpy() -> None:
    """Constant staleness 2, one worker: theta by the formula."""
    cell = quadratic(workers=1, staleness_rule=DelayCompensation(lam=0.7), optimizer=Sgd(lr=0.1))
    parts = builder(cell)()
    engine = finish(Virtual(plan_of(cell, 15), parts, timeline=ConstantStalenessTimeline(2)))
    for m in range(2):
        theta, a, batch = numbers(parts, m)
        path = [theta]
        for t in range(15):
            read = path[max(0, t - 2)]
            g = (read @ a.T - batch(0, t).mean(0)) @ a
            path.append(path[-1] - 0.1 * (g + 0.7 * g * g * (path[-1] - read)))
        np.testing.assert_allclose(engine.state.params["theta"][m].numpy(), path[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["compensation", "gap_aware"])
def test_a_rule_with_a_memory_is_resumed_to_the_bit(name: str) -> None:
    """Broken by a memory kept on the rule: another process would begin it anew."""
    rule = {"name": name, "adaptive": True} if name == "compensation" else name
    cell = quadratic(workers=3, staleness_rule=rule)
    plan, timeline = plan_of(cell, 20), Waiting(Pace(GammaDelay()))
    whole = finish(Virtual(plan, builder(cell)(), timeline=timeline))
    first = finish(Virtual(plan, builder(cell)(), timeline=timeline), until=9)
    file = io.BytesIO()
    torch.save(first.state.state_dict(), file)
    file.seek(0)
    state = State.from_state_dict(torch.load(file))
    assert_same_bits(whole, finish(Virtual(plan, builder(cell)(), state=state, step=9, timeline=timeline)))


def test_worker_momentum_is_heavy_ball_for_one_worker_and_separate_for_two() -> None:
    """W = 1: torch's own momentum, to the bit. W = 2, taking turns: each velocity by hand, never the other's."""
    plan = plan_of(quadratic(workers=1), 10)
    parts = builder(quadratic(workers=1, optimizer=Sgd(lr=0.1)))()
    parts.compressor = WorkerMomentum(Dense(), 0.9)
    found = finish(Virtual(plan, parts, timeline=RoundRobinTimeline()))
    expected = builder(quadratic(workers=1, optimizer=Sgd(lr=0.1, momentum=0.9)))()
    server = finish(Virtual(plan, expected, timeline=RoundRobinTimeline()))
    assert torch.equal(found.state.params["theta"], server.state.params["theta"])

    parts = builder(quadratic(workers=2, optimizer=Sgd(lr=0.1)))()
    parts.compressor = WorkerMomentum(Dense(), 0.9)
    engine = finish(Virtual(plan, parts, timeline=RoundRobinTimeline()))
    theta, a, batch = numbers(parts, 0)
    path, velocity = [theta], [0.0, 0.0]
    for t in range(10):
        read = path[max(0, t - 1)]
        velocity[t % 2] = 0.9 * velocity[t % 2] + (read @ a.T - batch(t % 2, t // 2).mean(0)) @ a
        path.append(path[-1] - 0.1 * velocity[t % 2])
    np.testing.assert_allclose(engine.state.params["theta"][0].numpy(), path[-1], rtol=0, atol=1e-12)


def test_worker_momentum_before_compression() -> None:
    """Around PowerSGD its residuals stay where they were, and the bytes are PowerSGD's."""
    cell = quadratic(workers=2, compressor=PowerSgd(rank=1))
    plain, wrapped = builder(cell)(), builder(cell)()
    wrapped.compressor = WorkerMomentum(wrapped.compressor, 0.0)
    first, second = (
        finish(Virtual(plan_of(cell, 6), parts, timeline=RoundRobinTimeline())) for parts in (plain, wrapped)
    )
    assert torch.equal(first.state.params["theta"], second.state.params["theta"])
    assert torch.equal(first.state.clock["bytes_sent"], second.state.clock["bytes_sent"])


@pytest.mark.parametrize("count", [1, 3])
def test_local_steps_match_numpy(count: int) -> None:
    """Two workers take ``count`` steps each from the same weights; the server averages their copies (its rate is 1)."""
    cell = quadratic(workers=2, optimizer=Sgd(lr=1.0))
    parts = builder(cell)()
    parts.many = LocalSteps(parts.many, count, 0.2)
    parts.sampler = Shuffled(32, 8 * count, parts.streams)
    engine = finish(Virtual(plan_of(cell, 4), parts, timeline=Rounds(Pace(GammaDelay()))))
    for m in range(2):
        theta, a, batch = numbers(parts, m)
        for t in range(4):
            copies = []
            for w in range(2):
                local, targets = theta, batch(w, t)
                for h in range(count):
                    local = local - 0.2 * (local @ a.T - targets[8 * h : 8 * h + 8].mean(0)) @ a
                copies.append(local)
            theta = np.mean(copies, axis=0)
        np.testing.assert_allclose(engine.state.params["theta"][m].numpy(), theta, rtol=0, atol=1e-12)


def test_one_local_step_is_the_barrier() -> None:
    """Rate .2 on the workers and 1 on the server, or 1 gradient and .2 on the server: the same up to rounding."""
    ends = []
    for lr in (1.0, 0.2):
        cell = quadratic(workers=3, optimizer=Sgd(lr=lr))
        parts = builder(cell)()
        if lr == 1.0:
            parts.many = LocalSteps(parts.many, 1, 0.2)
        engine = finish(Virtual(plan_of(cell, 8), parts, timeline=Rounds(Pace(GammaDelay()))))
        ends.append(engine.state.params["theta"])
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)
