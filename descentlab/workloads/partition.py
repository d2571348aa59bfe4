"""Which training samples each worker has.

A partition is called with (labels ``[n]``, workers, streams, replicate) and gives one sorted array of indices per
worker. No sample is given to two workers; what is left out is only what the settings say (``truncate``). Draws depend
on the replicate, so that no result hangs on one lucky deal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from ..core.errors import UserError
from ..core.streams import Streams

Deal = Callable[[np.ndarray, int, Streams, int], list[np.ndarray]]


def by_sample(labels: np.ndarray, workers: int, streams: Streams, replicate: int) -> list[np.ndarray]:
    """A random permutation in ``workers`` consecutive parts whose sizes differ by one at most."""
    order = streams.permutation("partition", len(labels), replicate=replicate)
    return [np.sort(part) for part in np.array_split(order, workers)]


@final
@dataclass(frozen=True)
class ByLabel:
    """Labels in random order, dealt in turn, so that workers differ by one label at most.

    ``truncate``: every worker keeps as many samples as the smallest has, each of its labels in proportion.
    """

    truncate: bool = True

    def __call__(self, labels: np.ndarray, workers: int, streams: Streams, replicate: int) -> list[np.ndarray]:
        """See the module's head.

        Raises:
            UserError: for more workers than labels.
        """
        classes = np.unique(labels)
        if workers > len(classes):
            expected = f"at most {len(classes)} with partition = label, one label for each"
            raise UserError("workers", workers, expected)
        order = classes[streams.permutation("partition", len(classes), replicate=replicate)]
        own = [order[w::workers] for w in range(workers)]
        parts = [np.flatnonzero(np.isin(labels, mine)) for mine in own]
        if not self.truncate:
            return parts
        least = min(map(len, parts))
        return [self._cut(part, labels, least, streams, replicate, w) for w, part in enumerate(parts)]

    def _cut(
        self, part: np.ndarray, labels: np.ndarray, size: int, streams: Streams, replicate: int, worker: int
    ) -> np.ndarray:
        """``size`` samples of ``part``: the first in an order in which every label is spread evenly."""
        shuffled = part[streams.permutation("partition/cut", len(part), replicate=replicate, worker=worker)]
        place = np.empty(len(part))
        for label in np.unique(labels[part]):
            here = labels[shuffled] == label
            place[here] = (np.arange(here.sum()) + 0.5) / here.sum()
        return np.sort(shuffled[np.argsort(place, kind="stable")[:size]])


@final
@dataclass(frozen=True)
class Dirichlet:
    """For every label, shares of the workers ~ Dirichlet(alpha, ..., alpha); its samples, shuffled, are cut in these
    shares (as in arXiv 1909.06335 and its successors)."""

    alpha: float

    def __call__(self, labels: np.ndarray, workers: int, streams: Streams, replicate: int) -> list[np.ndarray]:
        """See the module's head."""
        parts: list[list[np.ndarray]] = [[] for _ in range(workers)]
        for i, label in enumerate(np.unique(labels)):
            here = np.flatnonzero(labels == label)
            here = here[streams.permutation("partition", len(here), replicate=replicate, step=i)]
            ends = np.cumsum(self._shares(workers, streams, replicate, i))
            cuts = np.rint(ends[:-1] * len(here)).astype(int)
            for mine, piece in zip(parts, np.split(here, cuts), strict=True):
                mine.append(piece)
        return [np.sort(np.concatenate(mine)) for mine in parts]

    def _shares(self, workers: int, streams: Streams, replicate: int, label: int) -> np.ndarray:
        """Normalised gamma draws ``[W]``, as logarithms: log G(a) = log G(a + 1) + log(u) / a, good for tiny a."""
        from scipy import special

        u = streams.uniform("partition/share", 2 * workers, replicate=replicate, step=label).reshape(2, workers)
        logs = np.log(special.gammaincinv(self.alpha + 1, u[0])) + np.log1p(-u[1]) / self.alpha
        return special.softmax(logs)


@final
@dataclass(frozen=True)
class Quantity:
    """A random permutation in parts of sizes ~ ratio^(-w / (W - 1))."""

    ratio: float

    def __call__(self, labels: np.ndarray, workers: int, streams: Streams, replicate: int) -> list[np.ndarray]:
        """See the module's head."""
        order = streams.permutation("partition", len(labels), replicate=replicate)
        weights = self.ratio ** -(np.arange(workers) / max(1, workers - 1))
        cuts = np.rint(np.cumsum(weights)[:-1] / weights.sum() * len(labels)).astype(int)
        return [np.sort(part) for part in np.split(order, cuts)]


def class_counts(labels: np.ndarray, parts: Sequence[np.ndarray], classes: int) -> list[list[int]]:
    """Samples of each class that each worker has, ``[W][C]``."""
    return [np.bincount(labels[part], minlength=classes).tolist() for part in parts]


class Partitioned:
    """A sampler (:mod:`descentlab.workloads.sampler`) in which every worker shuffles its own samples, epoch by epoch.

    The clock's epoch stays that of all samples. ``deal``: replicate -> one array of indices per worker.
    """

    def __init__(self, deal: Callable[[int], Sequence[np.ndarray]], n: int, batch_size: int, streams: Streams) -> None:
        self.deal, self.batch_size, self.streams = deal, batch_size, streams
        self.steps_per_epoch = max(1, n // batch_size)
        self._parts: dict[int, Sequence[np.ndarray]] = {}
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}  # (replicate, worker) -> epoch, samples

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """``[M]`` each; ``positions`` counts the batches a worker has drawn before. int64 ``[M, B]``.

        Raises:
            UserError: for a worker with fewer samples than a batch.
        """
        out = np.empty((len(replicates), self.batch_size), dtype=np.int64)
        who = zip(replicates.tolist(), workers.tolist(), positions.tolist(), strict=True)
        for m, (replicate, worker, position) in enumerate(who):
            own = self.part(replicate, worker)
            epoch, batch = divmod(position, len(own) // self.batch_size)
            held = self._orders.get((replicate, worker))
            if held is None or held[0] != epoch:
                order = self.streams.permutation("order", len(own), replicate=replicate, worker=worker, step=epoch)
                held = self._orders[replicate, worker] = epoch, own[order]
            out[m] = held[1][batch * self.batch_size : (batch + 1) * self.batch_size]
        return out

    def part(self, replicate: int, worker: int) -> np.ndarray:
        """The samples of a worker, at least a batch of them."""
        if replicate not in self._parts:
            self._parts[replicate] = self.deal(replicate)
        own = self._parts[replicate][worker]
        if len(own) < self.batch_size:
            expected = f"at most the {len(own)} samples that worker {worker} has in replicate {replicate}"
            raise UserError("batch_size", self.batch_size, expected)
        return own
