"""One optimizer's memory handed to another: what a member's slots become when it goes over to another rule.

A slot is carried where both rules have one for the same quantity, as an estimate of it: slot = gain x estimate, the
gain being what a constant quantity of 1 gives after t updates from zero.

=================  ==============================================  =========================================
quantity           slots                                           gain after t updates
=================  ==============================================  =========================================
mean gradient      ``exp_avg``; ``grad_avg`` of centred RMSprop    1 - decay^t
mean gradient      SGD's ``momentum_buffer``                       (1 - dampening) (1 - mu^t) / (1 - mu)
mean square        ``exp_avg_sq``; ``square_avg``                  1 - decay^t
of its own         ``max_exp_avg_sq``, ``sum``, ``acc_delta``,     1: nothing else holds them
                   RMSprop's ``momentum_buffer``
=================  ==============================================  =========================================

So Adam's first moment becomes the buffer SGD would have after the same mean gradient, and between two optimizers of
equal settings every factor is 1: no bit changes. Any other slot starts where the rule starts it. The count of updates
goes with the mean square (of a rule without one, with the mean gradient): counted on beside an empty second moment it
would make the first updates 1 / sqrt(1 - beta2) times too long, so without it the whole rule starts anew. NAdam's
``mu_product`` is a function of the count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.state import State
from ..core.tree import Tree, take
from .stacked import Rule, StackedOptimizer
from .vectorised import FORMS, PER_MEMBER, split

Gain = Callable[[Mapping[str, float], int], float]
TRACKED = "tracked"  # where the slots of optimizers that only watch lie in the shared state


def _mean(decay: str) -> Gain:
    return lambda n, t: 1 - n[decay] ** t


def _buffer(n: Mapping[str, float], t: int) -> float:
    return (1 - n["dampening"]) * (1 - n["momentum"] ** t) / (1 - n["momentum"])


def _one(n: Mapping[str, float], t: int) -> float:
    return 1.0


_ADAM: dict[str, tuple[str, Gain]] = {
    "exp_avg": ("gradient", _mean("betas.0")),
    "exp_avg_sq": ("square", _mean("betas.1")),
    "max_exp_avg_sq": ("largest square", _one),
}
# class -> slot -> (quantity, gain)
QUANTITIES: dict[type, dict[str, tuple[str, Gain]]] = {
    torch.optim.SGD: {"momentum_buffer": ("gradient", _buffer)},
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: _ADAM,
    torch.optim.RMSprop: {
        "square_avg": ("square", _mean("alpha")),
        "grad_avg": ("gradient", _mean("alpha")),
        "momentum_buffer": ("scaled gradient", _one),
    },
    torch.optim.Adagrad: {"sum": ("sum of squares", _one)},
    torch.optim.Adadelta: {"square_avg": ("square", _mean("rho")), "acc_delta": ("square step", _one)},
}


def starts(rule: Rule) -> dict[str, float]:
    """The slots that a shipped rule has under its settings, and what each starts at."""
    numbers, flags = split(rule.settings)
    found = FORMS[rule.cls].slots({name: np.array([n]) for name, n in numbers.items()}, flags)
    return {slot: float(np.asarray(start).reshape(-1)[0]) for slot, start in found.items()}


def carried(old: Rule, new: Rule, made: int) -> dict[str, tuple[str, float]] | None:
    """Slot of ``new`` -> (slot of ``old``, factor) after ``made`` updates; None where ``new`` starts anew.

    Slots of ``new`` that are not in the answer start where it starts them.
    """
    if old.cls not in QUANTITIES or new.cls not in QUANTITIES or made == 0:
        return None
    sources = {QUANTITIES[old.cls][slot][0]: slot for slot in starts(old) if slot in QUANTITIES[old.cls]}
    numbers, others = split(new.settings)[0], split(old.settings)[0]
    wanted = {slot: QUANTITIES[new.cls][slot] for slot in starts(new) if slot in QUANTITIES[new.cls]}
    found = {}
    for slot, (quantity, gain) in wanted.items():
        source = sources.get(quantity)
        if source is not None:
            found[slot] = source, gain(numbers, made) / QUANTITIES[old.cls][source][1](others, made)
    needed = [slot for slot, (quantity, _) in wanted.items() if quantity in ("square", "sum of squares")]
    needed = needed or [slot for slot, (quantity, _) in wanted.items() if quantity == "gradient"]
    return found if all(slot in found for slot in needed) else None


def mu_product(rule: Rule, made: int) -> float:
    """NAdam's product of its momenta after ``made`` updates, in torch's order and its single precision."""
    numbers = split(rule.settings)[0]
    product = torch.ones(())
    for t in range(1, made + 1):
        product *= numbers["betas.0"] * (1 - 0.5 * 0.96 ** (t * numbers["momentum_decay"]))
    return float(product)


class Handover:
    """Hands members over from one of ``rules`` to another; a :class:`~descentlab.core.protocols.Takeover`."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = list(rules)

    def __call__(self, state: State, member: int, before: int, after: int, how: str) -> None:
        """``member`` followed ``rules[before]`` and follows ``rules[after]`` from now on; in place.

        ``how``: ``carried`` (see above), ``dropped`` (the new optimizer starts with no memory) or ``tracked`` (it has
        watched all gradients so far, see :class:`Tracking`).
        """
        old, new, made = self.rules[before], self.rules[after], int(state.opt_step[member])
        if how == "tracked":
            watched = state.shared[TRACKED][str(after)]
            self._replace(state, member, {slot: _row(tensors, member) for slot, tensors in watched.items()})
            return
        if how == "carried" and old.cls is new.cls and old.cls not in QUANTITIES:
            return  # a third party's own class: what its slots hold it knows itself
        sources = carried(old, new, made) if how == "carried" else None
        if sources is None:
            self._replace(state, member, {})
            state.opt_step[member] = 0
            return
        rows: dict[str, dict[str, Tensor]] = {}
        for slot, start in starts(new).items():
            if slot in sources:
                source, factor = sources[slot]
                rows[slot] = {name: t[member] * factor for name, t in state.slots[source].items()}
            elif slot in PER_MEMBER:
                kept = old.cls is new.cls and split(old.settings) == split(new.settings)
                value = torch.tensor(mu_product(new, made))
                rows[slot] = {n: state.slots[slot][n][member].clone() if kept else value for n in state.params}
            else:
                rows[slot] = {name: torch.full_like(p[member], start) for name, p in state.params.items()}
        self._replace(state, member, rows)

    @staticmethod
    def _replace(state: State, member: int, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The member's slots become ``rows``; those its rule has not are 0."""
        for slot, tensors in state.slots.items():
            if slot not in rows:
                for t in tensors.values():
                    t[member] = 0
        for slot, own in rows.items():
            held = state.slots.setdefault(slot, {})
            for name, row in own.items():
                if name not in held:
                    held[name] = row.new_zeros((state.members, *row.shape))
                held[name][member] = row


def _row(tensors: Mapping[str, Tensor], member: int) -> dict[str, Tensor]:
    return {name: t[member] for name, t in tensors.items()}


class Tracking:
    """An optimizer beside others that see every gradient and move no weight; a ``core.protocols.Apply``.

    Members whose variant is in ``leading`` are watched by every other of the ``rules``; their slots lie in the shared
    state. Each is torch's own rule, run on a copy of the weights that is thrown away, so weight decay is as usual.
    """

    def __init__(self, inner: StackedOptimizer, leading: Sequence[int]) -> None:
        self.inner, self.leading = inner, frozenset(leading)
        self.watching = {str(v): StackedOptimizer(r) for v, r in enumerate(inner.rules) if v not in self.leading}
        self._watched: list[int] = []

    def assign(self, variants: Sequence[int]) -> None:
        """Member m follows ``rules[variants[m]]`` from now on."""
        self.inner.assign(variants)
        self._watched = [m for m, v in enumerate(variants) if v in self.leading]

    def apply(self, state: State, grads: Tree, lr: Tensor) -> None:
        """One update of every member and of everything that is tracked, in place."""
        if not self._watched:
            state.shared.pop(TRACKED, None)
            self.inner.apply(state, grads, lr)
            return
        part_grads, rates = take(grads, self._watched), lr[self._watched]
        held: dict[str, Any] = state.shared.setdefault(TRACKED, {})
        for variant, optimizer in self.watching.items():
            slots = held.setdefault(variant, {})
            made = state.opt_step[self._watched].clone()
            server = {"params": take(state.params, self._watched), "slots": take(slots, self._watched)}
            part = State({**server, "buffers": {}, "opt_step": made})
            optimizer.apply(part, part_grads, rates)
            for slot, tensors in part.slots.items():
                tree = slots.setdefault(slot, {})
                for name, t in tensors.items():
                    if name not in tree:
                        tree[name] = t.new_zeros((state.members, *t.shape[1:]))
                    tree[name][self._watched] = t
        self.inner.apply(state, grads, lr)
