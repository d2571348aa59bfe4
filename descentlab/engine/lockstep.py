"""All members and all workers move together: every gradient is taken at the current weights."""

from __future__ import annotations

from typing import final

import numpy as np

from ..core.tree import Tree
from .driver import Engine, Round


@final
class Lockstep(Engine):
    """Barrier semantics without a clock; with one worker, plain (ensemble) training."""

    def round(self) -> Round:
        members, workers = len(self.slots), self.parts.workers
        everyone = np.tile(np.arange(workers), (members, 1))
        return Round(everyone, np.full_like(everyone, self.step), np.zeros(members))

    def view(self, versions: np.ndarray) -> Tree:
        return self.state.params
