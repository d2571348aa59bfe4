"""The largest elements of every gradient, with error feedback (Lin et al., arXiv 1712.01887, without its momentum)."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from ..core.protocols import Exchange, Gather, Ranks
from ..core.streams import Streams
from ..core.tree import Tree
from .packed import pack, unpack


@final
class TopK:
    """Every worker sends the ``fraction`` of each tensor's elements that are largest in size, at least one, and where
    they are (four bytes each); the others stay with it. All workers' messages go to all workers.

    ``a = g + e``, ``sent = a`` at its k largest elements, else 0, ``e = a - sent``. Worker memory: name ->
    ``[M, W, …]``. An element that is not finite counts as large, so a NaN travels.
    """

    def __init__(self, fraction: float) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction = {fraction}: expected above 0, at most 1")
        self.fraction = fraction

    def count(self, n: int) -> int:
        """How many of ``n`` elements are sent."""
        return max(1, round(self.fraction * n))

    def start(self, params: Tree, workers: int, streams: Streams, replicates: np.ndarray) -> tuple[Tree, Tree]:
        return {k: p.new_zeros(p.shape[0], workers, *p.shape[1:]) for k, p in params.items()}, {}

    def exchange(self, grads: Tree, memory: Tree, shared: Tree) -> Exchange:
        owed = {name: (g + memory[name]).flatten(2) for name, g in grads.items()}
        where = {n: _sizes(a).topk(self.count(a.shape[2]), dim=2, sorted=False).indices for n, a in owed.items()}
        values = torch.cat([owed[name].gather(2, at) for name, at in where.items()], dim=2)
        places = torch.cat(list(where.values()), dim=2).to(torch.int32)
        message = yield Gather(pack([values, places]))
        n = values.shape[2]
        all_values, all_places = unpack(message, [(n, values.dtype), (n, torch.int32)])
        mean, residual, first = {}, {}, 0
        for name, g in grads.items():
            own = slice(first, first + where[name].shape[2])
            summed = torch.zeros(g.shape[0], owed[name].shape[2], dtype=g.dtype, device=g.device)
            for w in range(message.shape[1]):  # in the order of the workers, so that rounding is the same everywhere
                summed.scatter_add_(1, all_places[:, w, own].long(), all_values[:, w, own])
            mean[name] = (summed / message.shape[1]).view(g.shape[0], *g.shape[2:])
            residual[name] = owed[name].scatter(2, where[name], 0.0).view_as(g)
            first = own.stop
        return mean, residual, shared

    def resize(self, shared: Tree, rank: Ranks, streams: Streams) -> Tree:
        return shared


def _sizes(a: Tensor) -> Tensor:
    return a.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
