"""Workers on a virtual clock: a timeline says which version of the weights each gradient is taken at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch

from ..core.protocols import Tick, Timeline
from ..core.state import State
from ..core.tree import Tree, tree_map
from .driver import Engine, Round


@final
@dataclass
class Virtual(Engine):
    """W workers per member with exact staleness; the table of updates is computed before the first one.

    The last S versions of the parameters, S = largest staleness + 1, are kept in ``state.worker["ring"]`` (name ->
    ``[M, S, …]``, version v in place v mod S), so whatever copies, forks or stores a state carries them along.

    A planned perturbation of worker w at update t is realised while w computes the gradient that update t applies.
    A plan in which w does not contribute to update t is refused (``cluster.timeline.place`` moves it to the next turn).
    """

    timeline: Timeline = field(kw_only=True)

    def __post_init__(self) -> None:
        self._table = self._ticks()
        lags = (lag for ticks in self._table.values() for t, tick in enumerate(ticks) for lag in tick.staleness(t))
        self.versions_kept = 1 + max(lags, default=0)
        super().__post_init__()

    def _ticks(self) -> dict[int, Sequence[Tick]]:
        """Every replicate's table up to its last step; ValueError if a perturbation falls between turns."""
        table: dict[int, Sequence[Tick]] = {}
        for replicate in sorted({run.replicate for run in self.plan.runs}):
            stop = max(run.stop for run in self.plan.runs if run.replicate == replicate)
            table[replicate] = self.timeline.ticks(self.parts.workers, stop, self.parts.streams, replicate)
            _check(table[replicate], self.parts.workers)
        for run in self.plan.runs:
            for p in run.planned:
                if p.on_server or p.step >= run.stop:
                    continue
                if p.worker not in table[run.replicate][p.step].workers:
                    raise ValueError(f"run {run.id}: worker {p.worker} does not contribute to update {p.step}")
        return table

    def initial_state(self) -> State:
        state = super().initial_state()
        s = self.versions_kept
        state.worker["ring"] = tree_map(lambda p: p.unsqueeze(1).repeat(1, s, *[1] * (p.dim() - 1)), state.params)
        return state

    def round(self) -> Round:
        ticks = [self._table[slot.replicate][self.step] for slot in self.slots]
        if len({len(tick.workers) for tick in ticks}) > 1:
            raise ValueError(f"update {self.step}: replicates differ in the number of contributing workers")
        return Round(
            np.array([tick.workers for tick in ticks], dtype=np.int64),
            np.array([tick.versions for tick in ticks], dtype=np.int64),
            np.array([tick.time_s for tick in ticks]),
        )

    def view(self, versions: np.ndarray) -> Tree:
        if (versions == self.step).all():
            return self.state.params
        rows, place = torch.arange(len(versions)), torch.from_numpy(versions % self.versions_kept)
        return tree_map(lambda ring: ring[rows, place], self.state.worker["ring"])

    def after_update(self) -> None:
        self._store(self.step + 1)

    def on_change(self) -> None:
        self._store(self.step)

    def _store(self, version: int) -> None:
        place = version % self.versions_kept
        for name, ring in self.state.worker["ring"].items():
            ring[:, place] = self.state.params[name]


def _check(ticks: Sequence[Tick], workers: int) -> None:
    """ValueError for a table no run could have: a worker that is absent or comes twice, a version from the future."""
    for t, tick in enumerate(ticks):
        if not tick.workers or len(tick.workers) != len(tick.versions) or len(set(tick.workers)) != len(tick.workers):
            raise ValueError(f"update {t}: workers {tick.workers} with versions {tick.versions}")
        if not all(0 <= w < workers for w in tick.workers):
            raise ValueError(f"update {t}: workers {tick.workers}, but there are {workers}")
        if not all(0 <= v <= t for v in tick.versions):
            raise ValueError(f"update {t}: versions {tick.versions}, expected 0 to {t}")
