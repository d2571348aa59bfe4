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
_CHUNK = 2**14  # elements of permutations drawn at once: a few rows, so that the work stays in the cache


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32 on ``counter`` ``[..., 4]`` (uint64 holding 32-bit words); uint32 ``[..., 4]``."""
    words = _philox((counter[..., 0], counter[..., 1], counter[..., 2], counter[..., 3]), key)
    return np.stack(words, axis=-1).astype(np.uint32)


def _philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """The four words of the counter apart, uint64, in shapes that broadcast: what is the same for a whole row is
    computed once in the first rounds."""
    c0, c1, c2, c3 = (c.astype(np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0 = (p1 >> _SHIFT) ^ (c1 ^ np.uint64(k0))
        c2 = (p0 >> _SHIFT) ^ (c3 ^ np.uint64(k1))
        c1 = p1 & _LOW
        c3 = p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


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
        words = np.stack(self._words(purpose, n, replicate, worker, step), axis=-1).astype(np.uint32)
        return words.reshape(*words.shape[:-2], -1)[..., :n]

    def _words(self, purpose: str, n: int, *who: Index) -> tuple[np.ndarray, ...]:
        """The first, second, third and fourth word of every block, uint64 ``[blocks]`` or ``[M, blocks]``."""
        replicate, worker, step = np.broadcast_arrays(*(np.asarray(a, dtype=np.uint64) for a in who))
        blocks = np.arange((n + 3) // 4, dtype=np.uint64)
        counter = (blocks, step[..., None], worker[..., None], replicate[..., None])
        return _philox(counter, (self.seed, zlib.crc32(purpose.encode())))

    def _doubles(self, purpose: str, n: int, *who: Index) -> np.ndarray:
        """``n`` random 64-bit integers of two words each, uint64 ``[n]`` or ``[M, n]``."""
        a, b, c, d = self._words(purpose, 2 * n, *who)
        out = np.empty((*a.shape, 2), dtype=np.uint64)
        np.bitwise_or(a << _SHIFT, b, out=out[..., 0])
        np.bitwise_or(c << _SHIFT, d, out=out[..., 1])
        return out.reshape(*a.shape[:-1], -1)[..., :n]

    def uniform(self, purpose: str, n: int, *, replicate: Index, worker: Index = 0, step: Index = 0) -> np.ndarray:
        """float64 in [0, 1) with 53 random bits, ``[n]`` or ``[M, n]``."""
        return (self._doubles(purpose, n, replicate, worker, step) >> np.uint64(11)) * 2.0**-53

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
        who = np.broadcast_arrays(replicate, worker, step)
        if who[0].ndim == 0:
            return self._permutations(purpose, n, *who)
        out = np.empty((len(who[0]), n), dtype=np.int64)
        chunk = max(1, _CHUNK // max(1, n))
        for first in range(0, len(out), chunk):
            rows = slice(first, first + chunk)
            out[rows] = self._permutations(purpose, n, *(w[rows] for w in who))
        return out

    def _permutations(self, purpose: str, n: int, *who: Index) -> np.ndarray:
        """Keys and positions sorted as one integer: the position stands in the low bits, of which the key leaves
        eleven. Where it needs more, the key loses its lowest bits; if that makes two of them equal, they are sorted
        in full."""
        keys = self._doubles(purpose, n, *who)
        bits = np.uint64(max(11, (n - 1).bit_length()))
        position = np.uint64((1 << int(bits)) - 1)
        packed = (keys & ~position) | np.arange(n, dtype=np.uint64)
        packed.sort(axis=-1)
        if bits > 11 and ((packed[..., 1:] ^ packed[..., :-1]) <= position).any():
            return np.argsort(keys >> np.uint64(11), axis=-1, kind="stable")
        return np.bitwise_and(packed, position, out=packed).astype(np.int64)

    def torch_seed(self, purpose: str, *, replicate: int, worker: int = 0, step: int = 0) -> int:
        """A 63-bit seed for a library that insists on its own generator (torch's initialisers)."""
        high, low = self.draw(purpose, 2, replicate=replicate, worker=worker, step=step).astype(np.uint64)
        return int((high << _SHIFT | low) >> np.uint64(1))
