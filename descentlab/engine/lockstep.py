"""All members and all workers move together: every gradient is taken at the current weights."""

from __future__ import annotations

from typing import final

import numpy as np

from ..core.tree import Tree
from .driver import Engine, Round


@final
class Lockstep(Engine):
    """Barrier semantics; the clock moves only where a link is simulated. With one worker, plain (ensemble) training."""

    def round(self) -> Round:
        members, workers = len(self.slots), self.parts.workers
        one = workers == 1
        everyone = np.zeros((members, 1), dtype=np.int64) if one else np.tile(np.arange(workers), (members, 1))
        ended = np.full(members, (self.step + 1) * self.parts.compute_s)
        return Round(everyone, np.full_like(everyone, self.step), ended)

    def view(self, versions: np.ndarray) -> Tree:
        return self.state.params
