"""How a parameter server and its workers exchange messages: a small protocol, and its version for one machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, Protocol, final

from ..core.errors import StudyError

Serve = Callable[["Link"], None]  # what a worker process runs; must be picklable


class Link(Protocol):
    """A worker's end: one request at a time, each answered."""

    def send(self, message: Any) -> None: ...

    def receive(self) -> Any:
        """The next message; StudyError when the other side is gone or silent for too long."""
        ...


class Hub(Protocol):
    """The server's end. Every wait is bounded; a lost worker is a StudyError that names it."""

    def open(self, workers: int, serve: Callable[[int], Serve], modules: Sequence[str]) -> None:
        """Start worker w = 0 … ``workers`` - 1, each running ``serve(w)`` on its link; they will need ``modules``."""
        ...

    def receive(self) -> tuple[int, Any]:
        """(worker, message) of whoever came first."""
        ...

    def send(self, worker: int, message: Any) -> None: ...

    def close(self) -> None:
        """End every worker; nothing is left behind. May be called twice."""
        ...


@final
class SocketLink:
    """A ``multiprocessing`` connection over TCP whose every blocking call ends after ``timeout_s``."""

    def __init__(self, connection: Connection, timeout_s: float, peer: str) -> None:
        self.connection, self.timeout_s, self.peer = connection, timeout_s, peer
        limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        with socket.socket(fileno=os.dup(connection.fileno())) as shared:  # options belong to the connection itself
            shared.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError as error:
            raise StudyError(f"{self.peer} is lost: {_reason(error, self.timeout_s)}") from None

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (OSError, EOFError) as error:
            raise StudyError(f"{self.peer} is lost: {_reason(error, self.timeout_s)}") from None

    def close(self) -> None:
        self.connection.close()


def _reason(error: Exception, timeout_s: float) -> str:
    if isinstance(error, BlockingIOError):
        return f"no answer within {timeout_s:g} s"
    return "its connection was closed" if isinstance(error, EOFError | ConnectionError) else str(error)


@final
class LocalProcesses:
    """Worker processes on this machine, over TCP on 127.0.0.1 with a random key.

    ``timeout_s`` bounds every wait, start-up of the workers included. Processes come from a fork server that has
    loaded the modules once (no threads are forked); where there is none they are spawned.
    """

    def __init__(self, timeout_s: float = 120.0) -> None:
        self.timeout_s = timeout_s
        self.processes: list[Any] = []
        self._links: dict[int, SocketLink] = {}
        self._ready: deque[int] = deque()

    def open(self, workers: int, serve: Callable[[int], Serve], modules: Sequence[str]) -> None:
        """See :class:`Hub`."""
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(list(modules))
        key = os.urandom(32)
        with Listener(("127.0.0.1", 0), backlog=workers, authkey=key) as listener:
            for w in range(workers):
                arguments = (w, listener.address, key, self.timeout_s, serve(w))
                process = context.Process(target=_main, args=arguments, daemon=True, name=f"worker {w}")
                process.start()
                self.processes.append(process)
            self._accept(listener, workers)

    def _accept(self, listener: Listener, workers: int) -> None:
        """Connections are accepted in a thread, because ``Listener.accept`` knows no time limit."""
        arrived: queue.Queue[Connection] = queue.Queue()
        done = threading.Event()

        def accept() -> None:
            while not done.is_set():
                with contextlib.suppress(OSError, EOFError, multiprocessing.AuthenticationError):
                    arrived.put(listener.accept())

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + self.timeout_s
            while len(self._links) < workers:
                try:
                    link = SocketLink(arrived.get(timeout=0.05), self.timeout_s, "a worker")
                except queue.Empty:
                    self._check_alive()
                    if time.monotonic() > deadline:
                        raise StudyError(f"the workers did not start within {self.timeout_s:g} s") from None
                    continue
                worker = link.receive()
                link.peer = f"worker {worker}"
                self._links[worker] = link
        finally:
            done.set()
            with contextlib.suppress(OSError):
                socket.create_connection(listener.address, timeout=1.0).close()  # lets the thread see that it is done
            thread.join(1.0)

    def _check_alive(self) -> None:
        for process in self.processes:
            if process.exitcode is not None:
                raise StudyError(f"{process.name} ended before it had started (exit code {process.exitcode})")

    def receive(self) -> tuple[int, Any]:
        """See :class:`Hub`; links that are ready together are served in turn, so nobody starves."""
        if not self._ready:
            owner = {link.connection: w for w, link in self._links.items()}
            self._ready.extend(owner[c] for c in wait(list(owner), self.timeout_s))  # type: ignore[index]
            if not self._ready:
                raise StudyError(f"no worker sent a gradient within {self.timeout_s:g} s")
        worker = self._ready.popleft()
        return worker, self._links[worker].receive()

    def send(self, worker: int, message: Any) -> None:
        """See :class:`Hub`."""
        self._links[worker].send(message)

    def close(self) -> None:
        """See :class:`Hub`. Workers hold nothing worth saving, and a stopped one ignores any gentler signal."""
        for process in self.processes:
            process.kill()
        for link in self._links.values():
            link.close()
        for process in self.processes:
            process.join()
            process.close()
        self.processes, self._links = [], {}
        self._ready.clear()


def _main(worker: int, address: tuple[str, int], key: bytes, timeout_s: float, serve: Serve) -> None:
    """A worker process: connect, say who it is, serve; it ends when the server does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends its workers
    try:
        link = SocketLink(Client(address, authkey=key), timeout_s, "the server")
    except (OSError, EOFError):  # the server is gone already
        return
    try:
        link.send(worker)
        serve(link)
    except StudyError:  # the server is gone, and whoever waits for the result hears of it there
        return
    finally:
        link.close()
