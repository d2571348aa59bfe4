"""A real asynchronous parameter server: workers are processes, staleness is whatever happens.

The optimizer lives on the server. A worker receives (version, parameters), computes the gradient of its next batch
there, sends it back with the version, and waits for newer parameters. The server applies gradients in the order in
which they arrive, one update each, and logs who contributed with which version. That log is a timeline: replayed by
the virtual engine it gives the same weights.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import numpy as np
import torch

from ..core.errors import StudyError
from ..core.protocols import Grads, Tick
from ..core.state import State
from ..core.tree import Tree, tree_map
from .driver import Engine, Progress, Round
from .parts import Parts
from .program import BlockPlan
from .transport import Hub, Link, LocalProcesses

Build = Callable[[], Parts]  # picklable: every process calls it for itself
_READY = (0, None, None)  # a worker's message is (version read, gradients …, error text); this one: "I have started"


@final
@dataclass
class Replica(Engine):
    """The worker half on its own: draws this worker's batches and keeps its buffers, as the driver does for all."""

    worker: int = 0

    def round(self) -> Round:
        return Round(np.array([[self.worker]]), np.array([[self.step]]), np.zeros(1))

    def view(self, versions: np.ndarray) -> Tree:
        return self.state.params

    def gradients(self, params: Tree) -> Grads:
        """One work step at ``params``, each ``[1, …]``."""
        tree_map(lambda mine, new: mine.copy_(new), self.state.params, params)
        now = self.round()
        found = self._work(now, 0)
        self._put_buffers(now, [found.buffers])
        self._advance(now)
        self.step += 1
        return found


def serve(link: Link, worker: int, build: Build, plan: BlockPlan) -> None:
    """What a worker process runs, one thread, until the server is gone. A failure is sent to the server as text."""
    torch.set_num_threads(1)
    try:
        replica = Replica(plan, build(), worker=worker)
        link.send(_READY)
        while True:
            version, params = link.receive()
            found = replica.gradients(_to_tensors(params, replica.state.params))
            link.send((version, _to_arrays(vars(found)), None))
    except StudyError:
        raise
    except Exception as error:  # a process has nobody above it to raise to
        link.send((-1, None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        link.receive()  # stay until the server hangs up: it takes an early end for a crash


@final
@dataclass
class ParameterServer(Engine):
    """Runs one run on ``parts.workers`` processes until ``plan.stop`` updates are applied.

    Gradients under way at the end are dropped. ``build`` makes the parts anew in each process. ``log`` lists one Tick
    per update, with seconds since all workers were ready. A lost or failed worker ends the run with a StudyError.
    Conditions it cannot meet are listed in :mod:`descentlab.engine.support`; it cannot be resumed.
    """

    build: Build = field(kw_only=True)
    hub: Hub = field(default_factory=LocalProcesses, kw_only=True)
    log: list[Tick] = field(default_factory=list, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.plan.runs) != 1 or self.plan.runs[0].planned or self.step:
            raise ValueError("the parameter server takes one run without a planned perturbation, from its first step")
        if self.state.worker["memory"] or self.state.shared:
            raise ValueError("the parameter server sends gradients whole")
        self._arrived: Grads | None = None
        self._started = 0.0

    def run(self) -> Iterator[Progress]:
        try:
            self.hub.open(self.parts.workers, self._serve, self._modules())
            for _ in range(self.parts.workers):  # all start together, or the first would be alone for a while
                self._receive()
            self._started = time.monotonic()
            for w in range(self.parts.workers):
                self._send_params(w, 0)
            yield from super().run()
        finally:
            self.hub.close()

    def _modules(self) -> tuple[str, ...]:
        """What every worker imports; the first optimizer of a process imports ``torch._dynamo``, which is slow."""
        return "torch", "torch._dynamo", __name__, getattr(self.build, "func", self.build).__module__

    def _serve(self, worker: int) -> Callable[[Link], None]:
        return partial(serve, worker=worker, build=self.build, plan=self.plan)

    def _send_params(self, worker: int, version: int) -> None:
        self.hub.send(worker, (version, _to_arrays(self.state.params)))

    def round(self) -> Round:
        """Waits for the next gradient."""
        worker, version, found = self._receive()
        like = {"grads": self.state.params, "buffers": self.state.buffers, "loss": None, "accuracy": None}
        self._arrived = Grads(**_to_tensors(found, like))
        self.log.append(Tick((worker,), (version,), time.monotonic() - self._started))
        return Round(np.array([[worker]]), np.array([[version]]), np.array([self.log[-1].time_s]))

    def _receive(self) -> tuple[int, int, Any]:
        """(worker, version read, gradients and so on as arrays) of the next message."""
        worker, (version, found, error) = self.hub.receive()
        if error is not None:
            raise StudyError(f"worker {worker} failed at update {self.step}: {error}")
        return worker, version, found

    def _work(self, now: Round, k: int) -> Grads:
        assert self._arrived is not None
        return self._arrived

    def view(self, versions: np.ndarray) -> Tree:
        return self.state.params

    def after_update(self) -> None:
        if self.step + 1 < self.plan.stop:
            self._send_params(self.log[-1].workers[0], self.step + 1)


def train(plan: BlockPlan, build: Build, *, timeout_s: float = 120.0) -> tuple[State, list[Tick]]:
    """Run to the end: (final state, log of updates)."""
    server = ParameterServer(plan, build(), build=build, hub=LocalProcesses(timeout_s))
    for _ in server.run():
        pass
    return server.state, server.log


def _to_arrays(tree: Any) -> Any:
    """Tensors as numpy arrays, exact; a pickled tensor would travel through shared memory instead."""
    if isinstance(tree, dict):
        return {k: _to_arrays(v) for k, v in tree.items()}
    return tree.detach().cpu().numpy()


def _to_tensors(tree: Any, like: Any) -> Any:
    """The inverse, on the devices of ``like`` (None: the CPU)."""
    if isinstance(tree, dict):
        return {k: _to_tensors(v, like[k]) for k, v in tree.items()}
    return torch.from_numpy(tree).to("cpu" if like is None else like.device)
