"""Workers on a virtual clock: a timeline says which version of the weights each gradient is taken at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from torch import Tensor

from ..core.flat import joined, split
from ..core.protocols import Tick, Timeline
from ..core.state import State
from ..core.tree import Tree, tree_map
from .driver import Engine, Round
from .lateness import lateness


@dataclass(frozen=True)
class Table:
    """The updates of several replicates: workers and versions ``[R, T, K]`` (-1 where an update has fewer than K
    contributions), times ``[R, T]``, and which row each replicate has."""

    rows: dict[int, int]
    workers: np.ndarray
    versions: np.ndarray
    time_s: np.ndarray
    counts: np.ndarray  # contributions of each update, [R, T]

    @classmethod
    def of(cls, ticks: dict[int, Sequence[Tick]]) -> Table:
        """From one sequence of ticks per replicate; shorter ones are filled up."""
        steps = max(map(len, ticks.values()), default=0)
        most = max((len(tick.workers) for table in ticks.values() for tick in table), default=1)
        workers = np.full((len(ticks), steps, most), -1, dtype=np.int32)
        versions, time_s = workers.copy(), np.zeros((len(ticks), steps))
        counts = np.zeros((len(ticks), steps), dtype=np.int32)
        for row, table in enumerate(ticks.values()):
            for t, tick in enumerate(table):
                n = counts[row, t] = len(tick.workers)
                workers[row, t, :n], versions[row, t, :n], time_s[row, t] = tick.workers, tick.versions, tick.time_s
        return cls({replicate: i for i, replicate in enumerate(ticks)}, workers, versions, time_s, counts)

    def largest_staleness(self) -> int:
        """Updates since the weights of any contribution were read, at most."""
        steps = np.arange(self.versions.shape[1])[None, :, None]
        return int(np.where(self.versions >= 0, steps - self.versions, 0).max(initial=0))


@final
@dataclass
class Virtual(Engine):
    """W workers per member with exact staleness; the table of updates is computed before the first one.

    The last S versions of the parameters, S = largest staleness + 1, are kept in ``state.worker["ring"]``: all weights
    of a member side by side, ``[M, S, P]`` for each type of number, version v in place v mod S. So whatever copies,
    forks or stores a state carries them along. Where nothing is ever stale there is no ring.

    A planned perturbation of worker w at update t is realised while w computes the gradient that update t applies.
    A plan in which w does not contribute to update t is refused (``cluster.timeline.place`` moves it to the next turn).
    """

    timeline: Timeline = field(kw_only=True)
    _seen: tuple[bytes, Tree] = field(default=(b"", {}), init=False)

    def __post_init__(self) -> None:
        self._table = Table.of(self._ticks())
        self.versions_kept = 1 + self._table.largest_staleness()
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
        if self.versions_kept > 1:
            own = {str(kind): joined(of) for kind, of in _by_type(state.params).items()}
            state.worker["ring"] = tree_map(lambda p: p.unsqueeze(1).repeat(1, self.versions_kept, 1), own)
        return state

    def round(self) -> Round:
        self._seen = b"", {}
        table, rows = self._table, [self._table.rows[replicate] for replicate in self.replicates.tolist()]
        counts = table.counts[rows, self.step]
        if (counts != counts[0]).any():
            raise ValueError(f"update {self.step}: replicates differ in the number of contributing workers")
        k = int(counts[0])
        workers, versions = (a[rows, self.step, :k].astype(np.int64) for a in (table.workers, table.versions))
        return Round(workers, versions, table.time_s[rows, self.step])

    def view(self, versions: np.ndarray) -> Tree:
        if (versions == self.step).all():
            return self.state.params
        place = versions % self.versions_kept
        asked = place.tobytes()
        if self._seen[0] != asked:  # the same one several times in one update: to compute, to measure, for a rule
            same, at = bool((place == place[0]).all()), torch.from_numpy(place)
            found: Tree = {}
            for kind, of in _by_type(self.state.params).items():
                ring = self.state.worker["ring"][str(kind)]
                found.update(split(ring[:, place[0]] if same else ring[torch.arange(len(at)), at], of))
            self._seen = asked, {name: found[name] for name in self.state.params}
        return self._seen[1]

    def lateness(self, now: Round) -> dict[str, Tensor]:
        """See :func:`~descentlab.engine.lateness.lateness`."""
        return lateness(self, now)

    def after_update(self) -> None:
        self._store(self.step + 1)

    def on_change(self) -> None:
        self._store(self.step)

    def _store(self, version: int) -> None:
        if "ring" not in self.state.worker:
            return
        place = version % self.versions_kept
        for kind, of in _by_type(self.state.params).items():
            self.state.worker["ring"][str(kind)][:, place] = joined(of)


def _by_type(params: Tree) -> dict[torch.dtype, Tree]:
    """The parameters of each type of number, in their order."""
    found: dict[torch.dtype, Tree] = {}
    for name, p in params.items():
        found.setdefault(p.dtype, {})[name] = p
    return found


def _check(ticks: Sequence[Tick], workers: int) -> None:
    """ValueError for a table no run could have: a worker that is absent or comes twice, a version from the future."""
    for t, tick in enumerate(ticks):
        if not tick.workers or len(tick.workers) != len(tick.versions) or len(set(tick.workers)) != len(tick.workers):
            raise ValueError(f"update {t}: workers {tick.workers} with versions {tick.versions}")
        if not all(0 <= w < workers for w in tick.workers):
            raise ValueError(f"update {t}: workers {tick.workers}, but there are {workers}")
        if not all(0 <= v <= t for v in tick.versions):
            raise ValueError(f"update {t}: versions {tick.versions}, expected 0 to {t}")
