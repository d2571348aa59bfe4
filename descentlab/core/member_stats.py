"""Norms, non-finite counts and largest elements of every member of stacked tensors.

On a CPU one pass of compiled code (``member_stats.c``), elsewhere and without a compiler the same with torch; the norms
of the two differ by rounding (1e-15 relative), the other results do not.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .native import TYPES, Held, Rows, enabled, library
from .tree import leaves

SOURCE = Path(__file__).with_name("member_stats.c")


def member_norms(tree: Mapping[str, Any], minus: Mapping[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Over all leaves, per member: the Euclidean norm of ``tree - minus``, float64 ``[M]`` (sums are float64, so that
    1e30 does not overflow), and the number of NaN and infinite elements of ``tree``, int64 ``[M]``."""
    tensors = list(leaves(tree))
    others = list(leaves(minus)) if minus is not None else None
    here, there = _rows(tensors), _rows(others) if others is not None else None
    if here is not None and (others is None or (there is not None and others[0].dtype == tensors[0].dtype)):
        compiled = compiled_stats(tensors[0].dtype)
        assert compiled is not None
        return compiled.norms(here, there)
    changes = [t - o for t, o in zip(tensors, others, strict=True)] if others is not None else tensors
    norms = [torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=torch.float64) for t in changes]
    nonfinite = torch.stack([(~torch.isfinite(t)).flatten(1).sum(dim=1) for t in tensors]).sum(dim=0)
    return torch.linalg.vector_norm(torch.stack(norms), dim=0), nonfinite


def member_norm(tree: Mapping[str, Any]) -> Tensor:
    """Euclidean norm over all leaves, per member: float64 ``[M]``."""
    return member_norms(tree)[0]


def member_nonfinite(tree: Mapping[str, Any]) -> Tensor:
    """Number of NaN and infinite elements, per member: int64 ``[M]``."""
    return member_norms(tree)[1]


def member_max_abs(tree: Mapping[str, Any]) -> Tensor:
    """Largest absolute value over all leaves, per member: float64 ``[M]``; NaN wins, so it is never hidden."""
    tensors = list(leaves(tree))
    if (rows := _rows(tensors)) is not None:
        compiled = compiled_stats(tensors[0].dtype)
        assert compiled is not None
        return compiled.largest(rows)
    return torch.stack([t.flatten(1).abs().amax(dim=1).double() for t in tensors]).amax(dim=0)


_held = Held()  # weights, slots and what they were before are the same tensors for long


def _rows(tensors: Sequence[Tensor]) -> Rows | None:
    """As arguments of the compiled functions; None where torch has to do it."""
    if not enabled():
        return None
    if (known := _held.known(tensors)) is not None:
        return known
    dtype = tensors[0].dtype
    if dtype not in TYPES or any(t.dtype != dtype or t.device.type != "cpu" for t in tensors):
        return None
    return _held.rows(tensors) if compiled_stats(dtype) is not None else None


@functools.cache
def compiled_stats(dtype: torch.dtype) -> _Stats | None:
    """The compiled functions for ``dtype``; None (with a notice) where they cannot be built or loaded."""
    loaded = library(SOURCE, dtype)
    return _Stats(loaded) if loaded is not None else None


class _Stats:
    """The functions of the compiled library."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._norms, self._largest = loaded.norms, loaded.largest
        self._norms.restype = self._largest.restype = None

    def norms(self, held: Rows, minus: Rows | None) -> tuple[Tensor, Tensor]:
        members = len(held.tensors[0])
        norm, nonfinite = torch.empty(members, dtype=torch.float64), torch.empty(members, dtype=torch.int64)
        to = (minus.strides, minus.addresses) if minus is not None else (None, None)
        sizes = held.sizes
        self._norms(
            ctypes.c_int64(members), len(sizes), sizes, held.strides, held.addresses, *to, _at(norm), _at(nonfinite)
        )
        return norm, nonfinite

    def largest(self, held: Rows) -> Tensor:
        top = torch.empty(len(held.tensors[0]), dtype=torch.float64)
        sizes = held.sizes
        self._largest(ctypes.c_int64(len(top)), len(sizes), sizes, held.strides, held.addresses, _at(top))
        return top


def _at(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())
