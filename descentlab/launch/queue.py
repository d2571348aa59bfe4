"""What Slurm says about the jobs of a run directory. Without Slurm's commands the files alone speak."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..store import RunDirectory, Status
from ..store.progress import BlockStatus, last_line

JOBS = "slurm/jobs.jsonl"  # one line per job: {"job": "12_3", "blocks": [keys], "submitted", "code"}
ANSWER_S = 30.0
BROKEN = frozenset({"FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"})  # not asked for by anybody


def jobs(directory: RunDirectory) -> dict[str, str]:
    """Block key -> id of the job it was last submitted in."""
    return {key: str(row["job"]) for row in directory.read_jsonl(JOBS) for key in row["blocks"]}


def queued(directory: RunDirectory) -> dict[str, str]:
    """Block key -> ``"job 12_3 pending (Priority)"`` for every block in a job that waits or runs now."""
    submitted = jobs(directory)
    live = _squeue() if submitted else {}
    return {key: f"job {job} {live[job]}" for key, job in submitted.items() if job in live}


def with_queue(state: Status, directory: RunDirectory) -> Status:
    """``state`` as the files have it, with what the queue adds.

    A block that waits in a job is queued. One whose job has ended without it is interrupted, or failed where
    accounting says that the job did; the message names the job and the last line of its log.
    """
    submitted = jobs(directory)
    if not submitted:
        return state
    waiting = queued(directory)
    gone = {b.key: submitted[b.key] for b in state.blocks if b.key in submitted and b.key not in waiting}
    ended = _sacct(gone.values())
    blocks = {b.key: _block(b, waiting, gone, ended, directory) for b in state.blocks}
    runs = []
    for run in state.runs:
        block = blocks.get(run.block)
        changed = block is not None and run.state not in ("done", "diverged", "running")
        runs.append(replace(run, state=block.state, message=block.message) if block and changed else run)
    return replace(state, blocks=tuple(blocks.values()), runs=tuple(runs))


def _block(
    block: BlockStatus, waiting: dict[str, str], gone: dict[str, str], ended: dict[str, str], directory: RunDirectory
) -> BlockStatus:
    if block.state in ("done", "running"):
        return block
    if block.key in waiting:
        return replace(block, state="queued", message=waiting[block.key])
    if block.key in gone and block.state != "failed":
        job = gone[block.key]
        how = ended.get(job, "")
        line = last_line(directory.path / "slurm" / f"{job}_0_log.err")
        text = f"job {job} has ended{f' ({how})' if how else ''}{f': {line}' if line else ''}"
        return replace(block, state="failed" if how in BROKEN else "interrupted", message=text)
    return block


def _squeue() -> dict[str, str]:
    """Job id -> state and reason, of this user's jobs that have not ended."""
    rows = _ask("squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r")
    words = (row.split("|") for row in rows)
    return {job: state.lower() + (f" ({why})" if why != "None" else "") for job, state, why in words}


def _sacct(ids: Iterable[str]) -> dict[str, str]:
    """Job id -> how it ended, where the cluster keeps accounts."""
    asked = sorted(set(ids))
    if not asked:
        return {}
    rows = _ask(
        "sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", "--jobs", ",".join(asked)
    )
    return {job: state.split()[0] for job, _, state in (row.partition("|") for row in rows) if state}


def _ask(*command: str) -> list[str]:
    """Lines of the answer; none where the command is missing, fails (no accounts are kept) or does not answer."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done: Any = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        return []
    return [line for line in done.stdout.splitlines() if "|" in line] if done.returncode == 0 else []
