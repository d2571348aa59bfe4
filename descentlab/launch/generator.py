"""Training as a generator: a program of one's own looks at the models at evaluations. Nothing is written to disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from torch import nn

from ..config.resolve import resolve
from ..config.tree import StudySpec
from ..core.errors import UserError, nearest
from ..core.state import State
from ..core.streams import Streams
from ..engine.support import DISTRIBUTED
from .block import build_engine, make_recorder
from .build import workload
from .plan import make_plan, read_block


@dataclass(frozen=True)
class Evaluation:
    """Where runs stand after an evaluation.

    ``rows``: what was recorded since the last one, a row per run and step, columns as in the table; ``step``: the last
    update made, from 0; ``runs``: those in training, also if they end here; ``state``: all tensors, members in the
    order of ``runs``, to be read only and until the next evaluation.
    """

    step: int
    rows: pl.DataFrame
    runs: list[str]
    state: State
    _replicates: list[int] = field(repr=False)
    _cell: StudySpec = field(repr=False)

    def model(self, run: str = "", *, average: bool = False) -> nn.Module:
        """A copy of a run's network (of the only one, if no run is named) at its last or averaged weights, in
        evaluation mode. It takes inputs as the engine's data hold them: pooled and resized where the model does that.

        Raises:
            UserError: for a run that is not among ``runs``, and for an average in a study without one.
        """
        if not run and len(self.runs) == 1:
            run = self.runs[0]
        if run not in self.runs:
            raise UserError("run", run, f"one of {', '.join(self.runs)}", hint=nearest(run, self.runs))
        if average and "average" not in self.state.server:
            raise UserError("average", True, "false without averaging in the study")
        trees = self.state.server["average"] if average else self.state.server
        m = self.runs.index(run)
        module = workload(self._cell).module(Streams(self._cell.seed), self._replicates[m])
        tensors = {**trees["params"], **trees["buffers"]}
        module.load_state_dict({**module.state_dict(), **{name: t[m] for name, t in tensors.items()}})
        return module.eval()


def train(study: str | Path = "training", *settings: str) -> Iterator[Evaluation]:
    """Train the runs of a study here, block after block, pausing at evaluations: ``train("training", "steps=100")``.

    Arguments as for :func:`descentlab.run`. The weights are those of ``run`` with the same settings. A consumer may
    leave the loop at any time.

    Raises:
        UserError: for a mistake in the settings, before anything is trained.
    """
    resolved = resolve(study, settings)
    plan, _ = make_plan(resolved, {})
    if any(described["engine"] == DISTRIBUTED for described in plan["blocks"]):
        raise UserError("engine", "process", "lockstep in a loop of one's own, which is one process")
    for described in plan["blocks"]:
        block = read_block(described)
        cell = resolved.study.spec.model_validate(block.settings)
        recorder = make_recorder(cell)
        engine = build_engine(block, cell, None, 0, recorder)
        for progress in engine.run():
            if recorder.evaluated:
                runs = [(run.id, slot.replicate) for slot in progress.slots for run in slot.runs]
                members = [m for m, slot in enumerate(progress.slots) for _ in slot.runs]
                state = progress.state if len(members) == len(progress.slots) else progress.state.take(members)
                rows = pl.DataFrame(recorder.flush()[0])
                yield Evaluation(progress.step - 1, rows, [r for r, _ in runs], state, [n for _, n in runs], cell)
