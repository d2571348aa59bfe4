"""Several tensors as one message of bytes, for what workers gather from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(parts: Sequence[Tensor]) -> Tensor:
    """``[M, K, n]`` each, of any types, as uint8 ``[M, K, bytes]``."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack(message: Tensor, parts: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Inverse of :func:`pack`, for ``[M, W, bytes]``; ``parts``: (n, type) of each tensor."""
    out, start = [], 0
    for n, dtype in parts:
        size = n * dtype.itemsize
        part = message[..., start : start + size].clone(memory_format=torch.contiguous_format)
        out.append(part.view(dtype))
        start += size
    return out
