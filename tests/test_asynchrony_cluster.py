"""Delay laws, paces, who waits for whom, and what theory says of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from small import digits, finish, plan_of, quadratic
from test_virtual import assert_same_bits

from descentlab.cluster.delays import CyclicDelay, GammaDelay, GaussianDelay, ParetoDelay, TraceDelay
from descentlab.cluster.pace import Line, Pace
from descentlab.cluster.schemes import Rounds, Softsyncs, Waiting
from descentlab.cluster.specs import DELAYS, LEVELS, GaussianDelayLaw
from descentlab.cluster.timeline import AsynchronousTimeline, ConstantStalenessTimeline
from descentlab.core.errors import UserError
from descentlab.core.protocols import Delay
from descentlab.core.streams import Streams
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.program import BlockPlan, RunPlan
from descentlab.engine.virtual import Virtual
from descentlab.launch.build import build_parts
from descentlab.optim.specs import Sgd
from descentlab.theory import staleness as theory
from descentlab.workloads.specs import Full, Quadratic

STREAMS = Streams(3)
LAWS: list[Delay] = [
    GaussianDelay(0.03),
    GaussianDelay(0.03, 0.005, 2.0),
    GammaDelay(0.03, 1.0),
    GammaDelay(0.03, 4.0, 2.0),
    ParetoDelay(0.03, 1.5),
    CyclicDelay(0.03, 0.9, 7.0),
]


class Fixed:
    """Given times, ``[T, W]``."""

    def __init__(self, times: list[list[float]]) -> None:
        self.times = np.array(times)

    def seconds(self, workers: int, steps: int, streams: Streams, replicate: int) -> np.ndarray:
        return self.times[:steps, :workers]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_law_is_a_prefix_of_itself_and_never_negative(law: Delay) -> None:
    long = law.seconds(4, 60, STREAMS, 1)
    assert long.shape == (60, 4) and (long >= 0).all() and np.isfinite(long).all()
    np.testing.assert_array_equal(law.seconds(4, 20, STREAMS, 1), long[:20])


def test_laws_have_the_moments_they_name() -> None:
    """Broken by a shape taken for a rate, a tail's mean forgotten, or a factor on the mean alone."""
    n = 40_000
    for law, mean, spread in (
        (GammaDelay(0.03, 1.0), 0.03, 0.03),
        (GammaDelay(0.03, 4.0, 2.0), 0.06, 0.03),
        (CyclicDelay(0.03, 0.5, 50.0), 0.03, 0.015 / np.sqrt(2)),
    ):
        drawn = law.seconds(1, n, STREAMS, 0)[:, 0]
        assert drawn.mean() == pytest.approx(mean, rel=0.02) and drawn.std() == pytest.approx(spread, rel=0.03)
    tail = ParetoDelay(0.03, 3.0).seconds(1, n, STREAMS, 0)[:, 0]
    assert tail.min() >= 0.02 and tail.mean() == pytest.approx(0.03, rel=0.02)
    assert (tail > 0.04).mean() == pytest.approx((0.02 / 0.04) ** 3, rel=0.05)


def test_named_levels_and_the_slow_worker() -> None:
    """30, 60, 90 ms as the results were made with, 10, 20, 30 ms as the documentation has them."""
    assert [LEVELS[k] for k in ("small", "medium", "long")] == [0.03, 0.06, 0.09]
    assert [LEVELS[f"documented_{k}"] for k in ("small", "medium", "long")] == [0.01, 0.02, 0.03]
    law = GaussianDelayLaw(level="medium", slow_factor=2.0, only_slow=True)
    drawn = law.build().seconds(3, 5000, STREAMS, 0)
    assert drawn[:, 0].mean() == pytest.approx(0.12, rel=0.01) and drawn[:, 0].std() == pytest.approx(0.01, rel=0.05)
    assert not drawn[:, 1:].any()
    with pytest.raises(ValueError, match=r"mean_s = 0\.05: expected no mean beside level = small"):
        GaussianDelayLaw(level="small", mean_s=0.05)
    assert GaussianDelayLaw.model_validate(law.model_dump()) == law  # as a run directory reads it back


