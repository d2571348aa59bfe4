"""Workers of a parameter server that do what workers should not, once each, and note what they were told."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from descentlab.engine.replica import Worker
from descentlab.engine.wire import GRADIENT, HEADER_BYTES, Header, opened, seal


@dataclass
class Saboteur:
    """A worker with mischief: (kind, number of the task from which it is due). Who gets there first does it, once.

    Kinds: ``kill`` and ``stop`` (signals to itself), ``nan``, ``flip`` (a bit of the answer), ``garbage`` (an answer of
    noise), ``stale`` (an answer to another task), ``late`` (ready after a second), ``always_nan``.
    """

    worker: int
    build: Any
    plan: Any
    folder: str
    mischief: tuple[tuple[str, int], ...] = ()
    inner: Worker = field(init=False)

    def __post_init__(self) -> None:
        self.inner = Worker(self.worker, self.build, self.plan)

    def answer(self, message: memoryview | None, reply: memoryview) -> int:
        """As :class:`Worker`, or not."""
        if message is None:
            self._note("pids", os.getpid())
            if self._due("late", 0):
                time.sleep(1.0)
            size = self.inner.answer(None, reply)
            self._note("threads", torch.get_num_threads())
            return size
        task = opened(message)
        if task.applied >= 0:
            self._note("acknowledged", task.applied)
        for kind, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
            if self._due(kind, task.number):
                os.kill(os.getpid(), number)
        size = self.inner.answer(message, reply)
        if self._due("nan", task.number) or any(kind == "always_nan" for kind, _ in self.mischief):
            np.frombuffer(reply, np.float64, count=1, offset=HEADER_BYTES)[0] = np.nan
            seal(reply, Header(GRADIENT, task.number, task.version, task.batch, size=size - HEADER_BYTES))
        if self._due("stale", task.number):
            seal(reply, Header(GRADIENT, task.number - 1, task.version, task.batch, size=size - HEADER_BYTES))
        if self._due("flip", task.number):
            reply[size // 2] ^= 4
        if self._due("garbage", task.number):
            reply[:size] = os.urandom(size)
        return size

    def _note(self, name: str, value: int) -> None:
        with (Path(self.folder) / name).open("a", buffering=1) as notes:
            notes.write(f"{value}\n")

    def _due(self, kind: str, number: int) -> bool:
        for place, (what, begin) in enumerate(self.mischief):
            if what == kind and number >= begin:
                try:
                    os.close(os.open(f"{self.folder}/done-{place}-{kind}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                return True
        return False


def noted(folder: Path, name: str) -> list[int]:
    """What the workers have noted so far; nothing where they had nothing to note."""
    return [int(line) for line in (folder / name).read_text().split()] if (folder / name).is_file() else []
