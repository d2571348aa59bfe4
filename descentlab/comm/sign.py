"""The sign of every element and one scale per tensor, with error feedback (Karimireddy et al., arXiv 1901.09847)."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from ..core.protocols import Exchange, Gather, Ranks
from ..core.streams import Streams
from ..core.tree import Tree
from .packed import pack, unpack

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


@final
class SignSgd:
    """Every worker sends one bit per element and the mean size of the tensor's elements; the rest stays with it.

    ``a = g + e``, ``sent = mean |a| sign(a)`` (the sign of zero is +), ``e = a - sent``. Worker memory: name ->
    ``[M, W, …]``. All workers' messages go to all workers, who average them.
    """

    def start(self, params: Tree, workers: int, streams: Streams, replicates: np.ndarray) -> tuple[Tree, Tree]:
        return {k: p.new_zeros(p.shape[0], workers, *p.shape[1:]) for k, p in params.items()}, {}

    def exchange(self, grads: Tree, memory: Tree, shared: Tree) -> Exchange:
        owed = {name: (g + memory[name]).flatten(2) for name, g in grads.items()}
        scales = torch.stack([a.abs().mean(2) for a in owed.values()], dim=2)
        flat = torch.cat(list(owed.values()), dim=2)
        message = yield Gather(pack([scales, to_bits(flat >= 0)]))
        n, tensors = flat.shape[2], scales.shape[2]
        all_scales, bits = unpack(message, [(tensors, scales.dtype), (-(-n // 8), torch.uint8)])
        signs = from_bits(bits, n).to(scales.dtype) * 2 - 1
        mean, residual, first = {}, {}, 0
        for i, (name, g) in enumerate(grads.items()):
            own = slice(first, first + owed[name].shape[2])
            mean[name] = (all_scales[..., i : i + 1] * signs[..., own]).mean(1).view(g.shape[0], *g.shape[2:])
            sent = torch.where(owed[name] >= 0, scales[..., i : i + 1], -scales[..., i : i + 1])
            residual[name] = (owed[name] - sent).view_as(g)
            first = own.stop
        return mean, residual, shared

    def resize(self, shared: Tree, rank: Ranks, streams: Streams) -> Tree:
        return shared


def to_bits(flags: Tensor) -> Tensor:
    """bool ``[…, n]`` as uint8 ``[…, ceil(n / 8)]``, the first flag in the lowest bit."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8))
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=flags.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def from_bits(packed: Tensor, n: int) -> Tensor:
    """Inverse of :func:`to_bits`: uint8 0 or 1 ``[…, n]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(-2)[..., :n]
