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
        self._who = np.empty((0, 3), dtype=np.int64)  # replicate, worker, epoch of each member of the last call
        self._orders: np.ndarray | None = None  # their permutations [M, n], once the same members have come twice

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """``[M]`` each; ``positions`` counts the batches a worker has drawn before. int64 ``[M, B]``."""
        epoch, batch = np.divmod(positions, self.steps_per_epoch)
        who = np.stack([replicates, workers, epoch], axis=1)
        again = np.array_equal(who, self._who)
        if not again:
            self._who, self._orders = who, None
        elif self._orders is None:
            self._orders = np.stack([self._order(*row) for row in who.tolist()])
        if self._orders is not None:
            columns = (batch * self.batch_size)[:, None] + np.arange(self.batch_size)
            return np.take_along_axis(self._orders, columns, axis=1).astype(np.int64)
        out = np.empty((len(replicates), self.batch_size), dtype=np.int64)
        for m, (row, b) in enumerate(zip(who.tolist(), batch.tolist(), strict=True)):
            out[m] = self._order(*row)[b * self.batch_size : (b + 1) * self.batch_size]
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
