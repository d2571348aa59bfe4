"""Zheng et al.: Asynchronous stochastic gradient descent with delay compensation (ICML 2017, arXiv 1609.08326).

The gradient at the present weights w_t is approximated from the one at the weights w_b that the worker read, by a first
Taylor step in which the outer product of the gradient stands for the Hessian, of which only the diagonal is kept::

    g + lambda g * g * (w_t - w_b)                                   elementwise
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from ..core.protocols import Lateness
from ..core.tree import Tree, tree_map


@final
@dataclass(frozen=True)
class ConstantCompensation:
    """DC-ASGD-c: a constant lambda. ``lam`` = 0 gives back the very tensors it got."""

    lam: float = 0.04

    def adjust(self, grads: Tree, late: Lateness) -> Tree:
        """See :class:`~descentlab.core.protocols.StalenessRule`."""
        if self.lam == 0.0:
            return grads
        return tree_map(lambda g, now, read: g + self.lam * g * g * (now - read), grads, late.now, late.read)


@final
@dataclass(frozen=True)
class AdaptiveCompensation:
    """DC-ASGD-a: lambda_t = lam / sqrt(MS_t + 1e-7), elementwise, with one MS for all workers::

    MS_t = decay MS_(t-1) + (1 - decay) g * g,    MS starts at 0
    """

    lam: float = 2.0
    decay: float = 0.95

    def start(self, params: Tree) -> Tree:
        """MS of every weight."""
        return {"mean_square": tree_map(torch.zeros_like, params)}

    def adjust(self, grads: Tree, late: Lateness) -> Tree:
        """See :class:`~descentlab.core.protocols.StalenessRule`; updates MS in ``late.memory``."""
        if self.lam == 0.0:
            return grads
        ms = late.memory["mean_square"]
        tree_map(lambda m, g: m.mul_(self.decay).add_(g * g, alpha=1 - self.decay), ms, grads)
        return tree_map(
            lambda g, now, read, m: g + self.lam * (m + 1e-7).rsqrt() * g * g * (now - read),
            grads,
            late.now,
            late.read,
            ms,
        )
