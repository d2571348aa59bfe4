"""What has happened so far in a run directory, per block and per run.

The module is not called ``status`` because ``store.status`` is the function.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import claim
from .directory import RunDirectory, read_json
from .parts import CHECKPOINT, DONE, FAILED, OWNER, Cover, read_cover, recompute
from .process import is_alive

STATES = ("done", "running", "queued", "failed", "diverged", "interrupted")


@dataclass(frozen=True)
class RunStatus:
    """One run: its state (see ``STATES``), server updates completed, a message.

    ``more`` is what done.json adds, such as ``diverged_step``.
    """

    run: str
    state: str
    steps: int = 0
    message: str = ""
    block: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """The line of runs.jsonl."""
        row = {"run": self.run, "status": self.state, "steps": self.steps, "message": self.message}
        return {**row, "block": self.block, **self.more}


@dataclass(frozen=True)
class BlockStatus:
    """One block: its state, server updates completed of ``total`` (None when not recorded), its runs.

    ``message`` is the last line of a failure; ``per_s`` the updates per second of a running block, once it has
    written a checkpoint.
    """

    key: str
    state: str
    steps: int = 0
    total: int | None = None
    runs: tuple[str, ...] = ()
    message: str = ""
    per_s: float | None = None


@dataclass(frozen=True)
class Status:
    """State of a run directory."""

    study: str
    blocks: tuple[BlockStatus, ...]
    runs: tuple[RunStatus, ...]

    def counts(self) -> dict[str, int]:
        """Number of runs in each state that occurs, in the order of ``STATES``."""
        counted = Counter(run.state for run in self.runs)
        return {state: counted[state] for state in STATES if counted[state]}

    def progress(self) -> float | None:
        """Share of all updates of all runs that are on the disk, 0 to 1; None before there is a plan."""
        total = sum(len(b.runs) * (b.total or 0) for b in self.blocks)
        made = sum(len(b.runs) * (b.steps if b.state != "done" else b.total or b.steps) for b in self.blocks)
        return made / total if total else None

    def left_s(self) -> float | None:
        """Seconds until everything is done at the speed of the blocks that run now; None while that is not known.

        Blocks that failed or were interrupted do not count: nothing works on them.
        """
        speed = sum(len(b.runs) * (b.per_s or 0.0) for b in self.blocks if b.state == "running")
        ahead = [b for b in self.blocks if b.state in ("running", "queued")]
        left = sum(len(b.runs) * max((b.total or 0) - b.steps, 0) for b in ahead)
        return left / speed if speed else None


def status(path: str | Path) -> Status:
    """State of every block and of every run in resolved.jsonl; imports no torch.

    Block membership comes from plan.json (``{"blocks": [{"key", "runs", "steps"}, …]}``) and from the blocks
    themselves. A run whose block has not begun is queued. Raises :class:`StudyError` when a cover is damaged.
    """
    directory = RunDirectory.open(path)
    return states(directory, [str(run["id"]) for run in directory.read_jsonl("resolved.jsonl")])


def states(directory: RunDirectory, current: Sequence[str]) -> Status:
    """:func:`status` for the runs with the ids ``current``."""
    planned = {str(block["key"]): block for block in directory.plan().get("blocks", [])}
    keys = [*planned, *(key for key in directory.block_keys() if key not in planned)]
    blocks = []
    runs: dict[str, RunStatus] = {}
    for key in keys:
        block, members = _block_status(directory, key, planned.get(key, {}))
        blocks.append(block)
        for member in members:
            known = runs.get(member.run)
            if known is None or (known.state in ("queued", "interrupted") and member.state != "queued"):
                runs[member.run] = member  # after a new packing an old block may still list the run
    return Status(directory.study, tuple(blocks), tuple(runs.get(r, RunStatus(r, "queued")) for r in current))


def _block_status(directory: RunDirectory, key: str, planned: Mapping[str, Any]) -> tuple[BlockStatus, list[RunStatus]]:
    folder = directory.block_folder(key)
    cover = read_cover(folder)
    owner = read_json(folder / OWNER, recompute(folder)) if (folder / OWNER).is_file() else {}
    members = tuple(map(str, planned.get("runs") or owner.get("runs") or ()))
    total = planned.get("steps") or owner.get("steps")
    if cover is not None and cover.done:
        done = [_finished(row, key) for row in cover.status]
        return BlockStatus(key, "done", cover.step, total, tuple(r.run for r in done)), done
    state, message = _unfinished(directory, folder, owner, cover)
    steps = cover.step if cover else 0
    per_s = _speed(folder, owner, steps) if state == "running" else None
    return (
        BlockStatus(key, state, steps, total, members, message, per_s),
        [RunStatus(run, state, steps, message, key) for run in members],
    )


def _finished(row: Mapping[str, Any], key: str) -> RunStatus:
    known = ("run", "status", "steps", "message", "block")
    more = {name: value for name, value in row.items() if name not in known}
    state, steps = str(row.get("status", "done")), int(row.get("steps", 0))
    return RunStatus(str(row["run"]), state, steps, str(row.get("message", "")), key, more)


def _unfinished(
    directory: RunDirectory, folder: Path, owner: Mapping[str, Any], cover: Cover | None
) -> tuple[str, str]:
    if (folder / FAILED).is_file():
        message = str(read_json(folder / FAILED, recompute(folder)).get("message", ""))
        return "failed", message or last_line(directory.log_path(folder.name))
    if owner and _alive(owner, directory, folder):
        return "running", ""
    return ("interrupted", "") if owner or cover else ("queued", "")


def _alive(owner: Mapping[str, Any], directory: RunDirectory, folder: Path) -> bool:
    if owner.get("host") != socket.gethostname():
        return claim.holder(directory.path, folder.name) is not None
    return is_alive(owner) and not (folder / DONE).is_file()


def _speed(folder: Path, owner: Mapping[str, Any], steps: int) -> float | None:
    """Updates per second between the block's (re)start, when owner.json was written, and its last checkpoint."""
    try:
        spent = (folder / CHECKPOINT).stat().st_mtime - (folder / OWNER).stat().st_mtime
    except OSError:  # no checkpoint yet, or just finished
        return None
    made = steps - int(owner.get("from", 0))
    return made / spent if made > 0 and spent > 0 else None


def last_line(path: Path) -> str:
    """The last line of a log that is not blank, or an empty string."""
    if not path.is_file():
        return ""
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - 65536))
        lines = handle.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
