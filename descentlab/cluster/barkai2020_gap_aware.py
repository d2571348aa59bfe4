"""Barkai, Hakimi, Schuster: Gap-aware mitigation of gradient staleness (ICLR 2020, arXiv 1909.10802)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from ..core.protocols import Lateness
from ..core.tree import Tree, clone, tree_map


@final
@dataclass(frozen=True)
class GapAware:
    """A gradient is divided, elementwise, by 1 + how many usual steps the weight has moved since the worker read it::

        g / (|w_t - w_b| / C_t + 1)

    The penalty grows linearly with the gap and is 1 without one, as in the paper. What a usual step is has to be
    estimated: here C_t is, for each tensor of weights, the running mean (factor ``decay``, bias-corrected) of the
    root mean square of the server's updates w_t - w_(t-1). While nothing has moved, gradients pass as they are.
    """

    decay: float = 0.99

    def start(self, params: Tree) -> Tree:
        """The weights of the last call, the running means and how many steps are in them."""
        members = next(iter(params.values())).shape[0]
        mean = tree_map(lambda p: p.new_zeros(members), params)
        return {"last": clone(params), "mean": mean, "count": torch.zeros(members, dtype=torch.int64)}

    def adjust(self, grads: Tree, late: Lateness) -> Tree:
        """See :class:`~descentlab.core.protocols.StalenessRule`; keeps C in ``late.memory``."""
        memory = late.memory
        moved = torch.stack([(now != memory["last"][name]).flatten(1).any(1) for name, now in late.now.items()]).any(0)
        memory["count"] += moved
        correction = (1 - self.decay ** memory["count"].double()).clamp(min=1e-12)
        out = {}
        for name, g in grads.items():
            now, mean = late.now[name], memory["mean"][name]
            step = (now - memory["last"][name]).flatten(1).square().mean(1).sqrt()
            mean.copy_(torch.where(moved, self.decay * mean + (1 - self.decay) * step, mean))
            usual = (mean / correction.to(mean)).view(-1, *[1] * (g.dim() - 1))
            gap = (now - late.read[name]).abs()
            out[name] = torch.where(gap > 0, g / (gap / usual.clamp(min=torch.finfo(g.dtype).tiny) + 1), g)
            memory["last"][name].copy_(now)
        return out