def test_a_trace(tmp_path: Path) -> None:
    file = tmp_path / "times.csv"
    file.write_text("# seconds\n0.1, 0.2\n0.3, 0.4\n0.5, 0.6\n")
    found = TraceDelay(str(file)).seconds(2, 5, STREAMS, 9)
    np.testing.assert_allclose(found, [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.1, 0.2], [0.3, 0.4]])
    with pytest.raises(UserError, match="a column for each of 3 workers, or one; it has 2"):
        TraceDelay(str(file)).seconds(3, 5, STREAMS, 0)
    file.write_text("1\n2\n3\n4\n")
    one = TraceDelay(str(file)).seconds(2, 3, STREAMS, 0)
    np.testing.assert_array_equal(one, [[1, 3], [2, 4], [3, 1]])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.1\n-0.2\n", r"times of at least 0 s; row 2, column 1 is -0.2"),
        ("0.1\nnan\n", "row 2, column 1 is nan"),
        ("0.1, x\n", "rows of numbers"),
        ("1 2\n3\n", "rows of numbers"),
        ("", "at least one row"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "times.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        TraceDelay(str(file))
    with pytest.raises(UserError, match=r"delay\.path = .*expected a readable file"):
        TraceDelay(str(tmp_path / "none.txt"))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_waiting_for_nobody_is_the_asynchronous_timeline(law: Delay) -> None:
    """The event list with messages, groups and bounds is, without them, the one tested against a sorted list."""
    plain = AsynchronousTimeline(law).ticks(4, 80, STREAMS, 2)
    assert Waiting(Pace(law)).ticks(4, 80, STREAMS, 2) == plain
    assert Softsyncs(Pace(law), 4).ticks(4, 80, STREAMS, 2) == plain
    assert Waiting(Pace(law), bound=1000).ticks(4, 80, STREAMS, 2) == plain
    assert Waiting(Pace(law)).ticks(4, 30, STREAMS, 2) == plain[:30]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_one_group_of_all_workers_is_the_barrier(law: Delay) -> None:
    """Times too: everybody reads when the last has delivered."""
    rounds = Rounds(Pace(law)).ticks(3, 40, STREAMS, 0)
    together = Softsyncs(Pace(law), 1).ticks(3, 40, STREAMS, 0)
    assert [(t.workers, t.versions) for t in rounds] == [(t.workers, t.versions) for t in together]
    np.testing.assert_allclose([t.time_s for t in rounds], [t.time_s for t in together], rtol=1e-12)
    ends = np.cumsum(law.seconds(3, 40, STREAMS, 0).max(1))
    np.testing.assert_allclose([t.time_s for t in rounds], ends)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_nobody_runs_ahead_of_the_bound(bound: int) -> None:
    """Worker 0 needs ten times as long. Broken by counting updates for gradients, or by waiting on the fastest."""
    ticks = Waiting(Pace(GaussianDelay(0.03, 0.005, 10.0)), bound=bound).ticks(4, 200, STREAMS, 0)
    done, furthest = [0] * 4, 0
    for tick in ticks:
        (w,) = tick.workers
        assert done[w] - min(done) <= bound  # it began this gradient when that held, and others only advance since
        done[w] += 1
        furthest = max(furthest, done[w] - min(done))
    assert furthest == bound + 1  # the bound is what stops them
    stale = [t - tick.versions[0] for t, tick in enumerate(ticks)]
    assert max(stale) <= (2 * bound + 1) * 3


def test_a_blocked_worker_reads_when_it_begins() -> None:
    """Bound 0, times 3 s and 1 s: worker 1 waits from 1 s to 3 s and then reads version 2, not 1."""
    ticks = Waiting(Pace(Fixed([[3, 1]] * 4)), bound=0).ticks(2, 4, STREAMS, 0)
    assert [(t.workers[0], t.versions[0], t.time_s) for t in ticks] == [
        (1, 0, 1.0),
        (0, 0, 3.0),
        (1, 2, 4.0),
        (0, 2, 6.0),
    ]


def test_groups_by_hand() -> None:
    """Times 1, 2, 4 s in groups of two: at 2 s workers 0 and 1, at 4 s 0, 1 and 2 are ready and 0 and 1 come first."""
    ticks = Waiting(Pace(Fixed([[1, 2, 4]] * 4)), group=2).ticks(3, 3, STREAMS, 0)
    assert [(t.workers, t.versions, t.time_s) for t in ticks] == [
        ((0, 1), (0, 0), 2.0),
        ((0, 1), (1, 1), 4.0),
        ((0, 2), (2, 0), 5.0),
    ]


def test_backup_workers_by_hand() -> None:
    """The slowest of each round is dropped and begins anew with all others."""
    ticks = Rounds(Pace(Fixed([[1, 5, 2], [9, 1, 2], [1, 1, 1]])), backup=1).ticks(3, 3, STREAMS, 0)
    assert [(t.workers, t.versions, t.time_s) for t in ticks] == [
        ((0, 2), (0, 0), 2.0),
        ((1, 2), (1, 1), 4.0),
        ((0, 1), (2, 2), 5.0),
    ]


def test_messages_by_hand() -> None:
    """1 s computing, 100 bytes at 100 bytes/s, 0.1 s latency; the shared link passes one message at a time."""
    apart = Pace(Fixed([[0.0, 0.0]] * 2), 1.0, 0.1, 100.0, False, 100)
    assert Rounds(apart).ticks(2, 2, STREAMS, 0)[0].time_s == pytest.approx(1.1 + 1 + 1.1)
    shared = Pace(Fixed([[0.0, 0.0]] * 2), 1.0, 0.1, 100.0, True, 100)
    # weights arrive at 1.1 and 2.1, gradients are ready at 2.1 and 3.1, arrive at 3.2 and 4.2
    assert Rounds(shared).ticks(2, 1, STREAMS, 0)[0].time_s == pytest.approx(4.2)
    assert [t.time_s for t in Waiting(shared).ticks(2, 2, STREAMS, 0)] == pytest.approx([3.2, 4.2])
    line = Line(1.0, 0.0, True)
    assert [line.arrival(t) for t in (0.0, 0.5, 9.0)] == [1.0, 2.0, 10.0]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_mean_staleness_is_what_theory_says(law: Delay) -> None:
    """W - 1 whatever the speeds: of the updates under way each is applied once."""
    steps, workers = 4000, 5
    ticks = Waiting(Pace(law)).ticks(workers, steps, STREAMS, 0)
    mean = np.mean([t - tick.versions[0] for t, tick in enumerate(ticks)])
    assert mean == pytest.approx(theory.expected_staleness(workers), rel=0.03)


def test_the_time_model() -> None:
    """Against the simulated clock: a barrier's rounds and an asynchronous server's updates."""
    law = GaussianDelay(0.03, 0.005, 2.0)
    means, stds = [0.065, 0.035, 0.035], [0.01, 0.005, 0.005]
    pace = Pace(law, compute_s=0.005, latency_s=0.002)
    rounds = Rounds(pace).ticks(3, 4000, STREAMS, 0)[-1].time_s / 4000
    assert rounds == pytest.approx(theory.barrier_update_s(means, stds, 0.002), rel=0.01)
    free = Waiting(pace).ticks(3, 4000, STREAMS, 0)[-1].time_s / 4000
    assert free == pytest.approx(theory.asynchronous_update_s(means, 0.002), rel=0.01)
    assert theory.slowest_mean_s([0.03, 0.03], [0.0, 0.0]) == 0.03
    assert theory.efficiency(40.0, 10.0, 5) == 0.8


@pytest.mark.parametrize("tau", [0, 1, 2, 4, 9])
def test_virtual_is_stable_below_the_delay_bound_and_not_above(tau: int) -> None:
    """eta lambda < 2 sin(pi / (2 (2 tau + 1))) on a quadratic without noise, run through the engine.

    Two members at .98 and 1.02 of the bound; the largest curvature is 1. The size of the last 200 of theta against that
    of 200 earlier ones must fall and rise as fast as the roots say. Broken by a staleness of tau + 1 or tau - 1.
    """
    steps = 240 + 40 * tau
    dataset = Quadratic(n=8, dimension=2, condition=100.0, noise=0.0)
    cell = quadratic(workers=1, dataset=dataset, sampler=Full(), optimizer=Sgd(lr=1.0))
    limit = theory.stability_limit(tau)
    rates = {"below": 0.98 * limit, "above": 1.02 * limit}
    parts = build_parts(cell, "vmap")
    parts.every, parts.evaluate_every = 10**6, 0
    plan = BlockPlan("k", 0, "vmap", tuple(RunPlan(name, 0, steps, lr) for name, lr in rates.items()))
    path = []
    for progress in Virtual(plan, parts, timeline=ConstantStalenessTimeline(tau)).run():
        path.append(progress.state.params["theta"][:, :, 0].clone())
    size = torch.stack(path).norm(dim=2)
    window = 4 * (2 * tau + 1)
    for m, (name, lr) in enumerate(rates.items()):
        early, late = (size[a : a + window, m].max().item() for a in (steps // 4, steps - window))
        grown = (late / early) ** (1 / (steps - window - steps // 4))
        assert (grown > 1) == (name == "above")
        assert grown == pytest.approx(theory.growth_rate(lr, tau), abs=2e-3)
        assert (theory.growth_rate(lr, tau) > 1) == (name == "above")


def test_theory_by_hand() -> None:
    """Closed forms: no delay; one update of delay is stable up to 1; heavy ball without delay up to 2 (1 + m)."""
    assert theory.stability_limit(0) == pytest.approx(2.0) and theory.stability_limit(1) == pytest.approx(1.0)
    assert theory.momentum_limit(0, 0.9) == pytest.approx(3.8, rel=1e-6)
    assert theory.momentum_limit(4, 0.0) == pytest.approx(theory.stability_limit(4), rel=1e-6)
    assert theory.momentum_limit(4, 0.9) < theory.stability_limit(4)
    assert [theory.implicit_momentum(w) for w in (1, 2, 10)] == [0.0, 0.5, 0.9]


def test_asynchrony_begets_momentum() -> None:
    """Exponential times on a quadratic: the mean path is that of rate / W and momentum 1 - 1/W.

    The mean over 200 replicates of theta against the recursion in numbers; plain SGD at rate / W without momentum is
    far off (arXiv 1605.09774).
    """
    workers, lr, steps, n = 4, 0.4, 40, 200
    total = np.zeros(steps + 1)
    for r in range(n):
        theta = [1.0]
        for tick in Waiting(Pace(GammaDelay(1.0, 1.0))).ticks(workers, steps, STREAMS, r):
            theta.append(theta[-1] - lr / workers * theta[tick.versions[0]])
        total += theta
    found = total / n
    m, expected, moved = theory.implicit_momentum(workers), [1.0], -lr / workers  # all have read the first weights
    for _ in range(steps):
        moved = m * moved - lr / workers**2 * expected[-1]
        expected.append(expected[-1] + moved)
    plain = (1 - lr / workers) ** np.arange(steps + 1)
    assert np.abs(found - expected).max() < 0.35 * np.abs(found - plain).max()


@pytest.mark.parametrize("law", [*LAWS, None], ids=str)
def test_barrier_equals_lockstep_to_the_bit_under_every_law(law: Delay | None, tmp_path: Path) -> None:
    """Invariant 3: delays and messages move the clock, nothing else; a measured trace too."""
    if law is None:
        (tmp_path / "t").write_text("0.5\n0.1\n")
        law = TraceDelay(str(tmp_path / "t"))
    cell = digits(workers=3)
    plan = plan_of(cell, 5)
    expected = finish(Lockstep(plan, build_parts(cell, "vmap")))
    timeline = Rounds(Pace(law, 0.01, 0.1, 1e6, True, 1000))
    assert_same_bits(expected, finish(Virtual(plan, build_parts(cell, "vmap"), timeline=timeline)))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_one_worker_is_sequential_to_the_bit_under_every_law(law: Delay) -> None:
    cell = digits(workers=1)
    plan = plan_of(cell, 6)
    expected = finish(Lockstep(plan, build_parts(cell, "vmap")))
    for timeline in (Waiting(Pace(law)), Waiting(Pace(law), bound=0), Softsyncs(Pace(law), 1)):
        assert_same_bits(expected, finish(Virtual(plan, build_parts(cell, "vmap"), timeline=timeline)))


def test_staleness_and_gap_are_recorded() -> None:
    """Asynchronous, three workers: the columns against versions by the table and norms by numpy."""
    cell = quadratic(workers=3, optimizer=Sgd(lr=0.2))
    timeline = Waiting(Pace(GammaDelay(1.0, 1.0)))
    engine = Virtual(plan_of(cell, 30), build_parts(cell, "vmap"), timeline=timeline)
    path = [engine.state.params["theta"].clone()]
    for progress in engine.run():
        path.append(progress.state.params["theta"].clone())
    columns, _ = engine.recorder.flush()
    tables = [timeline.ticks(3, 30, engine.parts.streams, r) for r in range(2)]
    stale = [[t - table[t].versions[0] for table in tables] for t in range(30)]
    assert columns["staleness"].to_list() == list(itertools.chain(*stale))
    assert columns["worker"].to_list() == [table[t].workers[0] for t in range(30) for table in tables]
    gap = [(path[t][m] - path[tables[m][t].versions[0]][m]).norm().item() for t in range(30) for m in range(2)]
    np.testing.assert_allclose(columns["weight_gap"].to_numpy(), gap, atol=1e-12)
    assert max(gap) > 0


def test_every_law_is_listed() -> None:
    assert DELAYS.names() == ["constant", "cyclic", "exponential", "gamma", "gaussian", "heavy_tail", "trace"]
