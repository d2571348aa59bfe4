"""What every exchange of an update took, as process 0 measured it: ``buckets.jsonl`` in the block's folder."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from ..store.atomic import write_text

FILE = "buckets.jsonl"


@final
class BucketLog:
    """One line per update: ``run``, ``step``, and for each exchange, in order, seconds of compressing, of each
    collective and of decompressing, how much of it the backward pass hid (null where not known), and bytes."""

    def __init__(self, folder: Path, run: str, step: int) -> None:
        """Goes on after ``step`` updates; lines of later ones, which a crash has left, are dropped."""
        self._run, path = run, folder / FILE
        kept = []
        if step and path.is_file():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            kept = [line for line in lines if json.loads(line)["step"] < step]
        write_text(path, "".join(kept))  # whole or not at all: a second kill may come before the next checkpoint
        self._file = path.open("a")

    def write(self, step: int, exchanges: list[Any]) -> None:
        """The update ``step``; ``exchanges``: :class:`~descentlab.comm.hook.BucketTimes`."""
        found = [asdict(one) for one in exchanges]
        for one in found:
            one["hidden_s"] = None if math.isnan(one["hidden_s"]) else one["hidden_s"]
        self._file.write(json.dumps({"run": self._run, "step": step, "exchanges": found}) + "\n")

    def flush(self) -> None:
        """Bring it to the disk, before a checkpoint counts."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more updates."""
        self._file.close()
