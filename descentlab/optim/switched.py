"""Two optimizers on one ensemble: members go over from the first to the second when a recovery arm says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..core.state import State
from ..core.tree import Tree, take


class Assigned(Protocol):
    """An :class:`~descentlab.core.protocols.Apply` whose members may have different settings."""

    def apply(self, state: State, grads: Tree, lr: Tensor) -> None: ...

    def assign(self, variants: Sequence[int]) -> None: ...


@dataclass
class Switched:
    """The :class:`~descentlab.core.protocols.Apply` of members of which some have switched.

    ``state.shared["arm"]["switched"]`` (bool ``[M]``) says which follow ``second``, at its constant rate ``lr``. Slots
    of both lie side by side in the state; a member uses those of its own optimizer.
    """

    first: Assigned
    second: Assigned
    lr: float
    _variants: list[int] = field(default_factory=list, repr=False)

    def assign(self, variants: Sequence[int]) -> None:
        """Settings of the members while they follow ``first``."""
        self._variants = list(variants)
        self.first.assign(self._variants)

    def apply(self, state: State, grads: Tree, lr: Tensor) -> None:
        """One update of every member, in place. ``grads``: name -> ``[M, …]``; ``lr``: ``[M]`` float64."""
        switched = state.shared["arm"]["switched"].tolist()
        if not any(switched):
            self.first.apply(state, grads, lr)
            return
        stay = [m for m, s in enumerate(switched) if not s]
        gone = [m for m, s in enumerate(switched) if s]
        variants = self._variants or [0] * len(switched)
        if stay:
            self.first.assign([variants[m] for m in stay])
            _part(self.first, state, grads, lr[stay], stay)
            self.first.assign(variants)
        self.second.assign([0] * len(gone))
        _part(self.second, state, grads, torch.full((len(gone),), self.lr, dtype=torch.float64), gone)


def _part(optimizer: Assigned, state: State, grads: Tree, lr: Tensor, members: list[int]) -> None:
    """The update of some members; slots that the optimizer has made are added to the state."""
    part = state.take(members)
    optimizer.apply(part, take(grads, members), lr)
    for slot, tensors in part.slots.items():
        held = state.slots.setdefault(slot, {})
        for name, t in tensors.items():
            if name not in held:
                held[name] = t.new_zeros((state.members, *t.shape[1:]))
    state.put(members, part)
