"""Runs one block of a run directory from where it stands to its end, checkpointing on the way."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..config.tree import StudySpec
from ..core.errors import StudyError, UserError
from ..core.state import State
from ..engine.driver import Engine
from ..engine.lockstep import Lockstep
from ..engine.recorder import Recorder
from ..engine.reducing import ReducingRecorder
from ..engine.stopping import Stopping
from ..engine.support import DISTRIBUTED
from ..engine.trajectory import due as weights_due
from ..engine.trajectory import weights_file
from ..store import BlockWriter, RunDirectory
from ..store.claim import Claim, take
from ..store.moments import moments_file
from .build import build_parts, with_takeover
from .compiled import as_planned
from .conditions import timeline_of
from .determinism import settled
from .distributed import run_distributed
from .memory import naming_the_knob
from .plan import SEMANTICS, Block, read_block
from .usage import Usage

ROWS_HELD = 2**16  # rows kept in memory until they are written; about 8 MB


def open_block(directory: RunDirectory, key: str) -> tuple[Block, StudySpec]:
    """A planned block and the settings it runs under."""
    plan = directory.plan()
    found = [b for b in plan.get("blocks", []) if b["key"] == key]
    if not found:
        raise StudyError(f"{directory.path / 'plan.json'} has no block {key}")
    module, _, name = plan["spec"].partition(":")
    block = read_block(found[0])
    return block, getattr(importlib.import_module(module), name).model_validate(block.settings)


def build_engine(
    block: Block,
    cell: Any,
    state: State | None,
    step: int,
    recorder: Recorder,
    ended: Mapping[str, Any] = MappingProxyType({}),
    folder: Path | None = None,
) -> Engine:
    """The engine the block's study asked for, at the given state; ``ended``: as :class:`Stopping` saved it. ``folder``:
    the block's, for an engine that keeps a log of its own."""
    own = [type(cell).model_validate({**block.settings, **_with_lr(v, cell)}) for v in block.variants]
    parts = build_parts(cell, block.plan.route, own, block.update)
    if leading := sorted({run.prefix.variant for run in block.plan.runs if run.prefix}):
        with_takeover(parts, cell.protocol, own, leading)
    if parts.stopping is not None:
        parts.stopping.load(ended)
    if isinstance(recorder, ReducingRecorder):
        parts.observables = [*parts.observables, recorder]
    if block.engine == "lockstep":
        return Lockstep(block.plan, parts, state, step, recorder)  # type: ignore[arg-type]
    if block.engine == "process":
        from .processes import parameter_server

        return parameter_server(block, cell, parts, own, state, step, recorder, folder)
    from ..engine.virtual import Virtual

    params, _ = parts.fresh(0)
    timeline = timeline_of(cell, sum(p.numel() * p.element_size() for p in params.values()))
    return Virtual(block.plan, parts, state, step, recorder, timeline=timeline)  # type: ignore[arg-type]


def make_recorder(cell: Any, **state: Any) -> Recorder:
    """Rows, or moments over runs where the settings ask for them; ``state`` as a checkpoint holds it."""
    observe = cell.observe
    if observe.reduce == "none" and observe.weights == "none":
        return Recorder(**state)
    return ReducingRecorder(
        **state,
        keep_rows=observe.reduce == "none",
        weights=observe.weights,
        weights_every=observe.weights_every,
        coordinates=tuple(observe.coordinates),
    )


def _with_lr(variant: dict[str, Any], cell: Any) -> dict[str, Any]:
    """A variant as settings; its rate does not matter, every member has its own."""
    return {**variant, "optimizer": {"lr": cell.optimizer.lr, **variant["optimizer"]}} if variant else {}


