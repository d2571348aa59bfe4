"""Runs one block of a run directory from where it stands to its end, checkpointing on the way."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.tree import StudySpec
from ..core.errors import StudyError
from ..core.state import State
from ..engine.driver import Engine
from ..engine.lockstep import Lockstep
from ..engine.recorder import Recorder
from ..store import BlockWriter, RunDirectory
from .build import build_parts
from .plan import SEMANTICS, Block, read_block


def open_block(directory: RunDirectory, key: str) -> tuple[Block, StudySpec]:
    """A planned block and the settings it runs under."""
    plan = directory.read_json("plan.json")
    found = [b for b in plan.get("blocks", []) if b["key"] == key]
    if not found:
        raise StudyError(f"{directory.path / 'plan.json'} has no block {key}")
    module, _, name = plan["spec"].partition(":")
    block = read_block(found[0])
    return block, getattr(importlib.import_module(module), name).model_validate(block.settings)


def build_engine(block: Block, cell: Any, state: State | None, step: int, recorder: Recorder) -> Engine:
    """The engine the block's study asked for, at the given state."""
    parts = build_parts(cell, block.plan.route)
    if block.engine == "lockstep":
        return Lockstep(block.plan, parts, state, step, recorder)  # type: ignore[arg-type]
    from ..engine.virtual import Virtual

    return Virtual(block.plan, parts, state, step, recorder, timeline=cell.timeline.build())  # type: ignore[arg-type]


def run_block(
    path: Path,
    key: str,
    *,
    tick: Callable[[int], None] = lambda member_steps: None,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """``done`` or ``interrupted``. ``tick`` gets the member-steps of every update; ``stop`` is asked after each."""
    directory = RunDirectory.open(path)
    block, cell = open_block(directory, key)
    ids = [run.id for run in block.plan.runs]
    writer = BlockWriter(directory, key, semantics=SEMANTICS, runs=ids, steps=block.plan.stop)
    if writer.is_done:
        return "done"
    saved = writer.resume()
    recorder, state, step = Recorder(), None, 0
    if saved is not None:
        held, step = saved
        state = State.from_state_dict(held["state"])
        recorder = Recorder(clock_s=held["wall_s"], diverged=dict(held["diverged"]))
    engine = build_engine(block, cell, state, step, recorder)
    names = {run.id: cell.optimizer.name for run in block.plan.runs}
    due = time.monotonic() + cell.checkpoint_s
    for progress in engine.run():
        tick(progress.member_steps)
        stopping = stop()
        if stopping or time.monotonic() >= due:
            _flush(writer, recorder, names)
            held = {"state": engine.state.state_dict(), "wall_s": recorder.now(), "diverged": dict(recorder.diverged)}
            writer.checkpoint(held, engine.step)
            due = time.monotonic() + cell.checkpoint_s
        if stopping:
            return "interrupted"
    _flush(writer, recorder, names)
    writer.finish([_status(run.id, run.stop, recorder) for run in block.plan.runs])
    return "done"


def _flush(writer: BlockWriter, recorder: Recorder, optimizers: dict[str, str]) -> None:
    for run, arrays in recorder.scenes().items():  # before the checkpoint that covers the hit; a resumed block writes
        writer.artifact(f"hit-{run}.npz", arrays)  # the same content again
    columns, hits = recorder.flush()
    if columns:
        writer.rows(columns)
    writer.hits([{**hit, "optimizer": optimizers[hit["run"]]} for hit in hits])


def _status(run: str, steps: int, recorder: Recorder) -> dict[str, Any]:
    at = recorder.diverged.get(run)
    if at is None:
        return {"run": run, "status": "done", "steps": steps, "message": ""}
    message = f"non-finite loss or weights from step {at} on"
    return {"run": run, "status": "diverged", "steps": steps, "message": message, "diverged_step": at}
