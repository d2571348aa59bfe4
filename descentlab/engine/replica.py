"""The worker half of a parameter server: what a worker process computes, whatever carries its messages."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch

from ..core.protocols import Grads
from ..core.tree import Tree, leaves
from .driver import Engine, Round
from .parts import Parts
from .program import BlockPlan
from .wire import FAILED, GARBLED, GRADIENT, READY, Corrupted, Header, Layout, Views, opened, seal, seal_text

Build = Callable[[], Parts]  # picklable: every process calls it for itself


@final
@dataclass
class Replica(Engine):
    """Computes one gradient at a time, of any batch of ``worker``, and remembers nothing in between.

    What a worker carries from one gradient to the next (BatchNorm statistics, the position in its data) travels with
    each task, so that another process can take its place at any time.
    """

    worker: int = 0

    def round(self) -> Round:
        return Round(np.array([[self.worker]]), np.array([[self.step]]), np.zeros(1))

    def view(self, versions: np.ndarray) -> Tree:
        return self.state.params

    def gradient(self, task: Header, given: Tree) -> Grads:
        """At the weights ``given["params"]`` and the statistics ``given["buffers"]``, each ``[1, …]``."""
        torch._foreach_copy_(list(self.state.params.values()), list(given["params"].values()))
        held = self.state.worker.get("buffers")
        for name, value in given["buffers"].items():
            (self.state.buffers[name] if held is None else held[name][:, self.worker]).copy_(value)
        self.state.worker["cursor"][:, self.worker] = task.batch
        return self._work(self.round(), 0)


def task_layout(engine: Engine) -> Layout:
    """What a task holds: the weights and one worker's buffers."""
    return Layout({"params": engine.state.params, "buffers": engine.state.buffers})


def reply_layout(engine: Engine) -> Layout:
    """What an answer holds: the fields of :class:`~descentlab.core.protocols.Grads`."""
    one = torch.zeros(1, dtype=next(iter(engine.state.params.values())).dtype)
    return Layout({"grads": engine.state.params, "buffers": engine.state.buffers, "loss": one, "accuracy": one})


@final
@dataclass
class Worker:
    """Answers tasks with gradients; see :class:`~descentlab.engine.transport.Answers`. One intra-op thread."""

    worker: int
    build: Build
    plan: BlockPlan
    _replica: Replica | None = field(default=None, init=False)

    def answer(self, message: memoryview | None, reply: memoryview) -> int:
        """A failure is answered with its text: a process has nobody above it to raise to."""
        try:
            if message is None:
                self._prepare()
                return seal(reply, Header(READY))
            return self._gradient(message, reply)
        except Corrupted:
            return seal(reply, Header(GARBLED))
        except Exception as error:
            return seal_text(reply, FAILED, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")

    def _prepare(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        self._replica = Replica(self.plan, self.build(), worker=self.worker)
        self._task, self._reply = task_layout(self._replica), reply_layout(self._replica)
        self._views: tuple[Views, Views] | None = None
        self._where: Any = None  # the memory behind the first of them

    def _gradient(self, message: memoryview, reply: memoryview) -> int:
        assert self._replica is not None
        task = opened(message)
        if task.size != self._task.size:
            raise Corrupted(f"{task.size} bytes instead of {self._task.size}")
        if self._views is None or self._where is not message.obj:  # messages mostly lie where the last one did
            self._views, self._where = (self._task.views(message), self._reply.views(reply)), message.obj
        given, answer = self._views
        found = self._replica.gradient(task, given.tree)
        torch._foreach_copy_(answer.all, list(leaves(vars(found))))
        if task.seconds > 0:
            time.sleep(task.seconds)
        return seal(reply, Header(GRADIENT, task.number, task.version, task.batch, size=self._reply.size))
