"""Which training samples a step sees: a pure function of (seed, replicate, worker, position), whatever else runs."""

from __future__ import annotations

import numpy as np

from ..core.streams import Streams


class Shuffled:
    """Every epoch is a fresh permutation cut into batches; the incomplete last batch is dropped."""

    def __init__(self, n: int, batch_size: int, streams: Streams) -> None:
        self.n, self.batch_size, self.streams = n, batch_size, streams
        self.steps_per_epoch = n // batch_size
        self._cache: dict[tuple[int, int, int], np.ndarray] = {}  # (replicate, worker, epoch) -> int32 [n]
        self._who = np.empty((0, 3), dtype=np.int64)  # replicate, worker, epoch of each member of the last call
        self._orders: np.ndarray | None = None  # their permutations [M, n], once the same members have come twice

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """``[M]`` each; ``positions`` counts the batches a worker has drawn before. int64 ``[M, B]``."""
        epoch, batch = np.divmod(positions, self.steps_per_epoch)
        who = np.stack([replicates, workers, epoch], axis=1)
        again = np.array_equal(who, self._who)
        if not again:
            self._who, self._orders = who, None
            self._draw(who)
        elif self._orders is None:
            self._draw(who)
            self._orders = np.stack([self._cache[key] for key in map(tuple, who.tolist())])
        if self._orders is not None:
            columns = (batch * self.batch_size)[:, None] + np.arange(self.batch_size)
            return np.take_along_axis(self._orders, columns, axis=1).astype(np.int64)
        out = np.empty((len(replicates), self.batch_size), dtype=np.int64)
        for m, (key, b) in enumerate(zip(map(tuple, who.tolist()), batch.tolist(), strict=True)):
            out[m] = self._cache[key][b * self.batch_size : (b + 1) * self.batch_size]
        return out

    def _draw(self, who: np.ndarray) -> None:
        """Hold the order of every (replicate, worker, epoch); those that are missing are drawn together, and other
        epochs of the same replicates and workers are dropped."""
        asked = set(map(tuple, who.tolist()))
        missing = sorted(asked - self._cache.keys())
        if missing:
            replicate, worker, step = np.array(missing).T
            orders = self.streams.permutation("order", self.n, replicate=replicate, worker=worker, step=step)
            pairs = {(r, w) for r, w, _ in missing}
            self._cache = {k: v for k, v in self._cache.items() if k[:2] not in pairs or k in asked}
            self._cache.update(zip(missing, orders.astype(np.int32), strict=True))


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
