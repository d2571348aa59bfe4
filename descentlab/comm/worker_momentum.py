"""Momentum on the workers: each sends its own velocity instead of its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.protocols import Compressor, Exchange
from ..core.streams import Streams
from ..core.tree import Tree, tree_map


class WorkerMomentum:
    """v_w = momentum v_w + g_w; what travels, through the compressor ``inner``, is v_w.

    With one worker and no compression this is heavy-ball momentum of torch's SGD; with stale gradients no worker's
    velocity is fed by another's (the correction of arXiv 1712.01887, section 3, without its masks).
    """

    whole = False  # whatever the inner compressor is, a velocity is not the gradient

    def __init__(self, inner: Compressor, momentum: float) -> None:
        self.inner, self.momentum = inner, momentum

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not made yet, as while it is copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    def start(self, params: Tree, workers: int, streams: Streams, replicates: np.ndarray) -> tuple[Tree, Tree]:
        """Velocities of zero ``[M, W, …]`` beside the memory of the inner compressor."""
        memory, shared = self.inner.start(params, workers, streams, replicates)
        zeros = tree_map(lambda p: p.new_zeros((p.shape[0], workers, *p.shape[1:])), params)
        return {"velocity": zeros, "inner": memory}, shared

    def exchange(self, grads: Tree, memory: Tree, shared: Tree) -> Exchange:
        """See :class:`~descentlab.core.protocols.Compressor`."""
        velocity = {n: self.momentum * memory["velocity"][n] + g for n, g in grads.items()}
        mean, inner, shared = yield from self.inner.exchange(velocity, memory["inner"], shared)
        return mean, {"velocity": velocity, "inner": inner}, shared

    def resize(self, shared: Tree, rank: int, streams: Streams) -> Tree:
        """As the inner compressor."""
        return self.inner.resize(shared, rank, streams)
