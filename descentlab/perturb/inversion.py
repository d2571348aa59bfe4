"""Adam's updates undone from the gradients they were made with: what a re-execution needs instead of kept states.

The published recovery keeps two gradients and no state. Two limits are its own: after a huge gradient ``m - (1 -
beta1) g`` cancels, so what was in the slot before is lost (Inf leaves NaN); BatchNorm's buffers have no inverse and
stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..core.state import State
from ..core.tree import Tree

FIRST, SECOND = "exp_avg", "exp_avg_sq"


@final
@dataclass(frozen=True)
class AdamInverse:
    """The inverse of one update of Adam (arXiv 1412.6980) or AdamW (arXiv 1711.05101), without AMSGrad.

    With the gradient g of update t: w <- (w + lr m' / (sqrt(v') + eps)) / (1 - lr decay), where m' = m / (1 - beta1^t)
    and v' = v / (1 - beta2^t); then m <- (m - (1 - beta1) g) / beta1 and v <- max((v - (1 - beta2) g^2) / beta2, 0).
    """

    betas: tuple[float, float]
    eps: float
    decay: float = 0.0  # decoupled

    def undo(self, state: State, grads: Tree, lr: Tensor) -> None:
        """Weights, slots and step counters of every member of ``state`` before the update, in place; ``lr`` ``[M]``."""
        b1, b2 = self.betas
        t = state.opt_step.double()
        for name, g in grads.items():
            w, m, v = state.params[name], state.slots[FIRST][name], state.slots[SECOND][name]
            shape = [-1, *[1] * (w.dim() - 1)]
            rate, first, second = (x.to(w.dtype).view(shape) for x in (lr, 1 - b1**t, 1 - b2**t))
            w.add_(rate * (m / first) / ((v / second).sqrt() + self.eps)).div_(1 - rate * self.decay)
            m.sub_((1 - b1) * g).div_(b1)
            v.sub_((1 - b2) * g * g).div_(b2)
            torch.where(v < 0, torch.zeros_like(v), v, out=v)  # rounding; NaN stays
        state.opt_step.sub_(1)


def inverse_of(optimizer: Any) -> AdamInverse | str:
    """The inverse for the settings of an optimizer, or why there is none."""
    if optimizer.name not in ("adam", "adamw"):
        return "optimizer adam or adamw, whose updates have an inverse"
    if optimizer.amsgrad:
        return "an optimizer without amsgrad, whose maximum has no inverse"
    if optimizer.name == "adam" and optimizer.weight_decay:
        return "optimizer.weight_decay 0 (its gradient depends on the weights that are sought), or adamw"
    decay = optimizer.weight_decay if optimizer.name == "adamw" else 0.0
    return AdamInverse(tuple(optimizer.betas), optimizer.eps, decay)
