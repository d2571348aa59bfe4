"""Which training samples a step sees: a pure function of (seed, replicate, worker, position), whatever else runs.

A sampler is made of (n, batch_size, streams) and has ``batch_size``, ``steps_per_epoch`` (how many batches the clock
counts as one epoch) and ``indices``. Workers draw from streams of their own. ``shared`` leaves the replicate out of
the key: then all replicates see the same batches in the same order, those of replicate 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.streams import Streams


class Shuffled:
    """Every epoch is a fresh permutation cut into ``n // batch_size`` batches; the incomplete last one is dropped."""

    def __init__(self, n: int, batch_size: int, streams: Streams, *, shared: bool = False) -> None:
        self.n, self.batch_size, self.streams, self.shared = n, batch_size, streams, shared
        self.steps_per_epoch = n // batch_size
        self._bank = np.empty((0, n), dtype=np.int32)  # permutations
        self._rows: dict[tuple[int, ...], int] = {}  # (replicate, worker, epoch) -> its row of the bank
        self._free: list[int] = []  # rows that hold nothing
        self._who = np.empty((0, 3), dtype=np.int64)  # replicate, worker, epoch of each member of the last call
        self._orders: np.ndarray | None = None  # their permutations [M, n], once the same members have come twice

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """``[M]`` each; ``positions`` counts the batches a worker has drawn before. int64 ``[M, B]``."""
        if self.shared:
            replicates = np.zeros_like(replicates)
        epoch, batch = np.divmod(positions, self.steps_per_epoch)
        who = np.stack([replicates, workers, epoch], axis=1)
        again = np.array_equal(who, self._who)
        if not again:
            self._who, self._orders = who, None
        elif self._orders is None:
            self._orders = self._bank[self._draw(who)]
        if self._orders is not None:
            if (batch == batch[0]).all():  # the usual case: all members at the same place
                first = int(batch[0]) * self.batch_size
                return self._orders[:, first : first + self.batch_size].astype(np.int64)
            columns = (batch * self.batch_size)[:, None] + np.arange(self.batch_size)
            return np.take_along_axis(self._orders, columns, axis=1).astype(np.int64)
        columns = (batch * self.batch_size)[:, None] + np.arange(self.batch_size)
        rows = self._draw(who)  # may move the bank
        return self._bank[rows[:, None], columns].astype(np.int64)

    def _draw(self, who: np.ndarray) -> np.ndarray:
        """The rows of the bank that hold the order of every (replicate, worker, epoch), int64 ``[M]``; those that are
        missing are drawn together, and other epochs of the same replicates and workers make room."""
        keys = list(map(tuple, who.tolist()))
        missing = sorted({key for key in keys if key not in self._rows})
        if missing:
            replicate, worker, step = np.array(missing).T
            orders = self.streams.permutation("order", self.n, replicate=replicate, worker=worker, step=step)
            pairs, asked = {key[:2] for key in missing}, set(keys)
            for old in [key for key in self._rows if key[:2] in pairs and key not in asked]:
                self._free.append(self._rows.pop(old))
            if (more := len(missing) - len(self._free)) > 0:
                size = len(self._bank)
                more = max(more, size)
                self._bank = np.concatenate([self._bank, np.empty((more, self.n), dtype=np.int32)])
                self._free += range(size, size + more)
            for key, order in zip(missing, orders, strict=True):
                self._rows[key] = self._free.pop()
                self._bank[self._rows[key]] = order
        return np.array([self._rows[key] for key in keys], dtype=np.int64)


class WithReplacement:
    """Independent uniform draws; an epoch is ``n // batch_size`` batches, which need not meet every sample."""

    def __init__(self, n: int, batch_size: int, streams: Streams, *, shared: bool = False) -> None:
        self.n, self.batch_size, self.streams, self.shared = n, batch_size, streams, shared
        self.steps_per_epoch = n // batch_size

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """As :meth:`Shuffled.indices`."""
        if self.shared:
            replicates = np.zeros_like(replicates)
        return self.streams.integers(
            "order", self.n, self.batch_size, replicate=replicates, worker=workers, step=positions
        )


class FullBatch:
    """All samples in their order, at every step and for every worker; an epoch is one step. Draws nothing."""

    def __init__(self, n: int, batch_size: int, streams: Streams) -> None:
        self.n = self.batch_size = n
        self.steps_per_epoch = 1

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """As :meth:`Shuffled.indices`, int64 ``[M, n]``."""
        return np.tile(np.arange(self.n), (len(replicates), 1))


def checked_sampler(name: str, made: Any, n: int) -> Any:
    """A third party's sampler, tried on one draw; UserError for one that does not do what a sampler does."""
    for attribute in ("batch_size", "steps_per_epoch"):
        value = getattr(made, attribute, None)
        if not isinstance(value, int) or value < 1:
            expected = f"an object whose {attribute} is an integer of at least 1, not {value!r}"
            raise UserError("sampler", name, expected)
    if not callable(getattr(made, "indices", None)):
        raise UserError("sampler", name, "an object with indices(replicates, workers, positions)")
    two = np.arange(2)
    drawn = np.asarray(made.indices(two, 0 * two, 0 * two))
    if drawn.shape != (2, made.batch_size) or drawn.dtype.kind not in "iu":
        expected = f"indices of shape [members, {made.batch_size}], integers, not {drawn.dtype} {list(drawn.shape)}"
        raise UserError("sampler", name, expected)
    if drawn.min() < 0 or drawn.max() >= n:
        raise UserError("sampler", name, f"indices from 0 to {n - 1}, not {drawn.min()} to {drawn.max()}")
    return made


class CountedEpochs:
    """The same batches, of which another number counts as an epoch; data passes go on across such epochs."""

    def __init__(self, inner: Any, steps_per_epoch: int) -> None:
        self.inner, self.steps_per_epoch = inner, steps_per_epoch
        self.batch_size = int(inner.batch_size)

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """As :meth:`Shuffled.indices`."""
        return self.inner.indices(replicates, workers, positions)


def with_epochs(sampler: Any, steps: int | None, samples: int | None) -> Any:
    """The sampler with epochs of so many ``steps``, or of ``samples`` // batch_size; itself where both are None."""
    if steps is None and samples is None:
        return sampler
    return CountedEpochs(sampler, steps or max(1, (samples or 0) // sampler.batch_size))
