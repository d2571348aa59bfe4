"""Updates around an update: gradient clipping, and another weight decay for biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core.member_stats import member_norms
from ..core.protocols import Apply
from ..core.state import State
from ..core.tree import Tree
from .stacked import Rule


@dataclass
class Clipped:
    """The :class:`~descentlab.core.protocols.Apply` ``inner`` at gradients no longer than ``longest``.

    Every member's gradient, all tensors together, is scaled by min(1, longest / (norm + 1e-6)), as
    ``torch.nn.utils.clip_grad_norm_`` does. The gradients given stay as they are.
    """

    inner: Apply
    longest: float

    def assign(self, variants: Sequence[int]) -> None:
        """See :class:`~descentlab.core.protocols.Apply`."""
        self.inner.assign(variants)

    def apply(self, state: State, grads: Tree, lr: Tensor) -> None:
        """One update of every member, in place."""
        norm, _ = member_norms(grads)
        scale = (self.longest / (norm + 1e-6)).clamp(max=1.0)
        cut = {n: g * scale.to(g.device, g.dtype).view(-1, *[1] * (g.dim() - 1)) for n, g in grads.items()}
        self.inner.apply(state, cut, lr)


def with_decay(rule: Rule, weight_decay: float) -> Rule:
    """The rule with another weight decay."""
    return replace(rule, settings={**rule.settings, "weight_decay": weight_decay})


@dataclass
class BiasDecay:
    """Parameters with ``bias`` in their name follow ``biases``, all others ``weights``: one rule, two weight decays."""

    weights: Apply
    biases: Apply
    _owner: tuple[Tree, Tree] | None = field(default=None, repr=False)
    _parts: list[State] = field(default_factory=list, repr=False)

    def assign(self, variants: Sequence[int]) -> None:
        """See :class:`~descentlab.core.protocols.Apply`."""
        self.weights.assign(variants)
        self.biases.assign(variants)

    def apply(self, state: State, grads: Tree, lr: Tensor) -> None:
        """One update of every member, in place."""
        if self._owner is None or self._owner[0] is not state.params or self._owner[1] is not state.slots:
            self._parts = [_part(state, bias) for bias in (False, True)]
            self._owner = state.params, state.slots
        for optimizer, part in zip((self.weights, self.biases), self._parts, strict=True):
            if part.params:
                part.opt_step.copy_(state.opt_step)
                optimizer.apply(part, {name: grads[name] for name in part.params}, lr)
                for slot, tensors in part.slots.items():
                    state.slots.setdefault(slot, {}).update(tensors)
        state.opt_step.add_(1)


def _part(state: State, bias: bool) -> State:
    """The same tensors, of the biases or of the rest alone, with a counter of its own."""
    names = [name for name in state.params if ("bias" in name) == bias]
    slots = {slot: {n: t for n, t in tensors.items() if n in names} for slot, tensors in state.slots.items()}
    server = {
        "params": {name: state.params[name] for name in names},
        "buffers": {},
        "slots": slots,
        "opt_step": torch.zeros_like(state.opt_step),
    }
    return State(server, clock=state.clock)
