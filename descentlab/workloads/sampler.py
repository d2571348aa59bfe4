"""Which training samples a step sees: a pure function of (seed, replicate, worker, position), whatever else runs."""

from __future__ import annotations

import numpy as np

from ..core.streams import Streams


class Shuffled:
    """Every epoch is a fresh permutation cut into batches; the incomplete last batch is dropped."""

    def __init__(self, n: int, batch_size: int, streams: Streams) -> None:
        self.n, self.batch_size, self.streams = n, batch_size, streams
        self.steps_per_epoch = n // batch_size
        self._cache: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """``[M]`` each; ``positions`` counts the batches a worker has drawn before. int64 ``[M, B]``."""
        out = np.empty((len(replicates), self.batch_size), dtype=np.int64)
        for m, (r, w, p) in enumerate(zip(replicates.tolist(), workers.tolist(), positions.tolist(), strict=True)):
            epoch, batch = divmod(p, self.steps_per_epoch)
            a = batch * self.batch_size
            out[m] = self._order(r, w, epoch)[a : a + self.batch_size]
        return out

    def _order(self, replicate: int, worker: int, epoch: int) -> np.ndarray:
        held = self._cache.get((replicate, worker))
        if held is None or held[0] != epoch:
            order = self.streams.permutation("order", self.n, replicate=replicate, worker=worker, step=epoch)
            held = (epoch, order.astype(np.int32))
            self._cache[replicate, worker] = held
        return held[1]


class WithReplacement:
    """Independent uniform draws, ``n // batch_size`` batches to an epoch."""

    def __init__(self, n: int, batch_size: int, streams: Streams) -> None:
        self.n, self.batch_size, self.streams = n, batch_size, streams
        self.steps_per_epoch = n // batch_size

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """As :meth:`Shuffled.indices`."""
        return self.streams.integers(
            "order", self.n, self.batch_size, replicate=replicates, worker=workers, step=positions
        )
