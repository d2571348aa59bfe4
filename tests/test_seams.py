"""The seams of the cluster and of compression: delays, the asynchronous timeline, staleness rules, rank policies."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from small import builder, digits, finish, plan_of, quadratic

from descentlab.cluster.specs import (
    DELAYS,
    Asynchronous,
    ConstantDelay,
    GaussianDelayLaw,
    InverseStalenessRule,
)
from descentlab.cluster.staleness import InverseStaleness
from descentlab.cluster.timeline import AsynchronousTimeline, BarrierTimeline, GaussianDelay, RoundRobinTimeline
from descentlab.comm.specs import PowerSgd, ScheduledRank
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.core.protocols import Lateness
from descentlab.core.state import State
from descentlab.core.streams import Streams
from descentlab.core.tree import leaves
from descentlab.engine.driver import Engine
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.virtual import Virtual

STREAMS = Streams(7)


def simulated(seconds: np.ndarray, steps: int) -> list[tuple[int, int, float]]:
    """(worker, version, time) of each update, by sorting every gradient there could be."""
    ends = np.cumsum(seconds, axis=0)
    events = sorted((ends[i, w], w) for i in range(len(ends)) for w in range(ends.shape[1]))[:steps]
    last, out = dict.fromkeys(range(ends.shape[1]), 0), []
    for t, (time_s, w) in enumerate(events):
        out.append((w, last[w], time_s))
        last[w] = t + 1
    return out


@pytest.mark.parametrize("slow", [1.0, 2.0, 0.5])
def test_asynchronous_is_the_sorted_list_of_all_gradients(slow: float) -> None:
    """Broken by a version counted from another worker's update, a tie to the higher worker, or a delay read twice."""
    law = GaussianDelay(0.03, 0.005, slow)
    ticks = AsynchronousTimeline(law).ticks(4, 60, STREAMS, 2)
    expected = simulated(law.seconds(4, 60, STREAMS, 2), 60)
    assert [(t.workers[0], t.versions[0]) for t in ticks] == [(w, v) for w, v, _ in expected]
    np.testing.assert_allclose([t.time_s for t in ticks], [s for _, _, s in expected])


def test_equal_speeds_take_turns() -> None:
    """Ties to the lowest worker, so the order and every version are those of round robin."""
    alone = AsynchronousTimeline(GaussianDelay(0.5)).ticks(3, 20, STREAMS, 0)
    turns = RoundRobinTimeline().ticks(3, 20, STREAMS, 0)
    assert [(t.workers, t.versions) for t in alone] == [(t.workers, t.versions) for t in turns]


def test_a_slow_worker_by_hand() -> None:
    """Worker 0 needs 2 s, worker 1 needs 1 s; at t = 2 s both are ready and the lower one goes first."""
    ticks = AsynchronousTimeline(GaussianDelay(1.0, 0.0, 2.0)).ticks(2, 6, STREAMS, 0)
    assert [t.workers[0] for t in ticks] == [1, 0, 1, 1, 0, 1]
    assert [t.versions[0] for t in ticks] == [0, 0, 1, 3, 2, 4]
    assert [t.time_s for t in ticks] == [1.0, 2.0, 2.0, 3.0, 4.0, 4.0]


def test_one_asynchronous_worker_is_plain_training_to_the_bit() -> None:
    cell = digits(workers=1, timeline=Asynchronous(), staleness_rule=InverseStalenessRule())
    plan = plan_of(cell, 6)
    asynchronous = finish(Virtual(plan, builder(cell)(), timeline=cell.timeline.build()))
    assert_equal(asynchronous, finish(Lockstep(plan, builder(digits(workers=1))())), "params", "buffers")


def assert_equal(a: Engine, b: Engine, *parts: str) -> None:
    for part in parts:
        left, right = list(leaves(a.state.server[part])), list(leaves(b.state.server[part]))
        assert len(left) == len(right) and all(map(torch.equal, left, right))


def test_delays_mean_what_they_say() -> None:
    """30 +- 5 ms, worker 0 twice both; constant delays have no spread; nobody's draw depends on who else is there."""
    law = GaussianDelayLaw(slow_factor=2.0).build()
    drawn = law.seconds(3, 4000, STREAMS, 0)
    np.testing.assert_allclose(drawn.mean(0), [0.06, 0.03, 0.03], rtol=0.02)
    np.testing.assert_allclose(drawn.std(0), [0.01, 0.005, 0.005], rtol=0.06)
    np.testing.assert_array_equal(law.seconds(2, 100, STREAMS, 0), drawn[:100, :2])
    assert (GaussianDelay(0.0, 1.0).seconds(2, 50, STREAMS, 0) >= 0).all()
    np.testing.assert_array_equal(
        ConstantDelay(mean_s=0.5, slow_factor=3.0).build().seconds(2, 2, STREAMS, 0), [[1.5, 0.5]] * 2
    )
    assert {"constant", "gaussian"} <= set(DELAYS.names())


@pytest.mark.parametrize("times", [np.full((5, 2), -1.0), np.full((5, 2), np.inf), np.ones((2, 5))])
def test_impossible_delays_are_refused(times: np.ndarray) -> None:
    class Law:
        def seconds(self, workers: int, steps: int, streams: Streams, replicate: int) -> np.ndarray:
            return times

    with pytest.raises(
        UserError, match=r"timeline.delay = 'Law .*expected finite times of at least 0 of shape \(5, 2\)"
    ):
        AsynchronousTimeline(Law()).ticks(2, 5, STREAMS, 0)


