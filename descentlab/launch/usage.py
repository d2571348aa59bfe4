"""When rows were made and what of the machine that took: volatile columns of the table."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Usage:
    """Counts between two calls of :meth:`beside`, in the process that trains the block."""

    def __init__(self) -> None:
        self._cpu_s, self._wall_s = time.process_time(), time.monotonic()

    def beside(self, columns: Mapping[str, pl.Series], now_s: float) -> dict[str, pl.Series]:
        """``columns`` and, of rows made up to ``now_s`` on the clock of ``wall_s``: ``timestamp`` (UTC),
        ``cpu_percent`` (processor time over wall time since the last call; 100 is one core) and ``rss_mb`` (memory
        held now, in 2^20 bytes)."""
        cpu_s, wall_s = time.process_time(), time.monotonic()
        percent = 100 * (cpu_s - self._cpu_s) / max(wall_s - self._wall_s, 1e-9)
        self._cpu_s, self._wall_s = cpu_s, wall_s
        made = columns["wall_s"].to_numpy() + (time.time() - now_s)
        made *= 1000
        n = len(made)
        return {
            **columns,
            "timestamp": pl.Series("timestamp", made.astype(np.int64)).cast(pl.Datetime("ms", "UTC")),
            "cpu_percent": pl.Series("cpu_percent", np.full(n, percent, np.float32)),
            "rss_mb": pl.Series("rss_mb", np.full(n, resident_bytes() / 2**20, np.float32)),
        }


def resident_bytes() -> int:
    """Memory this process holds now; the most it ever held where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
    except (OSError, IndexError, ValueError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
