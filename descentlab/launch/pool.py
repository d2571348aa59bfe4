"""A pool of worker processes on this machine, one intra-op thread each.

Workers are started before planning, so that they import torch while the parent plans. A worker that dies fails its
block only; the next block gets a new worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import StudyError, UserError
from ..core.signals import warnings_held_back

POLL_S = 0.1
DIED = "the worker process ended by"
KEPT = "the last good state is kept"  # said by everything that is no run's fault and can be resumed
KNOBS = "lower processes, members_per_block or batch_size and run again"  # what needs memory
GRACE_S = 60.0  # a worker that was told to stop finishes its update and writes a checkpoint


@dataclass
class Outcome:
    """How one block ended: done | interrupted | failed."""

    key: str
    state: str
    message: str = ""


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[str]
    block: str | None = None
    lines: list[str] = field(default_factory=list)

    def order(self, **message: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its death is noticed by the reader thread


class Pool:
    """``size`` warm workers; use as a context manager, so that none outlives it."""

    def __init__(self, size: int) -> None:
        self._events: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self._workers = [self._start() for _ in range(size)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            worker.order(stop=True)
        for worker in self._workers:
            try:
                worker.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            _close(worker)

    def _start(self) -> _Worker:
        libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
        one_thread = dict.fromkeys(libraries, "1")
        paths = os.pathsep.join(p for p in sys.path if p)
        with warnings_held_back():
            process = subprocess.Popen(
                [sys.executable, "-m", "descentlab.launch.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **one_thread, "PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C reaches the parent only, which asks the workers to stop
            )
        worker = _Worker(process)
        threading.Thread(target=self._read, args=(worker,), daemon=True).start()
        return worker

    def _read(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        try:
            for line in worker.process.stdout:
                self._events.put((worker, json.loads(line)))
        except ValueError:
            pass  # closed while reading
        self._events.put((worker, None))

    def prepare(self, study: str, out: Path, overwrite: bool) -> dict[str, Any]:
        """Have the workers plan the study (YAML text), so that this process needs no torch; see ``prepare.prepare``.

        The first one does, while the others load the data, which they need next. Raises what planning raised.
        """
        for i, worker in enumerate(self._workers):
            worker.order(study=study, out=str(out.resolve()), overwrite=overwrite, warm_up=i > 0)
        while True:
            _, event = self._events.get()
            if event is None:
                raise StudyError("a worker process ended while planning; its messages are above")
            if event.get("outcome") == "refused":
                raise UserError(*event["message"][:3], hint=event["message"][3])
            if event.get("outcome") == "failed":
                raise StudyError(event["message"])
            if event.get("outcome") == "crashed":
                print(event["message"], end="", file=sys.stderr)
                raise StudyError("planning ended with the error above, before anything was written")
            if event.get("outcome") == "prepared":
                return event["message"]

    def run(
        self, path: Path, keys: Sequence[str], *, tick: Callable[[int], None], stop: Callable[[], bool]
    ) -> list[Outcome]:
        """Run the blocks, largest first is the caller's choice; ``tick`` gets member-steps as they are reported."""
        waiting, outcomes = list(keys), []
        told = False
        for worker in self._workers:
            self._give(worker, path, waiting)
        while any(worker.block for worker in self._workers):
            if stop() and not told:
                told, waiting = True, []
                for worker in self._workers:
                    worker.order(stop=True)
            try:
                worker, event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if event is None:
                outcomes += self._buried(worker)
                if waiting and not told:
                    fresh = self._start()
                    self._workers.append(fresh)
                    self._give(fresh, path, waiting)
            elif "steps" in event:
                tick(event["steps"])
            elif "outcome" in event and event["block"] == worker.block is not None:
                outcomes.append(Outcome(worker.block, event["outcome"], event["message"]))
                worker.block = None
                self._give(worker, path, waiting)
        return outcomes

    def _give(self, worker: _Worker, path: Path, waiting: list[str]) -> None:
        if waiting:
            worker.block = waiting.pop(0)
            worker.order(block=worker.block, path=str(path))

    def _buried(self, worker: _Worker) -> list[Outcome]:
        code = worker.process.wait()
        self._workers.remove(worker)
        _close(worker)
        if worker.block is None:
            return []
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            how += f"; if the system was out of memory, {KNOBS}"
        return [Outcome(worker.block, "failed", f"{DIED} {how}")]


def _close(worker: _Worker) -> None:
    for pipe in (worker.process.stdin, worker.process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # an order that the worker did not live to read
                pipe.close()
