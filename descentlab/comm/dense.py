"""No compression: every gradient travels whole."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ..core.protocols import Exchange, Means, Ranks
from ..core.streams import Streams
from ..core.tree import Tree


class Dense:
    """g = mean over workers of g_w (the :class:`~descentlab.core.protocols.Compressor` protocol), in one message."""

    whole = True  # one worker's gradient comes out as it went in

    def start(self, params: Tree, workers: int, streams: Streams, replicates: np.ndarray) -> tuple[Tree, Tree]:
        return {}, {}

    def exchange(self, grads: Tree, memory: Tree, shared: Tree) -> Exchange:
        means = yield Means(tuple(grads.values()))
        return dict(zip(grads, means, strict=True)), memory, shared

    def resize(self, shared: Tree, rank: Ranks, streams: Streams) -> Tree:
        return shared

    def requests(self, shapes: Mapping[str, tuple[int, ...]], ranks: Ranks, element_size: int) -> list[Means]:
        """The messages of one update, as tensors without values."""
        dtype = torch.float64 if element_size == 8 else torch.float32
        return [Means(tuple(torch.empty(1, 1, *shape, dtype=dtype, device="meta") for shape in shapes.values()))]