def test_inverse_staleness_by_hand() -> None:
    g = {"w": torch.tensor([[8.0, 4.0], [8.0, 4.0], [8.0, 4.0]])}
    found = InverseStaleness().adjust(g, Lateness(torch.tensor([0, 1, 4]), g, g))
    assert found["w"].tolist() == [[8.0, 4.0], [8.0, 4.0], [2.0, 1.0]]


def test_a_rule_sees_the_weights_that_were_read() -> None:
    """Round robin with three workers: ``now`` is the present, ``read`` what stood two updates ago."""
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    class Spy:
        def adjust(self, grads: dict, late: Lateness) -> dict:
            seen.append((int(late.versions[0]), late.read["theta"].clone(), late.now["theta"].clone()))
            return grads

    cell = quadratic(workers=3)
    parts = builder(cell)()
    parts.staleness_rule = Spy()
    finish(Virtual(plan_of(cell, 6), parts, timeline=RoundRobinTimeline()))
    assert [s for s, _, _ in seen] == [0, 1, 2, 2, 2, 2]
    for t in range(2, 6):
        assert torch.equal(seen[t][1], seen[t - 2][2]) and not torch.equal(seen[t][1], seen[t][2])


def test_a_rule_and_a_policy_that_change_nothing_change_no_bit() -> None:
    """Invariant 7: under a barrier nothing is late; a schedule whose ranks are all equal is the fixed rank."""
    base = {"compressor": PowerSgd(rank=2)}
    plan = plan_of(digits(**base), 6)
    plain = finish(Virtual(plan, builder(digits(**base))(), timeline=BarrierTimeline()))
    ruled = digits(staleness_rule=InverseStalenessRule(), **base)
    assert_equal(plain, finish(Virtual(plan, builder(ruled)(), timeline=BarrierTimeline())), "params")
    same = digits(compressor=PowerSgd(policy=ScheduledRank(ranks=[2, 2], steps=[3])))
    assert_equal(plain, finish(Virtual(plan, builder(same)(), timeline=BarrierTimeline())), "params")


def test_a_rank_changes_between_updates_and_the_residual_stays() -> None:
    """Ranks 4, 1, 2 from updates 0, 2 and 4; what is owed is the same to the bit before and after the change, and the
    columns that stay, too. Broken by a policy read one update late, or by a fresh start at a change."""
    cell = digits(compressor=PowerSgd(policy=ScheduledRank(ranks=[4, 1, 2], steps=[2, 4])))
    engine = Lockstep(plan_of(cell, 6), builder(cell)())
    widths = []
    name = max(engine.state.shared["q"], key=lambda n: engine.state.shared["q"][n].shape[1])
    for _ in engine.run():
        widths.append(engine.state.shared["q"][name].shape[-1])
        if engine.step in (2, 4):
            owed = engine.state.worker["memory"]["residual"][name].clone()
            columns = engine.state.shared["q"][name].clone()
            engine._resize()  # what the next update does first
            after = engine.state.shared["q"][name]
            both = min(columns.shape[-1], after.shape[-1])
            assert torch.equal(engine.state.worker["memory"]["residual"][name], owed) and owed.abs().max() > 0
            assert torch.equal(after[..., :both], columns[..., :both])
    assert widths == [4, 4, 1, 1, 2, 2]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_scheduled_rank_is_resumed_to_the_bit(cut: int) -> None:
    cell = digits(compressor=PowerSgd(policy=ScheduledRank(ranks=[4, 2], steps=[2])))
    plan, build = plan_of(cell, 5), builder(cell)
    whole, first = finish(Lockstep(plan, build())), finish(Lockstep(plan, build()), until=cut)
    file = io.BytesIO()
    torch.save(first.state.state_dict(), file)
    file.seek(0)
    second = finish(Lockstep(plan, build(), State.from_state_dict(torch.load(file)), cut))
    assert_equal(whole, second, "params")


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("compressor={name: powersgd, policy: schedul}", "did you mean 'schedule'"),
        ("compressor={name: powersgd, policy: {name: schedule, steps: [5, 5], ranks: [3, 2, 1]}}", "ascending updates"),
        ("compressor={name: powersgd, policy: {name: schedule, steps: [5], ranks: [3]}}", "2 ranks for 1 changes"),
        ("compressor={name: powersgd, rank: 2, policy: schedule}", "no rank beside policy = schedule"),
        ("staleness_rule=inverse_stalenes", "did you mean 'inverse_staleness'"),
        ("timeline={name: asynchronous, delay: gausian}", "did you mean 'gaussian'"),
        ("timeline={name: asynchronous, delay: {name: constant, mean_s: -1}}", "mean_s"),
        ("timeline={name: asynchronous, delay: {name: constant, slow_factor: 0}}", "slow_factor"),
    ],
)
def test_a_mistake_is_one_clear_error(setting: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        resolve("crossed", [setting, "fault=none"])


@pytest.mark.parametrize("rank", [0, 1.5, None])
def test_an_impossible_rank_of_a_policy_is_refused(rank: object) -> None:
    class Policy:
        def rank(self, moment: object) -> object:
            return rank

    cell = digits(compressor=PowerSgd())
    parts = builder(cell)()
    parts.rank_policy = Policy()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"compressor.policy = .*expected a rank of at least 1 at step 0"):
        finish(Lockstep(plan_of(cell, 1), parts))
