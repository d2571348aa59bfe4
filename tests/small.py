"""Small cells, their parts, and the numbers of the quadratic as numpy arrays; shared by the tests of the engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from descentlab.core.protocols import Planned
from descentlab.engine.driver import Engine
from descentlab.engine.parts import Parts
from descentlab.engine.program import BlockPlan, Route, RunPlan
from descentlab.launch.build import build_parts
from descentlab.optim.specs import Sgd
from descentlab.studies.crossed.spec import CrossedSpec
from descentlab.workloads.specs import Digits, Mlp, Quadratic, QuadraticModel


def quadratic(**settings: Any) -> CrossedSpec:
    """Theta [4, 6], float64, two workers, batches of 8 out of 32."""
    base = {"dataset": Quadratic(n=32), "model": QuadraticModel(), "optimizer": Sgd(lr=0.1), "dtype": "float64"}
    return CrossedSpec(**{"batch_size": 8, **base, **settings})


def digits(**settings: Any) -> CrossedSpec:
    """A 64-16-10 network on real digits, two workers."""
    base = {"dataset": Digits(), "model": Mlp(pool=0, hidden=[16]), "optimizer": Sgd(lr=0.1, momentum=0.9)}
    return CrossedSpec(**{"batch_size": 16, **base, **settings})


def plan_of(cell: CrossedSpec, steps: int, *, route: Route = "vmap", replicates: Sequence[int] = (0, 1)) -> BlockPlan:
    """One undisturbed run per replicate."""
    runs = tuple(RunPlan(f"r{r}", r, steps, cell.optimizer.lr) for r in replicates)
    return BlockPlan("k", 0, route, runs)


def builder(cell: CrossedSpec, route: Route = "vmap") -> Callable[[], Parts]:
    """Picklable, for worker processes."""
    return partial(build_parts, cell, route)


def plan_fault(parts: Parts, replicate: int) -> Planned:
    assert parts.perturbation is not None
    return parts.perturbation.plan(0, parts.operations, parts.streams, replicate=replicate, steps_per_epoch=4)


def finish(engine: Engine, until: int | None = None) -> Engine:
    """Run to the end, or until ``until`` updates are made."""
    for progress in engine.run():
        if progress.step == until:
            break
    return engine


def numbers(parts: Parts, replicate: int) -> tuple[np.ndarray, np.ndarray, Callable[[int, int], np.ndarray]]:
    """(Theta at the start, A, targets of worker w's i-th batch) of the quadratic."""
    x, y = parts.train
    one = np.array([replicate])

    def batch(worker: int, i: int) -> np.ndarray:
        return y.numpy()[parts.sampler.indices(one, np.array([worker]), np.array([i]))[0]]

    return parts.fresh(replicate)[0]["theta"].numpy().copy(), x[0].numpy(), batch
