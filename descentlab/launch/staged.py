"""Studies of several stages: which blocks they make, and what a stage is given while it runs.

Such a study's program has ``run_stage(bench)`` and ``updates(cell, stage)``. A run's role is the name of its stage.
Runs whose stages have the same key (:func:`~descentlab.core.stage.stage_keys`) make one stage, cut into blocks where it
has many runs; a block waits for all blocks of the stages it continues.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..config.resolve import Resolved
from ..config.tree import Run, StudySpec
from ..core.errors import StudyError
from ..core.state import State
from ..core.tree import Tree
from ..engine.driver import Engine, Progress
from ..engine.lockstep import Lockstep
from ..engine.parts import Parts
from ..engine.program import BlockPlan, Route, RunPlan
from ..engine.recorder import Recorder
from ..engine.reducing import ReducingRecorder
from ..store import BlockWriter, RunDirectory
from ..store.claim import Claim
from ..store.moments import moments_file
from ..workloads.base import Workload
from .build import build_parts, survey, workload
from .conditions import check_classes

MEMBERS: dict[Route, int] = {"vmap": 500, "member": 25}  # runs of a block
ROWS_HELD = 2**16
ALONE = 60  # updates of runs in an ensemble that take as long as one update of a single run


class Interrupted(Exception):
    """A stage was told to stop; what it has is in its checkpoint."""


def staged_plan(resolved: Resolved, known: Mapping[str, Any], program: Any) -> list[dict[str, Any]]:
    """The blocks of plan.json: those known, and new ones for the runs they do not hold."""
    blocks: list[dict[str, Any]] = list(known.get("blocks", []))
    held = {run: block["key"] for block in blocks for run in block["runs"]}
    made: dict[str, list[Run]] = {}  # stage key -> its runs
    entries: dict[str, dict[str, Any]] = {}
    routes: dict[int, Route] = {}
    by_cell = [_keyed(program.stages(cell)) for cell in resolved.cells]
    for run in resolved.runs:
        entry = by_cell[run.cell][run.role]
        entries[entry["key"]] = entry
        made.setdefault(entry["key"], []).append(run)
    for cell in resolved.cells:
        check_classes(cell)
    for key, runs in made.items():  # inputs first, as in the plan of the study
        entry, cell = entries[key], resolved.cells[runs[0].cell]
        needs = {name: _holding(held, made[by_cell[runs[0].cell][name]["key"]]) for name in entry["inputs"]}
        new = [run for run in runs if run.id not in held]
        if new and runs[0].cell not in routes:
            routes[runs[0].cell] = survey(cell).route  # makes the model once
        route = routes[runs[0].cell] if new else "vmap"
        most = cell.members_per_block or MEMBERS[route]
        for first in range(0, len(new), most):
            block = _block(entry, new[first : first + most], cell, program, needs, route)
            blocks.append(block)
            held.update(dict.fromkeys(block["runs"], block["key"]))
    return blocks


def _keyed(stages: Sequence[Any]) -> dict[str, dict[str, Any]]:
    from .plan import stage_entries

    return {entry["name"]: entry for entry in stage_entries(stages)}


def _holding(held: Mapping[str, str], runs: Sequence[Run]) -> list[str]:
    """Keys of the blocks that hold the runs."""
    return list(dict.fromkeys(held[run.id] for run in runs))


def _block(
    entry: dict[str, Any], runs: Sequence[Run], cell: StudySpec, program: Any, needs: Mapping[str, Any], route: Route
) -> dict[str, Any]:
    ids = [run.id for run in runs]
    steps = program.updates(cell, entry["name"])
    return {
        "key": hashlib.sha256(json.dumps([entry["key"], ids]).encode()).hexdigest()[:12],
        "runs": ids,
        "replicates": [run.replicate for run in runs],
        "stage": entry["name"],
        "needs": dict(needs),
        "steps": steps,
        "member_steps": steps * max(len(runs), ALONE),
        "route": route,
        "stages": [entry],
        "settings": cell.model_dump(mode="json"),
        "plans": [],  # nothing to cut when one run fails
    }


def needs_of(block: Mapping[str, Any]) -> set[str]:
    """Keys of the blocks that have to be done before this one."""
    return {key for keys in block.get("needs", {}).values() for key in keys}


def summary(plan: Mapping[str, Any]) -> list[str]:
    """What a dry run says of a staged plan."""
    counts: dict[str, tuple[int, int]] = {}
    for block in plan["blocks"]:
        runs, units = counts.get(block["stage"], (0, 0))
        counts[block["stage"]] = runs + len(block["runs"]), units + block["member_steps"]
    parts = [f"{stage}: {runs} runs, {units} units of work" for stage, (runs, units) in counts.items()]
    return [f"{len(plan['blocks'])} blocks; " + "; ".join(parts)]


@dataclass
class Bench:
    """What a stage is given: its cell and runs, what the stages before it have made, and where its own work goes."""

    cell: Any
    block: dict[str, Any]
    directory: RunDirectory
    writer: BlockWriter
    claim: Claim
    tick: Callable[[int], None]
    stop: Callable[[], bool]
    saved: tuple[Any, int] | None = None
    recorder: Recorder = field(default_factory=Recorder)

    @property
    def stage(self) -> str:
        return str(self.block["stage"])

    @property
    def runs(self) -> list[str]:
        """Ids of the runs of this block."""
        return list(self.block["runs"])

    @property
    def replicates(self) -> list[int]:
        return list(self.block["replicates"])

    def inputs(self, stage: str, name: str) -> list[dict[str, np.ndarray]]:
        """The artifact ``name`` of every block of an earlier stage."""
        return [read_artifact(self._folder(key) / name) for key in self.block["needs"][stage]]

    def input(self, stage: str, name: str) -> dict[str, np.ndarray]:
        """The artifact ``name`` of an earlier stage that is one block."""
        return self.inputs(stage, name)[0]

    def _folder(self, key: str) -> Path:
        return self.directory.block_folder(key) / "artifacts"

    def of(self, stage: str) -> Bench:
        """What the one block of an earlier stage was given, to read what that one read."""
        key = self.block["needs"][stage][0]
        block = next(b for b in self.directory.read_json("plan.json")["blocks"] if b["key"] == key)
        return replace(self, block=block)

    def path(self, name: str) -> Path:
        """Where a file of this block goes that is written piece by piece."""
        return self.directory.block_folder(self.block["key"]) / "artifacts" / name

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write ``artifacts/name``, an .npz."""
        self.writer.artifact(name, arrays)

    def rows(self, columns: Mapping[str, Any]) -> None:
        """Rows of the one run of this block; ``columns`` hold ``step``."""
        n = len(columns["step"])
        self.writer.rows({"run": self.runs[:1] * n, "attempt": [0] * n, **columns})

    def workload(self, cell: Any) -> Workload:
        """Data and model, for a cell that may differ from the block's own."""
        return workload(cell)

    def parts(self, cell: Any) -> Parts:
        """Everything an engine needs, for a cell that may differ from the block's own."""
        return build_parts(cell, self.block["route"])

    def engine(self, parts: Parts, lr: float, steps: int) -> Engine:
        """The engine of this block's runs, where its last checkpoint has left it."""
        runs = tuple(
            RunPlan(run, replicate, steps, lr, anchor=(steps - 1) % (parts.evaluate_every or steps))
            for run, replicate in zip(self.runs, self.replicates, strict=True)
        )
        plan = BlockPlan(self.block["key"], 0, self.block["route"], runs, share_prefix=False)
        state, step = None, 0
        if self.saved is not None:
            held, step = self.saved
            state = State.from_state_dict(held["state"])
            self.recorder.clock_s, self.recorder.diverged = held["wall_s"], dict(held["diverged"])
        return Lockstep(plan, parts, state, step, self.recorder)  # type: ignore[arg-type]

    def held(self) -> Tree:
        """What the checkpoint holds beside the engine's state; empty at the start."""
        return self.saved[0]["own"] if self.saved is not None else {}

    def train(
        self,
        engine: Engine,
        after: Callable[[Progress], None] = lambda progress: None,
        own: Callable[[], Tree] = dict,
    ) -> None:
        """Run the engine to its end, calling ``after`` each update; ``own`` gives what a checkpoint has to hold too."""
        due = time.monotonic() + self.cell.checkpoint_s
        for progress in engine.run():
            self.tick(max(progress.member_steps, ALONE))
            after(progress)
            stopping = self.stop()
            if stopping or time.monotonic() >= due:
                self.claim.check()
                self.flush()
                held = {"state": engine.state.state_dict(), "wall_s": self.recorder.now(), "own": own()}
                self.writer.checkpoint({**held, "diverged": dict(self.recorder.diverged)}, engine.step)
                due = time.monotonic() + self.cell.checkpoint_s
            elif len(self.recorder) >= ROWS_HELD:
                self.flush()
                self.writer.spill()
            if stopping:
                raise Interrupted
        self.flush()

    def flush(self) -> None:
        """Hand what was recorded to the store."""
        if isinstance(self.recorder, ReducingRecorder) and (moments := self.recorder.take()):
            self.writer.artifact(moments_file(moments), moments)
        columns, _ = self.recorder.flush()
        if columns:
            self.writer.rows(columns)

    def checkpoint(self, held: Tree, step: int) -> None:
        """Write what is buffered and a checkpoint of a stage that has no engine; it comes back as :attr:`saved`."""
        self.claim.check()
        self.writer.checkpoint(held, step)

    def advance(self, steps: int = 1) -> None:
        """Progress of a stage that has no engine; raises where it is to stop."""
        self.tick(steps * ALONE)
        if self.stop():
            raise Interrupted


def read_artifact(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz; :class:`StudyError` where it is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file) as held:
            return dict(held)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise StudyError(f"{path} cannot be read ({error}); delete its block to compute it again") from None


def run_stage(
    program: Any,
    cell: Any,
    block: dict[str, Any],
    directory: RunDirectory,
    writer: BlockWriter,
    claim: Claim,
    tick: Callable[[int], None],
    stop: Callable[[], bool],
) -> str:
    """``done`` or ``interrupted``."""
    bench = Bench(cell, block, directory, writer, claim, tick, stop, writer.resume())
    try:
        status = program.run_stage(bench)
    except Interrupted:
        return "interrupted"
    claim.check()
    steps = int(block["steps"])
    rows = []
    for run in bench.runs:
        at = (status or {}).get(run, bench.recorder.diverged.get(run))
        row: dict[str, Any] = {"run": run, "status": "done", "steps": steps, "message": ""}
        if at is not None:
            row |= {"status": "diverged", "message": f"non-finite loss or weights from step {at} on"}
            row["diverged_step"] = at
        rows.append(row)
    writer.finish(rows)
    return "done"
