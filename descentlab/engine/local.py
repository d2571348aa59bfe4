"""Worker processes on this machine, over ``multiprocessing`` connections on TCP; large messages in shared memory."""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import multiprocessing
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing import BufferTooShort
from multiprocessing.connection import Connection
from typing import Any, Literal, final

from ..core.errors import UserError
from ..core.network import LOOPBACK
from ..core.signals import warnings_held_back
from .transport import Answers, Arrival, Crewing

SHARED_FROM = 2**16  # bytes of a message from which shared memory is the faster way
STRANGER_S = 2.0  # so long may who connects take to say who it is
_HELLO = struct.Struct("<qq32s")  # worker, which start of it, proof that it knows the key
_TOKEN = struct.Struct("<q")  # size of a message that lies in shared memory
_PR_SET_PDEATHSIG = 1


@final
class SocketLink:
    """One end of a connection that carries messages into and out of fixed memory; every call ends after ``timeout_s``.

    ``shared``: both ends have the same memory, and only sizes travel.
    """

    def __init__(
        self, connection: Connection, inbox: memoryview, outbox: memoryview, *, shared: bool, timeout_s: float
    ) -> None:
        self.connection, self.inbox, self.outbox, self.shared = connection, inbox, outbox, shared
        limit_calls(connection, timeout_s)

    def send(self, size: int) -> None:
        """The first ``size`` bytes of the outbox; OSError when the other end is gone or does not read."""
        self.connection.send_bytes(_TOKEN.pack(size) if self.shared else self.outbox[:size])

    def receive(self) -> memoryview:
        """The next message, which is empty if it cannot be one; OSError or EOFError when the other end is gone."""
        if not self.shared:
            try:
                return self.inbox[: self.connection.recv_bytes_into(self.inbox)]
            except BufferTooShort:
                return self.inbox[:0]
        token = self.connection.recv_bytes()
        size = _TOKEN.unpack(token)[0] if len(token) == _TOKEN.size else -1
        return self.inbox[:size] if 0 <= size <= len(self.inbox) else self.inbox[:0]

    def close(self) -> None:
        self.connection.close()


def limit_calls(connection: Connection, timeout_s: float) -> None:
    """No call waits longer than ``timeout_s``; nothing waits for more to send."""
    limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as same:  # options belong to the connection itself
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


@dataclass
class _Seat:
    """One worker's place. ``starts``: how often it was started; only the last start may take the seat."""

    outbox: memoryview
    inbox: memoryview
    memory: tuple[Any, Any] | None  # the shared arrays behind both
    starts: int = 0
    process: Any = None
    link: SocketLink | None = None