def run_block(
    path: Path,
    key: str,
    *,
    tick: Callable[[int], None] = lambda member_steps: None,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """``done``, ``interrupted``, or ``elsewhere`` where another process has the block.

    ``tick`` gets the member-steps of every update; ``stop`` is asked after each. What raises is noted in the block
    before anybody else can take it up.
    """
    directory = RunDirectory.open(path)
    claim = take(directory.path, key)
    if claim is None:
        return "elsewhere"
    with claim:
        plan = directory.plan()
        if key not in {b["key"] for b in plan.get("blocks", [])}:  # cut into smaller ones since it was handed out
            return "elsewhere"
        entry = next(b for b in plan["blocks"] if b["key"] == key)
        if "stage" in entry:
            return _stage(directory, entry, plan, claim, tick, stop)
        block, cell = open_block(directory, key)
        ids = [run.id for run in block.plan.runs]
        writer = BlockWriter(directory, key, semantics=SEMANTICS, runs=ids, steps=block.plan.stop)
        if writer.is_done:
            return "done"
        what = f"a block of {len(block.plan.runs)} members with batch_size = {cell.batch_size}"
        try:
            with naming_the_knob(what), as_planned(plan, cell.dtype), settled(cell.deterministic):
                if block.engine == DISTRIBUTED:
                    return run_distributed(directory, block, cell, claim, tick, stop)
                return _train(writer, block, cell, claim, tick, stop)
        except Exception as error:
            with suppress(StudyError):  # the disk is full: then that is what is said
                writer.fail(one_line(error))
            raise


def _stage(
    directory: RunDirectory,
    entry: dict[str, Any],
    plan: dict[str, Any],
    claim: Claim,
    tick: Callable[[int], None],
    stop: Callable[[], bool],
) -> str:
    """A block of a study of several stages."""
    from .staged import run_stage

    writer = BlockWriter(directory, entry["key"], semantics=SEMANTICS, runs=entry["runs"], steps=entry["steps"])
    if writer.is_done:
        return "done"
    module, _, name = plan["spec"].partition(":")
    cell = getattr(importlib.import_module(module), name).model_validate(entry["settings"])
    program = importlib.import_module(plan["program"])
    what = f"stage {entry['stage']} with {len(entry['runs'])} runs"
    try:
        with naming_the_knob(what), as_planned(plan, cell.dtype), settled(cell.deterministic):
            return run_stage(program, cell, entry, directory, writer, claim, tick, stop)
    except Exception as error:
        with suppress(StudyError):
            writer.fail(one_line(error))
        raise


def one_line(error: BaseException) -> str:
    """What is said of a block that raised."""
    if isinstance(error, StudyError | UserError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _train(
    writer: BlockWriter,
    block: Block,
    cell: StudySpec,
    claim: Claim,
    tick: Callable[[int], None],
    stop: Callable[[], bool],
) -> str:
    """From the last checkpoint to the end, or until ``stop``."""
    saved = writer.resume()
    recorder, state, step, ring, ended = make_recorder(cell), None, 0, {}, {}
    if saved is not None:
        held, step = saved
        state = State.from_state_dict(held["state"])
        recorder = make_recorder(cell, clock_s=held["wall_s"], diverged=dict(held["diverged"]))
        ring, ended = held["ring"], held.get("ended", {})
    engine = build_engine(block, cell, state, step, recorder, ended, writer.folder)
    if engine.guard is not None:
        engine.guard.load(ring, block.plan)
    own = [variant["optimizer"]["name"] if variant else cell.optimizer.name for variant in block.variants]
    names = {run.id: own[run.variant] for run in block.plan.runs}
    due, usage = time.monotonic() + cell.checkpoint_s, Usage()
    every = cell.observe.snapshots_every
    if every and step == 0:
        writer.artifact(*weights_file(0, engine.state, engine.slots))
    for progress in engine.run():
        tick(progress.member_steps)
        if weights_due(progress.step, every, progress.slots):
            writer.artifact(*weights_file(progress.step, progress.state, progress.slots))
        stopping = stop()
        if stopping or time.monotonic() >= due:
            claim.check()
            _flush(writer, recorder, names, usage)
            held = {"state": engine.state.state_dict(), "wall_s": recorder.now(), "diverged": dict(recorder.diverged)}
            held["ring"] = engine.guard.state_dict() if engine.guard is not None else {}
            if engine.parts.stopping is not None:
                held["ended"] = engine.parts.stopping.state_dict()
            engine.before_checkpoint()
            writer.checkpoint(held, engine.step)
            due = time.monotonic() + cell.checkpoint_s
        elif len(recorder) >= ROWS_HELD:
            _flush(writer, recorder, names, usage)
            writer.spill()
        if stopping:
            return "interrupted"
    claim.check()
    _flush(writer, recorder, names, usage)
    writer.finish([_status(run.id, run.stop, recorder, engine.parts.stopping) for run in block.plan.runs])
    return "done"


def _flush(writer: BlockWriter, recorder: Recorder, optimizers: dict[str, str], usage: Usage) -> None:
    writer.artifacts(recorder.scenes())  # before the checkpoint that covers them; a resumed block writes the same again
    if isinstance(recorder, ReducingRecorder) and (moments := recorder.take()):
        writer.artifact(moments_file(moments), moments)
    columns, hits = recorder.flush()
    if columns:
        writer.rows(usage.beside(columns, recorder.now()))
    writer.hits([{**hit, "optimizer": optimizers[hit["run"]]} for hit in hits])


def _status(run: str, steps: int, recorder: Recorder, stopping: Stopping | None = None) -> dict[str, Any]:
    at = recorder.diverged.get(run)
    message = "" if at is None else f"non-finite loss or weights from step {at} on"
    if stopping is not None and run in stopping.ended:
        last, _, message = stopping.ended[run]
        steps = last + 1
    if at is None:
        return {"run": run, "status": "done", "steps": steps, "message": message}
    return {"run": run, "status": "diverged", "steps": steps, "message": message, "diverged_step": at}
