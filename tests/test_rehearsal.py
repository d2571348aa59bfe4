"""Real sizes: a BatchNorm ResNet-18 and a nanoGPT of 10,775,040 parameters take three steps in every engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small import builder, digits, finish, plan_of

from descentlab.cluster.timeline import BarrierTimeline, RecordedTimeline
from descentlab.core.specs import Option
from descentlab.core.state import State
from descentlab.core.tree import Tree, leaves
from descentlab.engine.driver import Engine
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.process import ParameterServer
from descentlab.engine.program import Route
from descentlab.engine.virtual import Virtual
from descentlab.optim.specs import Sgd
from descentlab.studies.crossed.spec import CrossedSpec
from descentlab.workloads.base import Data
from descentlab.workloads.specs import DATASETS, NanoGpt, ResNet18

STEPS, WORKERS = 3, 2
SYMBOLS, BLOCK = 65, 256  # as many characters as all of Shakespeare has, and the window of the real model


def text(n: int = 16) -> Data:
    """Windows of a text in which every character follows from the one before; called by name in each process."""
    ids = torch.from_numpy((7 * np.arange(3 * n + BLOCK) ** 2) % SYMBOLS)
    x, y = ids[:-1].unfold(0, BLOCK, 1), ids[1:].unfold(0, BLOCK, 1)
    parts = [p for i in range(3) for p in (x[i * n : (i + 1) * n], y[i * n : (i + 1) * n])]
    parts[4:] = [p[:2] for p in parts[4:]]
    return Data("text", *parts, classes=SYMBOLS, source="generated", licence="none needed")


def resnet() -> CrossedSpec:
    return digits(model=ResNet18(), batch_size=8, optimizer=Sgd(lr=0.01, momentum=0.9), workers=WORKERS)


def nanogpt() -> CrossedSpec:
    dataset: Option = DATASETS.parse("test_rehearsal:text")
    model = NanoGpt(width=384, heads=6, layers=6, hidden=0)
    return digits(dataset=dataset, model=model, batch_size=1, optimizer=Sgd(lr=0.01, momentum=0.9), workers=WORKERS)


MODELS: dict[str, tuple[Callable[[], CrossedSpec], Route, int]] = {
    "resnet18": (resnet, "member", 11_172_810),  # one grey channel instead of three: 2 x 9 x 64 weights fewer
    "nanogpt": (nanogpt, "vmap", 10_775_040),
}


@pytest.fixture(params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[CrossedSpec, Route, int]:
    make, route, count = MODELS[request.param]
    return make(), route, count


def end(engine: Engine) -> tuple[State, dict[str, list[Any]]]:
    """The state after the last step, and the measured columns."""
    finish(engine)
    return engine.state, engine.recorder.flush()[0]


def assert_sound(state: State, columns: dict[str, list[Any]], start: Tree, count: int) -> None:
    """The right number of finite weights, all of which moved; finite losses."""
    assert sum(p[0].numel() for p in state.params.values()) == count
    assert all(bool(torch.isfinite(t).all()) for t in leaves(state.params))
    assert not [name for name, p in state.params.items() if torch.equal(p[0], start[name])]
    assert len(columns["train_loss"]) == STEPS and np.isfinite([*columns["train_loss"], columns["test_loss"][-1]]).all()
    assert list(columns["nonfinite_params"]) == [0] * STEPS


def test_lockstep_equals_virtual_with_a_barrier_to_the_bit(case: tuple[CrossedSpec, Route, int]) -> None:
    """Weights, buffers and every worker's own buffers; broken by a worker that reads another version, or by buffers
    that stay with the server (each worker's must have moved, and the server's be their average)."""
    cell, route, count = case
    build, plan = builder(cell, route), plan_of(cell, STEPS, route=route, replicates=[0])
    lockstep, columns = end(Lockstep(plan, build()))
    virtual, _ = end(Virtual(plan, build(), timeline=BarrierTimeline(0.1, 0.05)))
    start, buffers = build().fresh(0)
    assert_sound(lockstep, columns, start, count)
    for part in ("params", "buffers"):
        for name, t in lockstep.server[part].items():
            assert torch.equal(t, virtual.server[part][name]), name
    for name, held in lockstep.worker["buffers"].items():
        assert torch.equal(held, virtual.worker["buffers"][name])
        if name.endswith(("running_mean", "running_var")):
            first, second = held[0]
            assert not torch.equal(first, buffers[name]) and not torch.equal(first, second)
            torch.testing.assert_close(lockstep.buffers[name][0], (first + second) / 2)


def test_processes_leave_a_log_that_virtual_replays(case: tuple[CrossedSpec, Route, int]) -> None:
    """Two real processes; weights and BatchNorm buffers equal those of the virtual clock under the recorded log.

    Broken by buffers that do not travel back with the gradients: the server's then stay as they were at the start.
    """
    cell, route, count = case
    build, plan = builder(cell, route), plan_of(cell, STEPS, route=route, replicates=[0])
    server = ParameterServer(plan, build(), build=build)
    state, columns = end(server)
    assert_sound(state, columns, build().fresh(0)[0], count)
    assert len(server.log) == STEPS
    replayed, _ = end(Virtual(plan, build(), timeline=RecordedTimeline(server.log)))
    for part in ("params", "buffers"):
        for name, t in state.server[part].items():
            torch.testing.assert_close(t, replayed.server[part][name], rtol=1e-4, atol=1e-6)
