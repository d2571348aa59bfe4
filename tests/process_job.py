"""A parameter server as a program of its own, to be killed: process_job.py FOLDER WORKERS."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from saboteur import Saboteur
from small import builder, plan_of, quadratic

from descentlab.engine.crew import Limits
from descentlab.engine.journal import Journal
from descentlab.engine.local import LocalProcesses
from descentlab.engine.process import ParameterServer
from descentlab.optim.specs import Adam
from descentlab.studies.crossed.spec import CrossedSpec

STEPS, TIMEOUT_S = 60, 2.0


def cell_of(workers: int) -> CrossedSpec:
    return quadratic(workers=workers, optimizer=Adam(lr=0.01))


def make_server(
    folder: Path,
    workers: int,
    mischief: Sequence[tuple[str, int]],
    *,
    note: Callable[[str, str], Any] = lambda kind, text: None,
    memory: Any = "auto",
    port: int = 0,
    restarts: int = 10,
) -> ParameterServer:
    """60 updates of a quadratic, float64, Adam; logged in ``folder``."""
    cell = cell_of(workers)
    build = builder(cell)
    return ParameterServer(
        plan_of(cell, STEPS, replicates=[0]),
        build(),
        build=build,
        hub=LocalProcesses(TIMEOUT_S, port=port, memory=memory),
        limits=Limits(TIMEOUT_S, 100.0, restarts),
        journal=Journal(folder / "log"),
        note=note,
        worker=partial(Saboteur, folder=str(folder), mischief=tuple(mischief)),
    )


if __name__ == "__main__":
    for _ in make_server(Path(sys.argv[1]), int(sys.argv[2]), ()).run():
        pass
