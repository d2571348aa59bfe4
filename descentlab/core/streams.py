"""Counter-based random streams: every draw is a pure function of who asks, for what, and at which step.

Philox4x32-10 (Salmon et al., SC 2011). The 64-bit key holds (seed, purpose), the 128-bit counter (block, step,
worker, replicate), so two different requests never share a word. A run's name is in neither: a twin, a rival
optimizer and a run packed beside a thousand others see the same draws. There is no global generator anywhere.
"""

from __future__ import annotations

import zlib

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32 on ``counter`` ``[..., 4]`` (uint64 holding 32-bit words); uint32 ``[..., 4]``."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


Index = int | np.ndarray


class Streams:
    """All randomness of a study. ``replicate``, ``worker`` and ``step`` may be arrays ``[M]`` (broadcast): the result
    then has a leading axis M.

    ``purpose`` is any short word (``"order"``, ``"init"``, ``"fault"`` …), hashed by CRC-32.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed = {seed}: expected an integer from 0 to 2**32 - 1")
        self.seed = seed

    def draw(self, purpose: str, n: int, *, replicate: Index, worker: Index = 0, step: Index = 0) -> np.ndarray:
        """``n`` words, uint32 ``[n]`` or ``[M, n]``."""
        who, at, when = np.broadcast_arrays(*(np.asarray(a, dtype=np.uint64) for a in (replicate, worker, step)))
        blocks = np.arange((n + 3) // 4, dtype=np.uint64)
        counter = np.empty((*who.shape, len(blocks), 4), dtype=np.uint64)
        counter[..., 0] = blocks
        counter[..., 1] = when[..., None]
        counter[..., 2] = at[..., None]
        counter[..., 3] = who[..., None]
        words = philox4x32(counter, (self.seed, zlib.crc32(purpose.encode())))
        return words.reshape(*who.shape, -1)[..., :n]

    def uniform(self, purpose: str, n: int, *, replicate: Index, worker: Index = 0, step: Index = 0) -> np.ndarray:
        """float64 in [0, 1) with 53 random bits, ``[n]`` or ``[M, n]``."""
        words = self.draw(purpose, 2 * n, replicate=replicate, worker=worker, step=step).astype(np.uint64)
        return ((words[..., 0::2] << _SHIFT | words[..., 1::2]) >> np.uint64(11)) * 2.0**-53

    def integers(
        self, purpose: str, high: int, n: int = 1, *, replicate: Index, worker: Index = 0, step: Index = 0
    ) -> np.ndarray:
        """int64 in [0, high), ``[n]`` or ``[M, n]``; bias below high / 2**53."""
        return (self.uniform(purpose, n, replicate=replicate, worker=worker, step=step) * high).astype(np.int64)

    def normal(self, purpose: str, n: int, *, replicate: Index, worker: Index = 0, step: Index = 0) -> np.ndarray:
        """Standard normal float64 by Box-Muller, ``[n]`` or ``[M, n]``."""
        u = self.uniform(purpose, 2 * n, replicate=replicate, worker=worker, step=step)
        return np.sqrt(-2.0 * np.log1p(-u[..., :n])) * np.cos(2.0 * np.pi * u[..., n:])

    def permutation(self, purpose: str, n: int, *, replicate: Index, worker: Index = 0, step: Index = 0) -> np.ndarray:
        """A uniform permutation of ``range(n)``, int64 ``[n]`` or ``[M, n]`` (53-bit keys sorted, ties by position)."""
        keys = self.uniform(purpose, n, replicate=replicate, worker=worker, step=step)
        order = np.argsort(keys, axis=-1)  # several times faster than a stable sort, and the same unless keys are equal
        ranked = np.take_along_axis(keys, order, axis=-1)
        if (ranked[..., 1:] == ranked[..., :-1]).any():
            return np.argsort(keys, axis=-1, kind="stable")
        return order

    def torch_seed(self, purpose: str, *, replicate: int, worker: int = 0, step: int = 0) -> int:
        """A 63-bit seed for a library that insists on its own generator (torch's initialisers)."""
        high, low = self.draw(purpose, 2, replicate=replicate, worker=worker, step=step).astype(np.uint64)
        return int((high << _SHIFT | low) >> np.uint64(1))
