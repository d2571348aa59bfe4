"""Messages between a parameter server and its workers: a header and tensors, as plain bytes.

Nothing is pickled, so nothing that arrives is executed. Both sides know the shapes beforehand (a :class:`Layout`); a
message of another length, or whose checksums do not fit, is a :class:`Corrupted` one.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from ..core.tree import Tree, leaves

TASK, GRADIENT, READY, FAILED, GARBLED = range(1, 6)  # kinds of messages; GARBLED: say that again
_MAGIC = b"dlps"
_HEADER = struct.Struct("<4sB3xqqqqdqQ")  # without its own checksum
_SEAL = struct.Struct("<I4x")
HEADER_BYTES = _HEADER.size + _SEAL.size  # 72, a multiple of 8
TEXT_BYTES = 2**15  # room for what a failed worker says


class Corrupted(Exception):
    """A message that is not what was sent."""


class Header(NamedTuple):
    """``number``: of the task, counted over the whole run. ``version``: of the weights. ``batch``: which of the
    worker's batches. ``applied``: number of the worker's last gradient that is in the weights, -1 for none.
    ``seconds``: how long the worker has to wait before it answers. ``size``: bytes after the header."""

    kind: int
    number: int = -1
    version: int = -1
    batch: int = -1
    applied: int = -1
    seconds: float = 0.0
    size: int = 0


@final
class Views:
    """The tensors of a message in some memory. ``tree``: by name; ``all``: the same in a row."""

    def __init__(self, tree: Tree) -> None:
        self.tree, self.all = tree, list(leaves(tree))


@final
class Layout:
    """Where the tensors of a tree lie in the bytes after a header: those of one dtype side by side."""

    def __init__(self, like: Mapping[str, Any]) -> None:
        self._shapes = list(_named(like))
        self._like = like
        self._dtypes = list(dict.fromkeys(t.dtype for _, t in self._shapes))
        self.size = sum(_padded(self._count(dtype), dtype) for dtype in self._dtypes)

    def _count(self, dtype: torch.dtype) -> int:
        return sum(t.numel() for _, t in self._shapes if t.dtype == dtype)

    def views(self, memory: Any) -> Views:
        """Tensors on the CPU that are ``memory`` (writable, at least a header and ``size`` bytes)."""
        places, at = {}, HEADER_BYTES
        for dtype in self._dtypes:
            own = [(path, t) for path, t in self._shapes if t.dtype == dtype]
            count = self._count(dtype)
            flat = (
                torch.frombuffer(memory, dtype=dtype, count=count, offset=at) if count else torch.empty(0, dtype=dtype)
            )
            for (path, t), part in zip(own, flat.split([t.numel() for _, t in own]), strict=True):
                places[path] = part.view(t.shape)
            at += _padded(count, dtype)
        return Views(_tree(self._like, places))


def _padded(count: int, dtype: torch.dtype) -> int:
    return -(-count * dtype.itemsize // 8) * 8


def _named(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _named(value, (*path, key))
        else:
            yield (*path, key), value


def _tree(like: Mapping[str, Any], places: Mapping[tuple[str, ...], Tensor], path: tuple[str, ...] = ()) -> Tree:
    return {
        key: _tree(value, places, (*path, key)) if isinstance(value, Mapping) else places[(*path, key)]
        for key, value in like.items()
    }


def seal(memory: memoryview, header: Header) -> int:
    """Write the header of the message whose tensors (``header.size`` bytes) are in ``memory``; the bytes to send."""
    end = HEADER_BYTES + header.size
    packed = _HEADER.pack(_MAGIC, *header, _checksum(memory[HEADER_BYTES:end]))
    memory[: _HEADER.size] = packed
    memory[_HEADER.size : HEADER_BYTES] = _SEAL.pack(zlib.crc32(packed))
    return end


def opened(message: memoryview) -> Header:
    """The header of a message; Corrupted where a bit of it, or a word of what follows, is not what was sealed."""
    if len(message) < HEADER_BYTES:
        raise Corrupted(f"{len(message)} bytes are no message")
    packed = bytes(message[: _HEADER.size])
    magic, *fields, checksum = _HEADER.unpack(packed)
    if magic != _MAGIC or _SEAL.unpack(message[_HEADER.size : HEADER_BYTES]) != (zlib.crc32(packed),):
        raise Corrupted("its header is damaged")
    header = Header(*fields)
    if len(message) != HEADER_BYTES + header.size:
        raise Corrupted(f"{len(message) - HEADER_BYTES} bytes instead of {header.size}")
    if _checksum(message[HEADER_BYTES:]) != checksum:
        raise Corrupted("its numbers do not add up to the checksum")
    return header


def _checksum(payload: memoryview) -> int:
    """Sum of the 8-byte words modulo 2**64 (a text is padded with spaces to whole words)."""
    return int(np.frombuffer(payload, dtype=np.uint64).sum(dtype=np.uint64))


def seal_text(memory: memoryview, kind: int, text: str) -> int:
    """A message of a text, cut to :data:`TEXT_BYTES`."""
    data = text.encode()[:TEXT_BYTES]
    data += b" " * (-len(data) % 8)
    memory[HEADER_BYTES : HEADER_BYTES + len(data)] = data
    return seal(memory, Header(kind, size=len(data)))


def text_of(message: memoryview) -> str:
    """The text of a message of :func:`seal_text`."""
    return bytes(message[HEADER_BYTES:]).decode(errors="replace").rstrip()
