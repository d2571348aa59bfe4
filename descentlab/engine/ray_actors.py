"""Workers as actors of a Ray cluster (extra ``ray``), on one host or several; see :mod:`descentlab.engine.transport`.

Ray starts and places the actors, carries the messages through its object store and says when one has died. An actor is
never restarted by Ray: the server does that, so that it knows which task is void.
"""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from typing import Any, final

from ..core.errors import UserError
from .transport import Answers, Arrival, Crewing


def check_installed(key: str) -> None:
    """Raises UserError, naming the setting ``key``, where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(key, "ray", "local, or an environment with Ray: pip install 'descentlab[ray]'")


@final
class _Actor:
    """What runs in an actor's process."""

    def __init__(self, worker: Answers, reply_bytes: int) -> None:
        self.worker, self.reply = worker, memoryview(bytearray(reply_bytes))

    def answer(self, message: bytes | None) -> bytes:
        """One message for another."""
        given = None if message is None else memoryview(bytearray(message))  # writable, as tensors want it
        return bytes(self.reply[: self.worker.answer(given, self.reply)])


@final
class RayActors:
    """See :class:`~descentlab.engine.transport.Hub`. ``address``: of a running cluster; None: the one that the
    environment names (``RAY_ADDRESS``), or one of this machine's own, ended with the hub.
    """

    def __init__(self, address: str | None = None, ray: Any = None) -> None:
        self.address, self._ray = address, ray
        self._actors: dict[int, Any] = {}
        self._asked: dict[Any, int] = {}  # reference to an answer -> the worker that owes it
        self._outboxes: list[memoryview] = []
        self._lost: deque[Arrival] = deque()
        self._own = False

    def open(self, crewing: Crewing) -> None:
        """See :class:`~descentlab.engine.transport.Hub`."""
        if self._ray is None:
            check_installed("engine.transport")
            self._ray = importlib.import_module("ray")
        self._crewing = crewing
        if not self._ray.is_initialized():
            quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
            own = {} if self.address else {"num_cpus": crewing.workers + 1}
            try:
                self._ray.init(address=self.address, **own, **quiet)
            except (ConnectionError, ValueError):  # the environment names a running cluster, which has its own size
                self._ray.init(address=self.address or "auto", log_to_driver=False, logging_level="ERROR")
            self._own = True
        self._outboxes = [memoryview(bytearray(crewing.task_bytes)) for _ in range(crewing.workers)]

    def start(self, worker: int) -> None:
        """See :class:`~descentlab.engine.transport.Hub`."""
        remote = self._ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(_Actor)
        self._actors[worker] = remote.remote(self._crewing.make(worker), self._crewing.reply_bytes)
        self._ask(worker, None)

    def _ask(self, worker: int, message: bytes | None) -> None:
        self._asked[self._actors[worker].answer.remote(message)] = worker

    def outbox(self, worker: int) -> memoryview:
        """See :class:`~descentlab.engine.transport.Hub`."""
        return self._outboxes[worker]

    def send(self, worker: int, size: int) -> None:
        """See :class:`~descentlab.engine.transport.Hub`."""
        if worker in self._actors:
            self._ask(worker, bytes(self._outboxes[worker][:size]))

    def receive(self, timeout_s: float) -> Arrival | None:
        """See :class:`~descentlab.engine.transport.Hub`."""
        if self._lost:
            return self._lost.popleft()
        if not self._asked:
            time.sleep(timeout_s)
            return None
        ready, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=timeout_s)
        if not ready:
            return None
        worker = self._asked.pop(ready[0])
        try:
            return Arrival(worker, memoryview(bytearray(self._ray.get(ready[0]))))
        except self._ray.exceptions.RayError as error:
            self.stop(worker)
            return Arrival(worker, None, f"its actor ended: {str(error).splitlines()[0]}")

    def stop(self, worker: int) -> None:
        """See :class:`~descentlab.engine.transport.Hub`."""
        self._asked = {ref: w for ref, w in self._asked.items() if w != worker}
        actor = self._actors.pop(worker, None)
        if actor is not None:
            self._ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """See :class:`~descentlab.engine.transport.Hub`."""
        for worker in list(self._actors):
            self.stop(worker)
        if self._own:
            self._ray.shutdown()
            self._own = False
