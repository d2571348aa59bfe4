"""Builds the parameter server of a cell: its workers, who waits for whom, its log, and where incidents are told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..config.tree import StudySpec
from ..core.errors import UserError
from ..core.native import enable, enabled
from ..core.network import address_of
from ..core.protocols import Delay
from ..core.state import State
from ..engine.crew import Limits
from ..engine.journal import Journal
from ..engine.local import LocalProcesses
from ..engine.parts import Parts
from ..engine.process import ParameterServer
from ..engine.recorder import Recorder
from ..engine.specs import ProcessEngine
from ..engine.transport import Hub
from ..store import RunDirectory
from .build import build_parts
from .plan import Block

TIMELINE = "timeline.jsonl"  # in the block's folder: the log of updates


def settings_of(cell: Any) -> ProcessEngine:
    """The engine's settings; of a study that says only ``engine=process``, the defaults."""
    return cell.engine if isinstance(cell.engine, ProcessEngine) else ProcessEngine()


def check_process(cell: Any) -> None:
    """What the settings of one cell ask of this machine, said before anything runs.

    Raises:
        UserError: for one worker where workers wait for each other, an interface that does not exist, an engine's
            package that is not installed.
    """
    if cell.timeline.name != "asynchronous" and cell.workers < 2:
        raise UserError("workers", cell.workers, f"at least 2 beside timeline = {cell.timeline.name}")
    engine = settings_of(cell)
    address_of(engine.interface, "engine.interface")
    if engine.transport == "ray":
        from ..engine.ray_actors import check_installed

        check_installed("engine.transport")


def _waiting(cell: Any) -> tuple[int, int | None]:
    """(gradients per update, how far a worker may be ahead of the slowest) of a timeline."""
    name, workers = cell.timeline.name, cell.workers
    if name == "softsync":
        return max(1, workers // cell.timeline.splits), None
    return (workers if name == "barrier" else 1), (cell.timeline.bound if name == "bounded" else None)


def _delay(cell: Any) -> Delay | None:
    """The law by which workers sleep: the study's own, or the timeline's."""
    law = cell.delay if hasattr(cell, "delay") else getattr(cell.timeline, "delay", None)
    if law is not None:
        return law.build()
    seconds = getattr(cell.timeline, "delay_s", 0.0)
    if not seconds:
        return None
    from ..cluster.timeline import GaussianDelay

    return GaussianDelay(seconds)


def worker_parts(use_compiled: bool, cell: StudySpec, *arguments: Any) -> Parts:
    """The parts in a worker process, computed as plan.json says: compiled or not."""
    enable(use_compiled)
    return build_parts(cell, *arguments)


def _hub(engine: ProcessEngine) -> Hub:
    if engine.transport == "ray":
        from ..engine.ray_actors import RayActors

        return RayActors()
    address = address_of(engine.interface, "engine.interface")
    return LocalProcesses(engine.timeout_s, address, engine.port, engine.memory)


def parameter_server(
    block: Block,
    cell: Any,
    parts: Parts,
    variants: Sequence[StudySpec],
    state: State | None,
    step: int,
    recorder: Recorder,
    folder: Path | None,
) -> ParameterServer:
    """The server of a block's one run; ``folder``: the block's, where it keeps its log (None: nowhere)."""
    engine, (quorum, bound) = settings_of(cell), _waiting(cell)
    return ParameterServer(
        block.plan,
        parts,
        state,  # type: ignore[arg-type]
        step,
        recorder,
        build=partial(worker_parts, enabled(), cell, block.plan.route, tuple(variants), block.update),
        hub=_hub(engine),
        limits=Limits(engine.timeout_s, engine.start_timeout_s, engine.restarts),
        quorum=quorum,
        bound=bound,
        delay=_delay(cell),
        journal=Journal(folder / TIMELINE) if folder is not None else None,
        note=_teller(folder, block.key),
    )


def _teller(folder: Path | None, key: str) -> Callable[[str, str], None]:
    """Incidents go to the block's log (standard error) and, one line each, to events.jsonl."""

    def note(kind: str, text: str) -> None:
        print(f"{kind}: {text}", file=sys.stderr)
        if folder is not None:
            RunDirectory.open(folder.parent.parent).event(kind, text.splitlines()[0], block=key)

    return note
