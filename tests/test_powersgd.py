"""PowerSGD: what is sent and what is owed add up, against a numpy version, at every awkward gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import digits, finish, plan_of
from torch import Tensor

from descentlab.comm.dense import Dense
from descentlab.comm.powersgd import PowerSGD, orthonormal, saves
from descentlab.comm.specs import PowerSgd
from descentlab.core.exchange import drive as run
from descentlab.core.exchange import over_workers
from descentlab.core.protocols import Collective, Compressor
from descentlab.core.streams import Streams
from descentlab.core.tree import Tree
from descentlab.engine.lockstep import Lockstep
from descentlab.launch.build import build_parts
from descentlab.optim.specs import Sgd

STREAMS = Streams(7)


def drive(compressor: Compressor, grads: Tree, memory: Tree, shared: Tree) -> tuple[Tree, Tree, Tree, list[Collective]]:
    """Answer every collective with the mean over workers; also the list of collectives."""
    sent: list[Collective] = []

    def answer(request: Collective) -> Any:
        sent.append(request)
        return over_workers(request)

    return (*run(compressor.exchange(grads, memory, shared), answer), sent)


def start(compressor: PowerSGD, shapes: dict[str, tuple[int, ...]], members: int, workers: int) -> tuple[Tree, Tree]:
    params = {k: torch.zeros(members, *s, dtype=torch.float64) for k, s in shapes.items()}
    return compressor.start(params, workers, STREAMS, np.arange(members))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    rank=st.integers(1, 4),
    workers=st.integers(1, 4),
    members=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_sent_plus_owed_is_what_went_in(shape: list[int], rank: int, workers: int, members: int, seed: int) -> None:
    """For every worker, over five steps: reconstruction + residual = gradient + previous residual, for any shape.

    Broken on purpose: leaving the previous residual out of the input fails from the second step on.
    """
    compressor = PowerSGD(rank)
    memory, shared = start(compressor, {"w": tuple(shape)}, members, workers)
    for step in range(5):
        g = normal(seed + step, members, workers, *shape)
        owed = memory["residual"].get("w", torch.zeros_like(g))
        mean, memory, shared, _ = drive(compressor, {"w": g}, memory, shared)
        if len(shape) == 1:
            assert torch.equal(mean["w"], g.mean(1)) and not memory["residual"]
        elif saves(shape[0], int(np.prod(shape[1:])), rank):
            torch.testing.assert_close(mean["w"].unsqueeze(1) + memory["residual"]["w"], g + owed)
        else:  # sent whole: the workers' sums travel, nothing is owed
            torch.testing.assert_close(mean["w"], (g + owed).mean(1))
            assert not memory["residual"]["w"].any()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("workers", [1, 3])
def test_matches_numpy(rank: int, workers: int) -> None:
    """Two members, eight steps, a four-axis tensor seen as [5, 12]; numpy works on one matrix at a time.

    Broken on purpose: no warm start (a fresh Q per step), or P not orthogonal, fails at the second step.
    """
    compressor = PowerSGD(rank)
    memory, shared = start(compressor, {"w": (5, 3, 2, 2)}, 2, workers)
    numpy = [oracles.LowRank(shared["q"]["w"][m].numpy().copy()) for m in range(2)]
    for step in range(8):
        g = normal(step, 2, workers, 5, 3, 2, 2)
        mean, memory, shared, _ = drive(compressor, {"w": g}, memory, shared)
        for m in range(2):
            expected = numpy[m].average({w: g[m, w].numpy().reshape(5, 12) for w in range(workers)})
            np.testing.assert_allclose(mean["w"][m].numpy().reshape(5, 12), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [2, 30])
def test_full_rank_is_plain_averaging(rank: int) -> None:
    """Exact where the mean has no more than ``rank`` directions; to the bit where rank saves nothing, so is not used.

    Broken on purpose: a Q that is not redrawn per column (two equal columns) loses a direction and fails.
    """
    compressor = PowerSGD(rank)
    memory, shared = start(compressor, {"w": (6, 8), "b": (8,)}, 2, 3)
    left, right = normal(0, 2, 3, 6, 2), normal(1, 2, 1, 2, 8)  # the workers share two right directions
    grads = {"w": left @ right, "b": normal(2, 2, 3, 8)}
    mean, memory, _, _ = drive(compressor, grads, memory, shared)
    plain, _, _, _ = drive(Dense(), grads, {}, {})
    assert torch.equal(mean["b"], plain["b"])
    if rank == 30:
        assert torch.equal(mean["w"], plain["w"])
    else:
        torch.testing.assert_close(mean["w"], plain["w"], rtol=0, atol=1e-12)


def test_repeated_gradient_is_delivered_in_full() -> None:
    """Error feedback: with the same gradient every step, the average of what is applied tends to it as 1 / steps.

    Broken on purpose: a residual that stays zero leaves the same part out for ever.
    """
    compressor = PowerSGD(1)
    memory, shared = start(compressor, {"w": (6, 6)}, 1, 2)
    g = normal(3, 1, 2, 6, 6)
    total, errors = torch.zeros(1, 6, 6, dtype=torch.float64), {}
    for step in range(1, 401):
        mean, memory, shared, _ = drive(compressor, {"w": g}, memory, shared)
        total += mean["w"]
        errors[step] = float((total / step - g.mean(1)).norm() / g.mean(1).norm())
    assert errors[400] < 0.03 and errors[400] < errors[40] / 5


def test_zero_gradients_give_no_nan_and_are_survived() -> None:
    """Zero gradients make Q zero; the next real gradient must still get through.

    Broken on purpose: dividing by the column's norm gives NaN; putting zero in its place leaves Q zero for ever.
    """
    compressor = PowerSGD(2)
    memory, shared = start(compressor, {"w": (6, 7)}, 1, 2)
    for _ in range(2):
        mean, memory, shared, _ = drive(compressor, {"w": torch.zeros(1, 2, 6, 7, dtype=torch.float64)}, memory, shared)
        assert not mean["w"].any() and not memory["residual"]["w"].any()
    assert not shared["q"]["w"].any()
    g = normal(4, 1, 2, 6, 7)
    for _ in range(2):
        mean, memory, shared, _ = drive(compressor, {"w": g}, memory, shared)
    assert mean["w"].norm() > 0.5 * g.mean(1).norm()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e300])
def test_a_poisoned_member_touches_no_other_bit(poison: float) -> None:
    """Broken on purpose: one QR over the members side by side spreads the NaN."""
    results = []
    for value in (1.0, poison):
        compressor = PowerSGD(2)
        memory, shared = start(compressor, {"w": (6, 7)}, 3, 2)
        for step in range(3):
            g = normal(step, 3, 2, 6, 7)
            g[1] *= value
            mean, memory, shared, _ = drive(compressor, {"w": g}, memory, shared)
        results.append((mean["w"], memory["residual"]["w"], shared["q"]["w"]))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean[[0, 2]], poisoned[[0, 2]])


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-150, 1.0, 1e150])
def test_orthonormal_is_a_basis_at_every_scale(scale: float) -> None:
    """Also for dependent columns; Q^T Q = 1 to 1e-12 and the span holds what went in."""
    p = scale * normal(5, 2, 6, 3)
    p[..., 2] = 2.0 * p[..., 1]
    q = orthonormal(p)
    torch.testing.assert_close(q.mT @ q, torch.eye(3, dtype=q.dtype).expand(2, 3, 3), rtol=0, atol=1e-12)
    torch.testing.assert_close(q @ (q.mT @ p), p, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 2), (1, 4)])
def test_resize_keeps_what_is_known(old: int, new: int) -> None:
    """Columns both ranks have stay to the bit; new ones are those a start at the larger rank would have drawn.

    Broken on purpose: drawing a fresh Q at every resize fails; so does dropping the residual.
    """
    shapes = {"w": (9, 11), "b": (3,)}
    compressor = PowerSGD(old)
    memory, shared = start(compressor, shapes, 2, 2)
    grads = {"w": normal(6, 2, 2, 9, 11), "b": normal(7, 2, 2, 3)}
    _, memory, shared, _ = drive(compressor, grads, memory, shared)
    before = {"q": shared["q"]["w"].clone(), "residual": memory["residual"]["w"].clone()}
    resized = compressor.resize(shared, new, STREAMS)
    _, from_start = start(PowerSGD(new), shapes, 2, 2)
    kept = min(old, new)
    assert resized["q"]["w"].shape == (2, 11, new)
    assert torch.equal(resized["q"]["w"][..., :kept], before["q"][..., :kept])
    assert torch.equal(resized["q"]["w"][..., kept:], from_start["q"]["w"][..., kept:])
    mean, after, _, _ = drive(compressor, grads, memory, resized)
    owed = mean["w"].unsqueeze(1) + after["residual"]["w"] - grads["w"]
    torch.testing.assert_close(owed, before["residual"])


def test_the_first_q_is_the_replicates_own() -> None:
    """The same replicate draws the same Q wherever it sits and at any rank; another replicate or tensor another one."""
    params: dict[str, Any] = {k: torch.zeros(2, 6, 7, dtype=torch.float64) for k in ("u", "w")}
    _, a = PowerSGD(2).start(params, 1, STREAMS, np.array([4, 9]))
    _, b = PowerSGD(1).start(params, 3, STREAMS, np.array([9, 5]))
    assert torch.equal(a["q"]["w"][1, :, :1], b["q"]["w"][0])
    assert not torch.equal(a["q"]["w"][0], a["q"]["w"][1])
    assert not torch.equal(a["q"]["w"], a["q"]["u"])


@pytest.mark.parametrize("rank", [1, 2])
def test_bytes_on_the_wire(rank: int) -> None:
    """64-16-10 in float32: rank * (n + m) numbers per matrix that gains by it, the rest whole, per worker and step.

    Broken on purpose: counting the dense gradient fails.
    """
    cell = digits(compressor=PowerSgd(rank=rank), optimizer=Sgd(lr=0.1))
    engine = finish(Lockstep(plan_of(cell, 3), build_parts(cell, "vmap")))
    numbers = rank * (16 + 64) + 16 + rank * (10 + 16) + 10
    assert engine.state.clock["bytes_sent"].tolist() == [3 * 2 * 4 * numbers] * 2
