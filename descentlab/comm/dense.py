"""No compression: every gradient travels whole."""

from __future__ import annotations

import numpy as np

from ..core.protocols import Exchange, Mean
from ..core.streams import Streams
from ..core.tree import Tree


class Dense:
    """g = mean over workers of g_w (the :class:`~descentlab.core.protocols.Compressor` protocol)."""

    def start(self, params: Tree, workers: int, streams: Streams, replicates: np.ndarray) -> tuple[Tree, Tree]:
        return {}, {}

    def exchange(self, grads: Tree, memory: Tree, shared: Tree) -> Exchange:
        mean = {}
        for name, g in grads.items():
            mean[name] = yield Mean(g)
        return mean, memory, shared

    def resize(self, shared: Tree, rank: int, streams: Streams) -> Tree:
        return shared
