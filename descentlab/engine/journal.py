"""The log of a parameter server: one line per update, written before anybody is told that it was made.

A line holds no numbers of a gradient: worker, batch and version say how it is computed again. So a server that was
killed makes the logged updates since its last checkpoint again, and a log is a timeline for the virtual engine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from ..core.errors import StudyError
from ..core.protocols import Tick

SYNC_S = 1.0  # lines are on the disk at the latest after so long; a killed process loses none in any case


@final
@dataclass(frozen=True)
class Entry:
    """One update: contributing workers, the version each had read, which of its batches it was (0-based), the number of
    its task, and seconds since the start."""

    update: int
    workers: tuple[int, ...]
    versions: tuple[int, ...]
    batches: tuple[int, ...]
    numbers: tuple[int, ...]
    time_s: float

    def tick(self) -> Tick:
        """As timelines have it."""
        return Tick(self.workers, self.versions, self.time_s)


@final
class Journal:
    """Entries in a file that only grows. Opening drops a line that a killed server had not finished.

    Raises:
        StudyError: for a file that cannot be written, or holds anything but consecutive updates.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.entries, whole = _read(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._file, whole)
        except OSError as error:
            raise self._failed(error) from None
        self._synced = time.monotonic()

    def append(self, entry: Entry) -> None:
        """Hand the line to the system; when this returns, it survives this process."""
        line = json.dumps(entry.__dict__, separators=(",", ":")) + "\n"
        try:
            if os.write(self._file, line.encode()) != len(line):
                raise OSError("the disk is full")
        except OSError as error:
            raise self._failed(error) from None
        self.entries.append(entry)
        if time.monotonic() - self._synced >= SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Flush to the disk."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from None
        self._synced = time.monotonic()

    def close(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _failed(self, error: OSError) -> StudyError:
        what = error.strerror or str(error)
        return StudyError(f"cannot write {self.path} ({what}); put this right and run the same command again")


def _read(path: Path) -> tuple[list[Entry], int]:
    """(entries, bytes they take) of a log; no entries where there is no file."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data.rfind(b"\n") + 1
    entries = []
    for number, line in enumerate(data[:whole].splitlines()):
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(line).items()}
            entries.append(Entry(**fields))
        except (ValueError, TypeError, AttributeError):
            raise _damaged(path, number) from None
        if entries[-1].update != number:
            raise _damaged(path, number)
    return entries, whole


def _damaged(path: Path, number: int) -> StudyError:
    return StudyError(f"{path} is damaged (line {number + 1}); delete the folder {path.parent} to compute it again")


def read_ticks(path: Path) -> Sequence[Tick]:
    """The timeline in the log at ``path``, for :class:`descentlab.cluster.timeline.RecordedTimeline`."""
    if not path.is_file():
        raise StudyError(f"{path} does not exist; a run of engine=process writes it into its block's folder")
    return [entry.tick() for entry in _read(path)[0]]
