"""Who works on a block: a claim that one living process holds, and that a dead one loses.

The claim of block ``key`` is an exclusive lock (flock) on ``claims/<key>``. The kernel drops it when its process ends,
however it ends, so a dead owner on the same host never blocks anybody. Some shared file systems keep such locks to one
host (Lustre with ``localflock``, NFS with ``nolock``). For them the file also says who holds it and is touched every
``BEAT_S``: a record of another host counts until it has not been touched for ``LEASE_S``, by this host's clock.
There two hosts that take the same claim within the same instant can both get it; the one that was overwritten notices
at its next checkpoint and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from ..core.errors import StudyError
from .atomic import writing
from .directory import CLAIMS
from .process import is_alive, process_identity

FOLDER = CLAIMS
BEAT_S = 20.0
LEASE_S = 180.0  # of silence after which a claim of another host counts as lost; several beats and some clock skew


class Claim:
    """A claim held by this process until :meth:`release`; use as a context manager. Made by :func:`take`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._write({**process_identity(), "token": self._token})
        threading.Thread(target=self._beat, daemon=True).start()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def check(self) -> None:
        """Raise :class:`StudyError` when another host has taken the claim over: this process was silent for long."""
        record = _read(self._descriptor)
        if record.get("token") != self._token:
            by = f"{record.get('host', 'another host')}, process {record.get('pid', '?')}"
            raise StudyError(f"block {self.path.name} was taken over by {by}; what it writes is kept")

    def release(self) -> None:
        """Give the claim back, for anybody to take."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if _read(self._descriptor).get("token") == self._token:
                os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _write(self, record: dict[str, Any]) -> None:
        with writing(self.path):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(record).encode(), 0)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # released meanwhile, or a file system that is away for a moment
                os.utime(self.path)


def take(directory: Path, key: str) -> Claim | None:
    """The claim of block ``key`` in the run directory ``directory``; None while somebody alive holds it."""
    import fcntl  # POSIX only; reading results needs no claim

    path = directory / FOLDER / key
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
    if _beats_elsewhere(_read(descriptor), path):
        os.close(descriptor)
        return None
    return Claim(path, descriptor)


def holder(directory: Path, key: str) -> dict[str, Any] | None:
    """{"host", "pid", "started", …} of the living holder of block ``key``, or None. Takes no lock."""
    path = directory / FOLDER / key
    try:
        record = json.loads(path.read_text() or "{}")
    except (OSError, ValueError):
        return None
    if record.get("host") == socket.gethostname():
        return record if is_alive(record) else None
    return record if _beats_elsewhere(record, path) else None


def holders(directory: Path) -> dict[str, dict[str, Any]]:
    """Block key -> living holder, for every claim that is held."""
    folder = directory / FOLDER
    keys = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return {key: found for key in keys if (found := holder(directory, key)) is not None}


def _read(descriptor: int) -> dict[str, Any]:
    """The record, empty when nobody holds the claim or its holder died while writing."""
    try:
        record = json.loads(os.pread(descriptor, 65536, 0) or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _beats_elsewhere(record: dict[str, Any], path: Path) -> bool:
    """Whether a process of another host holds the claim and was heard of lately."""
    if not record or record.get("host") == socket.gethostname():
        return False
    return time.time() - path.stat().st_mtime < LEASE_S
