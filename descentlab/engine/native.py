"""Calls ``plain_mlp.c``, built on first use (:mod:`descentlab.core.native`)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.native import Held, Rows, library

SOURCE = Path(__file__).with_name("plain_mlp.c")
EVALUATED_AT_ONCE = 64  # samples: what one member needs for them stays in the first-level cache


@functools.cache
def kernel(dtype: torch.dtype) -> Kernel | None:
    """The compiled functions for ``dtype``; None (with a notice) where they cannot be built or loaded."""
    loaded = library(SOURCE, dtype)
    return Kernel(loaded) if loaded is not None else None


class Kernel:
    """The functions of one compiled library."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._step, self._evaluate, self._scratch_vectors = loaded.step, loaded.evaluate, loaded.scratch_vectors
        self._step.restype = self._evaluate.restype = None
        self._scratch_vectors.restype = ctypes.c_int64
        self._scratch = torch.empty(0)
        self._held = Held()

    def step(
        self,
        silu: bool,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        x: Tensor,
        y: Tensor,
        index: Tensor,
        grads: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy ``[M]``; writes the gradients of every layer's weight, then of every layer's bias, to
        ``grads``, tensors like ``weights`` and ``biases`` whose members may lie apart.

        ``weights`` ``[M, out, in]`` and ``biases`` ``[M, out]`` in order; training set ``x`` ``[n, in]``, ``y`` ``[n]``
        int64; ``index`` ``[M, B]`` int64. All on the CPU, floating-point tensors of the library's dtype.
        """
        low, high = index.aminmax()
        if int(low) < 0 or int(high) >= len(x):
            raise IndexError(f"sample indices must be in [0, {len(x)})")
        members, batch = index.shape
        x, y, index, layers = x.contiguous(), y.contiguous(), index.contiguous(), len(weights)
        held, made = self._held.rows([*weights, *biases]), self._held.rows(grads)
        if any(a is not b for a, b in zip(made.tensors, grads, strict=True)):
            raise ValueError("gradients of a member that are not contiguous")
        loss, accuracy = x.new_empty(members), x.new_empty(members)
        widths, scratch = self._room(batch, x, weights)
        self._step(
            members,
            batch,
            layers,
            widths,
            int(silu),
            *(ctypes.c_void_p(t.data_ptr()) for t in (x, y, index)),
            *_halves(held, layers),
            held.strides,
            *_halves(made, layers),
            made.strides,
            *(ctypes.c_void_p(t.data_ptr()) for t in (loss, accuracy)),
            ctypes.c_void_p(scratch),
        )
        return loss, accuracy

    def evaluate(
        self,
        silu: bool,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        x: Tensor,
        y: Tensor,
        only: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy ``[M]`` on all of ``x`` ``[n, in]``, ``y`` ``[n]``; otherwise as :meth:`step`.
        ``only``: these members alone, ``[len(only)]``."""
        x, y = x.contiguous(), y.contiguous()
        members, held = len(weights[0]) if only is None else len(only), self._held.rows([*weights, *biases])
        loss, accuracy = (torch.empty(members, dtype=torch.float64) for _ in range(2))
        widths, scratch = self._room(EVALUATED_AT_ONCE, x, weights)
        self._evaluate(
            members,
            places(only, len(weights[0])),
            ctypes.c_int64(len(x)),
            EVALUATED_AT_ONCE,
            len(weights),
            widths,
            int(silu),
            *(ctypes.c_void_p(t.data_ptr()) for t in (x, y)),
            *_halves(held, len(weights)),
            held.strides,
            *(ctypes.c_void_p(t.data_ptr()) for t in (loss, accuracy)),
            ctypes.c_void_p(scratch),
        )
        return loss.to(x.dtype), accuracy.to(x.dtype)

    def _room(self, batch: int, x: Tensor, weights: Sequence[Tensor]) -> tuple[ctypes.Array, int]:
        """The widths of all layers, the inputs first, and the address of enough scratch."""
        widths = (ctypes.c_int32 * (len(weights) + 1))(x.shape[1], *(w.shape[1] for w in weights))
        return widths, self._aligned(64 * self._scratch_vectors(batch, len(weights), widths))

    def _aligned(self, size: int) -> int:
        """Address of at least ``size`` bytes, a multiple of 64."""
        if self._scratch.numel() < size + 64:
            self._scratch = torch.empty(size + 64, dtype=torch.uint8)
        return -(-self._scratch.data_ptr() // 64) * 64


def places(only: Sequence[int] | None, members: int) -> ctypes.Array | None:
    """Members as an argument of a compiled evaluation; IndexError for one that is not there."""
    if only is None:
        return None
    if only and not 0 <= min(only) <= max(only) < members:
        raise IndexError(f"members must be in [0, {members})")
    return (ctypes.c_int64 * len(only))(*only)


def _halves(held: Rows, layers: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """Where the addresses of the weights and those of the biases stand."""
    first = ctypes.addressof(held.addresses)
    return ctypes.c_void_p(first), ctypes.c_void_p(first + layers * ctypes.sizeof(ctypes.c_void_p))
