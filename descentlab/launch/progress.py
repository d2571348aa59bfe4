"""What a user sees while a study runs: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..store import status

LINE_EVERY_S = 5.0


def remaining(path: Path, blocks: Sequence[Mapping[str, Any]]) -> int:
    """Member-steps still to be made of these blocks of plan.json: what a checkpoint holds is not made again."""
    made = {b.key: b.steps / b.total for b in status(path).blocks if b.total}
    return round(sum(b["member_steps"] * (1 - min(1.0, made.get(str(b["key"]), 0.0))) for b in blocks))


class Progress:
    """Counts member-steps towards ``total``; use as a context manager."""

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label, self.done = max(total, 1), label, 0
        self._started = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._row = self._bar.add_task(self.label, total=self.total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tick(self, member_steps: int) -> None:
        """``member_steps`` more are done."""
        self.done += member_steps
        if self._bar is not None:
            self._bar.update(self._row, completed=self.done)
        elif time.monotonic() - self._last >= LINE_EVERY_S:
            self._last = time.monotonic()
            print(f"{self.label}: {100 * self.done / self.total:.0f} %, {self.eta()}", file=sys.stderr, flush=True)

    def eta(self) -> str:
        """``"12 s left"`` at the mean speed so far."""
        spent = time.monotonic() - self._started
        left = spent * max(0, self.total - self.done) / max(self.done, 1)
        return f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left"
