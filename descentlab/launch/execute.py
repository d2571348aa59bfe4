"""Gets the blocks of a plan done, whoever else works on them: other commands on this directory, jobs of a cluster."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import StudyError
from ..store import BlockWriter, RunDirectory
from ..store.atomic import DISK_FULL
from ..store.claim import holder, take
from ..store.directory import read_json
from ..store.parts import FAILED
from .isolate import attempt, isolate
from .pool import Outcome, Pool
from .progress import Progress, remaining

POLL_S = 0.2
Tick = Callable[[int], None]
Stop = Callable[[], bool]
Work = Callable[[Sequence[str], Tick], list[Outcome]]


def pending(directory: RunDirectory, wanted: Collection[str]) -> list[dict[str, Any]]:
    """Blocks of plan.json that hold a wanted run and are not done, largest first."""
    plan = directory.plan()
    blocks = [b for b in plan.get("blocks", []) if not set(wanted).isdisjoint(b["runs"])]
    left = [b for b in blocks if not BlockWriter(directory, b["key"], semantics=plan["semantics"]).is_done]
    return sorted(left, key=lambda b: -b["member_steps"])


def execute(
    directory: RunDirectory,
    wanted: Collection[str],
    work: Work,
    stop: Stop,
    *,
    wait_s: float = math.inf,
    skip: Collection[str] = (),
) -> list[Outcome]:
    """Run every block that holds a wanted run and that nobody else runs; one outcome per block this command ran.

    Then stay up to ``wait_s`` seconds until the blocks that others have are done too, and take over those whose owner
    dies. ``skip``: keys of blocks to leave alone. Raises :class:`StudyError` when the disk is full.
    """
    wanted = set(wanted)
    final: dict[str, Outcome] = {}
    seen: set[str] = set()  # blocks that others had when last looked at
    first = [b for b in pending(directory, wanted) if b["key"] not in skip]
    deadline = time.monotonic() + wait_s
    with Progress(remaining(Path(directory.path), first), directory.study) as progress:
        while not stop():
            undone = pending(directory, wanted)
            left = [b for b in undone if b["key"] not in final and b["key"] not in skip]
            owners = {b["key"]: owner for b in left if (owner := holder(directory.path, b["key"])) is not None}
            for key in seen - owners.keys():
                if (message := _failure(directory, key)) is not None and any(b["key"] == key for b in left):
                    final[key] = Outcome(key, "failed", message)
            final |= _beyond_reach(undone, final)
            ahead = {b["key"] for b in undone}
            ready = [b for b in left if b["key"] not in final and ahead.isdisjoint(_needs(b))]
            free = [b["key"] for b in ready if b["key"] not in owners]
            _say_who(owners, seen, left)
            if free:
                outcomes = _round(directory, free, work, progress.tick)
                final |= {o.key: o for o in outcomes if o.state != "elsewhere"}
                if any(o.state != "elsewhere" for o in outcomes):
                    deadline = time.monotonic() + wait_s
                    continue
            if all(b["key"] in final for b in left) or time.monotonic() >= deadline:
                break
            time.sleep(POLL_S)
    return list(final.values())


def _needs(block: dict[str, Any]) -> set[str]:
    """Keys of the blocks of earlier stages that a block continues."""
    return {key for keys in block.get("needs", {}).values() for key in keys}


def _beyond_reach(undone: Sequence[dict[str, Any]], final: dict[str, Outcome]) -> dict[str, Outcome]:
    """Blocks that will never begin because one they continue has failed here."""
    stages = {b["key"]: b.get("stage", "") for b in undone}
    return {
        b["key"]: Outcome(b["key"], "failed", f"not begun: stage {stages[key]} before it failed")
        for b in undone
        for key in _needs(b)
        if b["key"] not in final and key in final and key in stages
    }


def _round(directory: RunDirectory, keys: list[str], work: Work, tick: Tick) -> list[Outcome]:
    outcomes = work(keys, tick)
    if not any(o.message.startswith(DISK_FULL) for o in outcomes):
        outcomes = isolate(directory, outcomes, lambda parts: work([p["key"] for p in parts], lambda steps: None))
    return [_noted(directory, o) if o.state == "failed" else o for o in outcomes]


def _noted(directory: RunDirectory, outcome: Outcome) -> Outcome:
    """A failure, written down where status finds it; unless somebody has taken the block up since."""
    if outcome.message.startswith(DISK_FULL):
        raise StudyError(outcome.message)  # there is no room to write it down
    claim = take(directory.path, outcome.key)
    if claim is None:
        return Outcome(outcome.key, "elsewhere")
    with claim:
        if not (directory.block_folder(outcome.key) / "done.json").is_file():
            BlockWriter(directory, outcome.key).fail(outcome.message)
            directory.event("failed", outcome.message, block=outcome.key)
            return outcome
    return Outcome(outcome.key, "done")


def _failure(directory: RunDirectory, key: str) -> str | None:
    path = directory.block_folder(key) / FAILED
    return str(read_json(path, "delete it").get("message", "")) if path.is_file() else None


def _say_who(owners: dict[str, dict[str, Any]], seen: set[str], blocks: Sequence[dict[str, Any]]) -> None:
    """One line when others are first met; ``seen`` is brought up to date."""
    if owners and not seen:
        who = sorted({f"process {o['pid']} on {o['host']}" for o in owners.values()})
        runs = sum(len(b["runs"]) for b in blocks if b["key"] in owners)
        print(f"sharing the work: {runs} runs are under way in {', '.join(who)}", file=sys.stderr)
    seen |= owners.keys()


def worker(directory: RunDirectory, pool: Pool | None, stop: Stop) -> Work:
    """What runs blocks: the pool, or this process where there is none."""

    def work(keys: Sequence[str], tick: Tick) -> list[Outcome]:
        if pool is not None:
            return pool.run(directory.path, keys, tick=tick, stop=stop)
        return in_process(directory, keys, tick, stop)

    return work


def in_process(directory: RunDirectory, keys: Sequence[str], tick: Tick, stop: Stop) -> list[Outcome]:
    """Run blocks one after the other in this process, with one thread as the workers of a pool."""
    import torch

    from .block import run_block

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    outcomes = []
    try:
        for key in keys:
            if stop():
                break
            outcomes.append(
                attempt(directory, key, partial(run_block, Path(directory.path), key, tick=tick, stop=stop))
            )
    finally:
        torch.set_num_threads(threads)
    return outcomes
