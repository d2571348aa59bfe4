"""Averages of the weights along a run, beside the last ones. Buffers (BatchNorm statistics) are averaged alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.state import State
from ..core.tree import Tree, clone

Share = Callable[[Tensor], Tensor]  # number of the newest weights, from 1, float64 [M] -> its share in the average


def poly(eta: float) -> Share:
    """(eta + 1) / (eta + t)."""
    return lambda t: (eta + 1) / (eta + t)


def ema(decay: float) -> Share:
    """1 - decay, whatever t."""
    return lambda t: torch.full_like(t, 1 - decay)


@dataclass
class Average:
    """average = average + share(t) (weights - average), t the updates made; it begins at the initial weights.

    It lives in ``state.server["average"]`` as ``params`` and ``buffers``, so checkpoints and forks hold it. Buffers of
    whole numbers are those of the newest weights.
    """

    share: Share

    def start(self, state: State) -> None:
        """Put the average where the weights are."""
        state.server["average"] = {"params": clone(state.params), "buffers": clone(state.buffers)}

    @torch.no_grad()
    def update(self, state: State) -> None:
        """Take in the weights and buffers after an update, in place."""
        shares = self.share(state.opt_step.double())
        for part in ("params", "buffers"):
            held: Tree = state.server["average"][part]
            for name, new in state.server[part].items():
                if new.is_floating_point():
                    share = shares.to(new.device, new.dtype).view(-1, *[1] * (new.dim() - 1))
                    held[name].lerp_(new, share.expand(new.shape))
                else:
                    held[name].copy_(new)


def averaged(state: State) -> State:
    """The same members at their averaged weights and buffers; what an evaluation needs of a state."""
    average = state.server["average"]
    return State({**state.server, "params": average["params"], "buffers": average["buffers"]}, clock=state.clock)
