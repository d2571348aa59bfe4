"""Which process wrote something, and whether it still runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def process_identity() -> dict[str, Any]:
    """Host, process id and start of this process: enough to tell later whether it still runs."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": process_start(pid)}


def process_start(pid: int) -> str | None:
    """Kernel start time of ``pid`` (guards against a reused id); None where /proc does not exist."""
    fields = _stat(pid)
    return fields[19] if fields else None


def is_alive(identity: Mapping[str, Any]) -> bool:
    """Whether the process of :func:`process_identity`, of this host, still runs."""
    pid = int(identity["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists and belongs to somebody else
    return process_start(pid) == identity.get("started") and _stat(pid)[:1] != ["Z"]  # Z: only its parent has to know


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty where there are none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