@final
@dataclass
class LocalProcesses:
    """Worker processes of this machine; see :class:`~descentlab.engine.transport.Hub`.

    Workers come from a fork server that has loaded the modules once (no threads are forked); where there is none they
    are spawned. They prove by HMAC that they know a random key. They end when the server does: its connection closes,
    and on Linux a worker that cannot notice (stopped, in a loop) is killed with the fork server.
    """

    timeout_s: float = 60.0
    address: str = LOOPBACK
    port: int = 0
    memory: Literal["auto", "shared", "socket"] = "auto"
    seats: list[_Seat] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._arrived: deque[Arrival] = deque()
        self._strangers: dict[Connection, tuple[float, bytes]] = {}
        self._selector: selectors.BaseSelector | None = None
        self._listener: socket.socket | None = None

    def open(self, crewing: Crewing) -> None:
        """See :class:`~descentlab.engine.transport.Hub`."""
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if self._context.get_start_method() == "forkserver":
            self._context.set_forkserver_preload(list(crewing.modules))
        self._crewing, self._key = crewing, os.urandom(32)
        largest = max(crewing.task_bytes, crewing.reply_bytes)
        self._shared = self.memory == "shared" or (self.memory == "auto" and largest >= SHARED_FROM)
        try:
            self._listener = socket.create_server((self.address, self.port), backlog=max(8, crewing.workers))
        except OSError as error:
            expected = f"a port of {self.address} that is free ({error.strerror or error}); 0 takes any"
            raise UserError("engine.port", self.port, expected) from None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, ("listener", None))
        self.seats = [self._seat() for _ in range(crewing.workers)]

    def _seat(self) -> _Seat:
        sizes = self._crewing.task_bytes, self._crewing.reply_bytes
        if not self._shared:
            task, reply = (memoryview(bytearray(size)) for size in sizes)
            return _Seat(task, reply, None)
        memory = tuple(self._context.RawArray(ctypes.c_char, size) for size in sizes)  # unlinked: dies with its users
        task, reply = (memoryview(array).cast("B") for array in memory)
        return _Seat(task, reply, memory)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that were started and not stopped."""
        return [seat.process.pid for seat in self.seats if seat.process is not None]

    def start(self, worker: int) -> None:
        """See :class:`~descentlab.engine.transport.Hub`."""
        assert self._selector is not None and self._listener is not None
        seat = self.seats[worker]
        seat.starts += 1
        sizes = None if self._shared else (self._crewing.task_bytes, self._crewing.reply_bytes)
        who = (worker, seat.starts, self._key)
        arguments = (who, self._listener.getsockname(), seat.memory, sizes, self._crewing.make(worker))
        seat.process = self._context.Process(target=_main, args=arguments, daemon=True, name=f"worker {worker}")
        with warnings_held_back():
            seat.process.start()
        self._selector.register(seat.process.sentinel, selectors.EVENT_READ, ("process", worker))

    def outbox(self, worker: int) -> memoryview:
        """See :class:`~descentlab.engine.transport.Hub`."""
        return self.seats[worker].outbox

    def send(self, worker: int, size: int) -> None:
        """See :class:`~descentlab.engine.transport.Hub`."""
        link = self.seats[worker].link
        if link is None:
            return
        try:
            link.send(size)
        except OSError as error:
            self._lose(worker, self._reason(error))

    def receive(self, timeout_s: float) -> Arrival | None:
        """See :class:`~descentlab.engine.transport.Hub`; those that are ready together are served in turn."""
        assert self._selector is not None
        deadline = time.monotonic() + timeout_s
        while not self._arrived:
            self._drop_silent_strangers()
            left = max(0.0, deadline - time.monotonic())
            ready = [key.data for key, _ in self._selector.select(min(left, STRANGER_S) if self._strangers else left)]
            if not ready and time.monotonic() >= deadline:
                return None
            for kind, who in sorted(ready, key=lambda data: data[0]):  # listener, message, process, stranger
                getattr(self, f"_on_{kind}")(who)
        return self._arrived.popleft()

    def _on_listener(self, _: None) -> None:
        assert self._listener is not None and self._selector is not None
        with contextlib.suppress(OSError):
            connection = Connection(self._listener.accept()[0].detach())
            limit_calls(connection, STRANGER_S)
            nonce = os.urandom(32)
            connection.send_bytes(nonce)
            self._strangers[connection] = (time.monotonic() + STRANGER_S, nonce)
            self._selector.register(connection, selectors.EVENT_READ, ("stranger", connection))

    def _on_stranger(self, connection: Connection) -> None:
        assert self._selector is not None
        _, nonce = self._strangers.pop(connection)
        self._selector.unregister(connection)
        try:
            worker, start, proof = _HELLO.unpack(connection.recv_bytes(_HELLO.size))
        except (OSError, EOFError, struct.error):
            connection.close()
            return
        known = 0 <= worker < len(self.seats) and hmac.compare_digest(proof, _proof(self._key, nonce, worker, start))
        seat = self.seats[worker] if known else None
        if seat is None or seat.starts != start or seat.link is not None or seat.process is None:
            connection.close()
            return
        seat.link = SocketLink(connection, seat.inbox, seat.outbox, shared=self._shared, timeout_s=self.timeout_s)
        self._selector.register(connection, selectors.EVENT_READ, ("message", worker))

    def _drop_silent_strangers(self) -> None:
        assert self._selector is not None
        for connection, (until, _) in list(self._strangers.items()):
            if time.monotonic() >= until:
                del self._strangers[connection]
                self._selector.unregister(connection)
                connection.close()

    def _on_message(self, worker: int) -> None:
        link = self.seats[worker].link
        if link is None:  # lost while others of the same round were served
            return
        try:
            self._arrived.append(Arrival(worker, link.receive()))
        except (OSError, EOFError) as error:
            self._lose(worker, self._reason(error))

    def _on_process(self, worker: int) -> None:
        """A worker that ended; what it sent before comes first."""
        seat = self.seats[worker]
        if seat.process is None:
            return
        if seat.link is not None and seat.link.connection.poll():
            self._on_message(worker)
        else:
            self._lose(worker, "its process ended")

    def _reason(self, error: Exception) -> str:
        if isinstance(error, BlockingIOError):
            return f"no answer within {self.timeout_s:g} s"
        return "its connection was closed" if isinstance(error, EOFError | ConnectionError) else str(error)

    def _lose(self, worker: int, reason: str) -> None:
        process = self.seats[worker].process
        if process is not None and not reason.startswith("no answer"):
            process.join(1.0)  # the connection closes a moment before the process is gone
            code = process.exitcode
            if code is not None:
                reason = f"killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
        self.stop(worker)
        self._arrived.append(Arrival(worker, None, reason))

    def stop(self, worker: int) -> None:
        """See :class:`~descentlab.engine.transport.Hub`. Workers hold nothing worth saving, and a stopped one ignores
        any gentler signal."""
        assert self._selector is not None
        seat = self.seats[worker]
        if seat.link is not None:
            self._selector.unregister(seat.link.connection)
            seat.link.close()
            seat.link = None
        if seat.process is not None:
            self._selector.unregister(seat.process.sentinel)
            seat.process.kill()
            seat.process.join()
            seat.process.close()
            seat.process = None
        self._arrived = deque(a for a in self._arrived if a.worker != worker)

    def close(self) -> None:
        """See :class:`~descentlab.engine.transport.Hub`."""
        if self._selector is None:
            return
        for seat in self.seats:
            if seat.process is not None:
                seat.process.kill()  # all at once, before the first is waited for
        for worker in range(len(self.seats)):
            self.stop(worker)
        for connection in list(self._strangers):
            connection.close()
        self._selector.close()
        if self._listener is not None:
            self._listener.close()
        self._selector, self._listener = None, None
        self._strangers.clear()
        self._arrived.clear()


def _proof(key: bytes, nonce: bytes, worker: int, start: int) -> bytes:
    return hmac.digest(key, nonce + struct.pack("<qq", worker, start), "sha256")


def _main(
    who: tuple[int, int, bytes],
    address: tuple[str, int],
    memory: tuple[Any, Any] | None,
    sizes: tuple[int, int] | None,
    worker: Answers,
) -> None:
    """A worker process: connect, say who it is, answer; it ends when the server does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends its workers
    if sys.platform == "linux":  # the fork server ends with the server, and takes along who cannot see that
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if memory is None:
        assert sizes is not None
        inbox, outbox = (memoryview(bytearray(size)) for size in sizes)
    else:
        inbox, outbox = (memoryview(array).cast("B") for array in memory)
    try:
        connection = Connection(socket.create_connection(address, timeout=None).detach())
        connection.send_bytes(_HELLO.pack(*who[:2], _proof(who[2], connection.recv_bytes(32), *who[:2])))
    except (OSError, EOFError):  # the server is gone already
        return
    link = SocketLink(connection, inbox, outbox, shared=memory is not None, timeout_s=0.0)  # 0: the server may idle
    message: memoryview | None = None
    with contextlib.suppress(OSError, EOFError):
        while True:
            link.send(worker.answer(message, outbox))
            message = link.receive()
    os._exit(0)  # nothing is left to do, and taking torch down in order would cost a second
