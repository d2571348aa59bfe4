"""Delay laws: how long each worker needs for each of its gradients.

A law gives ``seconds(workers, steps, streams, replicate)``, float64 ``[T, W]``: row i is every worker's i-th gradient.
Draws are keyed by (replicate, worker, i), so neither a longer run nor another worker changes one. ``slow_factor``:
worker 0 has so many times the mean and the spread of the others; ``only_slow``: the others have no delay at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from ..core.errors import UserError
from ..core.streams import Streams


def _factors(workers: int, slow_factor: float, only_slow: bool) -> np.ndarray:
    """What multiplies each worker's times, ``[W]``."""
    first = np.arange(workers) == 0
    return np.where(first, slow_factor, 0.0 if only_slow else 1.0)


def _grid(steps: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """(step, worker) of every gradient, ``[T, W]`` each."""
    step, worker = np.meshgrid(np.arange(steps), np.arange(workers), indexing="ij")
    return step, worker


def _uniform(streams: Streams, workers: int, steps: int, replicate: int) -> np.ndarray:
    """u in [0, 1) for every gradient, ``[T, W]``."""
    step, worker = _grid(steps, workers)
    return streams.uniform("delay", 1, replicate=replicate, worker=worker, step=step)[..., 0]


@final
@dataclass(frozen=True)
class GaussianDelay:
    """max(0, N(mean_s, std_s^2)), a fresh draw per worker and gradient; ``std_s`` = 0 is constant and draws nothing."""

    mean_s: float = 0.0
    std_s: float = 0.0
    slow_factor: float = 1.0
    only_slow: bool = False

    def seconds(self, workers: int, steps: int, streams: Streams, replicate: int) -> np.ndarray:
        """See :class:`~descentlab.core.protocols.Delay`; worker w's draws do not depend on how many there are."""
        factor = _factors(workers, self.slow_factor, self.only_slow)
        if self.std_s == 0.0:
            return np.full((steps, workers), self.mean_s) * factor
        step, worker = _grid(steps, workers)
        z = streams.normal("delay", 1, replicate=replicate, worker=worker, step=step)[..., 0]
        return np.maximum(0.0, factor * (self.mean_s + self.std_s * z))


@final
@dataclass(frozen=True)
class GammaDelay:
    """Gamma with the given mean and ``shape`` k (variance mean^2 / k), by inversion; k = 1 is exponential."""

    mean_s: float = 0.03
    shape: float = 1.0
    slow_factor: float = 1.0
    only_slow: bool = False

    def seconds(self, workers: int, steps: int, streams: Streams, replicate: int) -> np.ndarray:
        """See :class:`~descentlab.core.protocols.Delay`."""
        u = _uniform(streams, workers, steps, replicate)
        if self.shape == 1.0:
            quantile = -np.log1p(-u)
        else:
            from scipy import special

            quantile = special.gammaincinv(self.shape, u) / self.shape
        return _factors(workers, self.slow_factor, self.only_slow) * self.mean_s * quantile


@final
@dataclass(frozen=True)
class ParetoDelay:
    """P(T > t) = (t_min / t)^exponent for t >= t_min = mean_s (exponent - 1) / exponent; infinite variance up to 2."""

    mean_s: float = 0.03
    exponent: float = 1.5
    slow_factor: float = 1.0
    only_slow: bool = False

    def seconds(self, workers: int, steps: int, streams: Streams, replicate: int) -> np.ndarray:
        """See :class:`~descentlab.core.protocols.Delay`."""
        u = _uniform(streams, workers, steps, replicate)
        least = self.mean_s * (self.exponent - 1) / self.exponent
        factor = _factors(workers, self.slow_factor, self.only_slow)
        return factor * least * (1 - u) ** (-1 / self.exponent)


@final
@dataclass(frozen=True)
class CyclicDelay:
    """mean_s (1 + amplitude sin(2 pi (i / period + w / W))): load that comes and goes, workers out of phase."""

    mean_s: float = 0.03
    amplitude: float = 0.5
    period: float = 50.0
    slow_factor: float = 1.0
    only_slow: bool = False

    def seconds(self, workers: int, steps: int, streams: Streams, replicate: int) -> np.ndarray:
        """See :class:`~descentlab.core.protocols.Delay`; draws nothing."""
        step, worker = _grid(steps, workers)
        wave = 1 + self.amplitude * np.sin(2 * np.pi * (step / self.period + worker / workers))
        return _factors(workers, self.slow_factor, self.only_slow) * self.mean_s * wave


@final
class TraceDelay:
    """Measured times from a text file: one row per gradient, one column per worker, commas or blanks between.

    A file with one column serves all workers, each beginning at its own place of the list; one with several needs a
    column for every worker. A trace that is too short begins again.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._times = read_trace(path)

    def seconds(self, workers: int, steps: int, streams: Streams, replicate: int) -> np.ndarray:
        """See :class:`~descentlab.core.protocols.Delay`; the same for every replicate.

        Raises:
            UserError: for fewer columns than workers.
        """
        rows, columns = self._times.shape
        step, worker = _grid(steps, workers)
        if columns == 1:
            return self._times[(step + worker * rows // max(1, workers)) % rows, 0]
        if columns < workers:
            raise UserError(
                "delay.path", self.path, f"a column for each of {workers} workers, or one; it has {columns}"
            )
        return self._times[step % rows, worker]


def read_trace(path: str) -> np.ndarray:
    """Times in seconds, ``[rows, columns]``.

    Raises:
        UserError: for a file that is missing, holds no table of numbers, or a time that is negative or not finite.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.replace(",", " ").split() for line in file if line.strip() and not line.startswith("#")]
        times = np.array([[float(word) for word in line] for line in lines])
    except OSError as error:
        raise UserError("delay.path", path, f"a readable file ({error.strerror})") from None
    except ValueError:
        raise UserError("delay.path", path, "rows of numbers, as many in each row") from None
    if times.ndim != 2 or not times.size:
        raise UserError("delay.path", path, "at least one row of times in seconds")
    bad = ~np.isfinite(times) | (times < 0)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        expected = f"times of at least 0 s; row {row + 1}, column {column + 1} is {times[row, column]:g}"
        raise UserError("delay.path", path, expected)
    return times
