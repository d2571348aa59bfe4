"""Gradients as 16-bit floats, with error feedback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import numpy as np
import torch

from ..core.protocols import Exchange, Means, Ranks
from ..core.streams import Streams
from ..core.tree import Tree

Kind = Literal["fp16", "bf16"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@final
class HalfPrecision:
    """Every worker sends its gradient rounded to 16 bits; what rounding takes away stays with it.

    ``a = g + e``, ``sent = round(a)``, ``e = a - sent``. Values beyond the largest number of 16 bits are sent as that
    number. The mean is taken in 16 bits as well, as an all-reduce does. Worker memory: name -> ``[M, W, …]``.
    """

    def __init__(self, kind: Kind) -> None:
        self.dtype = DTYPES[kind]

    def start(self, params: Tree, workers: int, streams: Streams, replicates: np.ndarray) -> tuple[Tree, Tree]:
        return {k: p.new_zeros(p.shape[0], workers, *p.shape[1:]) for k, p in params.items()}, {}

    def exchange(self, grads: Tree, memory: Tree, shared: Tree) -> Exchange:
        largest = torch.finfo(self.dtype).max
        owed = {name: g + memory[name] for name, g in grads.items()}
        sent = {name: a.clamp(-largest, largest).to(self.dtype) for name, a in owed.items()}
        means = yield Means(tuple(sent.values()))
        mean = {name: m.to(grads[name].dtype) for name, m in zip(grads, means, strict=True)}
        return mean, {name: a - sent[name].to(a.dtype) for name, a in owed.items()}, shared

    def resize(self, shared: Tree, rank: Ranks, streams: Streams) -> Tree:
        return shared

    def requests(self, shapes: Mapping[str, tuple[int, ...]], ranks: Ranks, element_size: int) -> list[Means]:
        """The messages of one update, as tensors without values."""
        return [Means(tuple(torch.empty(1, 1, *shape, dtype=self.dtype, device="meta") for shape in shapes.values()))]
