"""How a parameter server and its workers exchange messages, whatever carries them.

A worker answers one message at a time and says READY first. What carries the messages starts workers, tells a lost one
from a slow one, and knows nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final


class Answers(Protocol):
    """A worker. Picklable before its first call, which builds what it needs."""

    def answer(self, message: memoryview | None, reply: memoryview) -> int:
        """Write the answer to ``message`` into ``reply``; its size in bytes. None: the first call."""
        ...


class Arrival(NamedTuple):
    """Something a worker sent; or None and why it is ``lost``, after which it is no more until started again."""

    worker: int
    message: memoryview | None
    lost: str = ""


@final
@dataclass(frozen=True)
class Crewing:
    """What a hub needs to start workers: how many, what each is, the largest message in either direction in bytes, and
    the ``modules`` they will import."""

    workers: int
    make: Callable[[int], Answers]
    task_bytes: int
    reply_bytes: int
    modules: Sequence[str] = ()


class Hub(Protocol):
    """The server's end. No call waits longer than it is told; only ``open`` raises."""

    def open(self, crewing: Crewing) -> None:
        """Get ready to start workers. Raises UserError for settings that this machine cannot meet."""
        ...

    def start(self, worker: int) -> None:
        """Start ``worker`` (again); its READY arrives when it is up."""
        ...

    def outbox(self, worker: int) -> memoryview:
        """Where the next message to ``worker`` is written; not touched between ``send`` and its answer."""
        ...

    def send(self, worker: int, size: int) -> None:
        """Send the first ``size`` bytes of the outbox. A worker that is lost is reported by ``receive``."""
        ...

    def receive(self, timeout_s: float) -> Arrival | None:
        """Whoever came first, None if nobody did; its message is good until the next ``send`` to that worker."""
        ...

    def stop(self, worker: int) -> None:
        """End ``worker`` at once, even one that does not react; nothing of it arrives any more."""
        ...

    def close(self) -> None:
        """End every worker; nothing is left behind. May be called twice."""
        ...
