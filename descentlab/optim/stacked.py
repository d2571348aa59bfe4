"""Any ``torch.optim`` class on an ensemble, without rewriting its rule.

The class sees contiguous slices of the stacked tensors as its parameters, so one call updates every member of the
slice in place. Members share a slice while they have the same settings and have made the same number of updates
(``step`` is one scalar per tensor in torch). A block of many settings takes :mod:`descentlab.optim.vectorised`. A class
that mixes members (a norm over the whole tensor, a matrix decomposition) is detected before training by
:mod:`descentlab.optim.member_check` and then runs member by member.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.flat import base_of, joined, side_by_side, split
from ..core.state import State
from ..core.tree import Tree, clone
from .compiled import CompiledRule, compiled_rule
from .eager import construct, step

SLOT_KINDS = {
    "momentum_buffer": "momentum",
    "exp_avg": "first_moment",
    "exp_avg_sq": "second_moment",
    "max_exp_avg_sq": "second_moment",
    "square_avg": "second_moment",
    "grad_avg": "first_moment",
    "sum": "accumulator",
    "acc_delta": "accumulator",
}
TORCH_CLASSES = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "nadam": "NAdam",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
    "adadelta": "Adadelta",
}
ALL = "*"
KNOWN = frozenset(getattr(torch.optim, name) for name in TORCH_CLASSES.values())  # checked by tests, not by every run


@dataclass(frozen=True)
class Rule:
    """An optimizer class and its hyper-parameters, ``lr`` among them."""

    cls: type[torch.optim.Optimizer]
    settings: Mapping[str, Any]

    @property
    def lr(self) -> float:
        return float(self.settings["lr"])

    def make(self, tensors: list[Tensor], lr: float) -> torch.optim.Optimizer:
        """An instance over ``tensors``; never the fused kernel, whose bits depend on the grouping."""
        return construct(self.cls, tensors, {**self.settings, "lr": lr})


def torch_rule(name: str, settings: Mapping[str, Any]) -> Rule:
    return Rule(getattr(torch.optim, TORCH_CLASSES[name]), dict(settings))


def external_rule(name: str, cls: Any, settings: Mapping[str, Any]) -> Rule:
    """The rule of a third party's class; one that is no optimizer or refuses its settings is a UserError here."""
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise UserError("optimizer", name, "a subclass of torch.optim.Optimizer")
    rule = Rule(cls, dict(settings))
    try:
        rule.make([torch.ones(2, 2, requires_grad=True)], rule.lr)
    except (TypeError, ValueError, AssertionError) as error:
        given = {k: v for k, v in settings.items() if k != "lr"}
        raise UserError("optimizer.options", given, f"arguments that {name} takes ({error})") from None
    return rule


def slot_sizes(rule: Rule) -> dict[str, int]:
    """The slots that a rule has after one step on a small tensor, and the dimensions of each; without the count."""
    p = torch.ones(2, 3, requires_grad=True)
    p.grad = torch.ones(2, 3)
    optimizer = rule.make([p], rule.lr)
    step(optimizer)
    slots = optimizer.state[p].items()
    return {k: torch.as_tensor(v).dim() for k, v in slots if k != "step" and v is not None}


def scalar_slots(rule: Rule) -> frozenset[str]:
    """Slots that torch keeps as one scalar per tensor (NAdam's ``mu_product``); here they are one per member."""
    return frozenset(slot for slot, dim in slot_sizes(rule).items() if dim == 0)


@dataclass
class _Bound:
    """One optimizer instance tied to members ``first`` to ``last`` of one state's tensors."""

    first: int
    last: int
    optimizer: torch.optim.Optimizer
    views: dict[str, Tensor]  # by name; of weights that lie side by side all in one, by the name ALL
    compiled: CompiledRule | None = None  # does the same as ``optimizer`` to the one view there is, and keeps nothing
    slots: dict[str, Tensor] = field(default_factory=dict)  # of it
    made: int = 0  # updates before this one


@dataclass
class StackedOptimizer:
    """The server half of a step (the :class:`~descentlab.core.protocols.Apply` protocol).

    ``separate`` forces member-by-member updates; None decides by the member check. ``rules``: those that members can
    have, ``rule`` alone where empty; :meth:`assign` says which is whose. Rules of several classes see their own slots
    only. Different learning rates inside a slice are met by rescaling the displacement, or with ``by_rate`` by slices
    of one rate each, which is exact. Weights that lie side by side (:mod:`descentlab.core.flat`) are one tensor to a
    shipped rule, which treats every element alike; compiled code may then do what torch would (:mod:`.compiled`).
    """

    rule: Rule
    separate: bool | None = None
    rules: Sequence[Rule] = ()
    by_rate: bool = False
    _variants: list[int] | None = field(default=None, repr=False)
    _scalars: frozenset[str] = frozenset()
    _own: list[frozenset[str]] = field(default_factory=list, repr=False)  # slots of each rule where they differ
    _linear: bool = True
    _flat: bool = False  # whether the rules take weights that lie side by side as one tensor
    _whole: dict[str, tuple[Tree, Tree]] = field(default_factory=dict, repr=False)  # slot -> its tree, and that as ALL
    _bound: list[_Bound] = field(default_factory=list, repr=False)
    _compiled: dict[int, CompiledRule | None] = field(default_factory=dict, repr=False)  # by rule
    _owner: tuple[Tree, Tree, list[int], list[tuple[int, int]]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.rules = self.rules or (self.rule,)
        if self.separate is None:
            from .member_check import linear_in_lr, mixes_members

            asked = [rule for rule in self.rules if rule.cls not in KNOWN]
            self.separate = any(mixes_members(rule) for rule in asked)
            self._linear = self.separate or all(linear_in_lr(rule) for rule in asked)
        if not self.separate:
            self._scalars = frozenset().union(*(scalar_slots(rule) for rule in self.rules))
        self._flat = not self._scalars and all(rule.cls in KNOWN for rule in self.rules)
        if len(self.rules) > 1:
            own = [frozenset(slot_sizes(rule)) for rule in self.rules]
            self._own = own if len(set(own)) > 1 else []

    def assign(self, variants: Sequence[int]) -> None:
        """Member m follows ``rules[variants[m]]`` from now on; those of one rule side by side make long slices."""
        self._variants = list(variants)

    def apply(self, state: State, grads: Tree, lr: Tensor) -> None:
        """One update of every member, in place. ``grads``: name -> ``[M, …]``; ``lr``: ``[M]`` float64."""
        rates = lr.tolist()
        if not self._linear and len(set(rates)) > 1:  # Rprop's lr is a state, not a factor
            self.separate, self._scalars, self._linear, self._owner = True, frozenset(), True, None
        steps = state.opt_step.tolist()
        self._bind(state, rates, steps)
        if ALL in self._bound[0].views:
            grads = {ALL: joined(grads)}
        for bound in self._bound:
            part = rates[bound.first : bound.last]
            for name, view in bound.views.items():
                view.grad = self._view(grads[name], bound)
            bound.made = steps[bound.first]
            if part.count(part[0]) == len(part):
                self._step(bound, part[0])
            else:
                self._step_many_rates(bound, lr[bound.first : bound.last])
            for view in bound.views.values():
                view.grad = None
        if self._collect_slots(state):
            self._owner = None
        state.opt_step.add_(1)

    def _view(self, t: Tensor, bound: _Bound) -> Tensor:
        return t[bound.first] if self.separate else t.narrow(0, bound.first, bound.last - bound.first)

    def _step(self, bound: _Bound, lr: float) -> None:
        if bound.compiled is not None:
            view = bound.views[ALL]
            assert view.grad is not None
            bound.compiled(view, view.grad.contiguous(), bound.slots, lr, bound.made + 1)
            return
        for group in bound.optimizer.param_groups:
            group["lr"] = lr
        step(bound.optimizer)

    def _step_many_rates(self, bound: _Bound, lr: Tensor) -> None:
        """Step at lr 1, then rescale the displacement; right for rules whose update is linear in lr."""
        before = clone(bound.views)
        self._step(bound, 1.0)
        with torch.no_grad():
            for name, view in bound.views.items():
                rate = lr.to(view.dtype).view(-1, *[1] * (view.dim() - 1))
                view.sub_(before[name]).mul_(rate).add_(before[name])

    def _bind(self, state: State, rates: list[float], steps: list[int]) -> None:
        """(Re)build the instances when the tensors, whose is which rule or the slices have changed."""
        variants = self._variants or [0] * len(steps)
        groups = self._groups(steps, variants, rates)
        if self._owner is not None:
            params, slots, old_variants, old = self._owner
            if params is state.params and slots is state.slots and old_variants == variants and old == groups:
                return
        base = base_of(state.params) if self._flat and not self.separate else None
        params = state.params if base is None else {ALL: base}
        self._whole = {}
        stored = state.slots if base is None else {slot: self._slot_tree(state, slot, base) for slot in state.slots}
        self._bound = [self._bind_group(state, first, last, variants[first], params, stored) for first, last in groups]
        self._owner = (state.params, state.slots, variants, groups)

    def _groups(self, steps: list[int], variants: list[int], rates: list[float]) -> list[tuple[int, int]]:
        if self.separate:
            return [(m, m + 1) for m in range(len(steps))]
        kinds = list(zip(steps, variants, rates if self.by_rate else steps, strict=True))
        if kinds.count(kinds[0]) == len(kinds):
            return [(0, len(kinds))]
        cuts = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
        return list(itertools.pairwise(cuts))

    def _bind_group(self, state: State, first: int, last: int, variant: int, params: Tree, slots: Tree) -> _Bound:
        bound = _Bound(first, last, None, {})  # type: ignore[arg-type]
        bound.views = {n: self._view(p, bound).detach().requires_grad_() for n, p in params.items()}
        made = int(state.opt_step[first])
        if ALL in params and self._compile(bound, variant, slots if made else {}):
            return bound
        bound.optimizer = self.rules[variant].make(list(bound.views.values()), 1.0)
        if made:
            for name, view in bound.views.items():
                entry: dict[str, Any] = {"step": torch.tensor(float(made))}
                for slot, stored in slots.items():
                    if name in stored and (not self._own or slot in self._own[variant]):
                        entry[slot] = self._slot(slot, stored[name], bound)
                bound.optimizer.state[view] = entry
        return bound

    def _compile(self, bound: _Bound, variant: int, slots: Tree) -> bool:
        """Whether compiled code can make the updates of these members: torch makes the first, and with it the slots."""
        if variant not in self._compiled:
            of = self.rules[variant]
            self._compiled[variant] = compiled_rule(of.cls, of.settings, bound.views[ALL])
        rule = self._compiled[variant]
        if rule is None or any(ALL not in slots.get(slot, ()) for slot in rule.slots):
            return False
        bound.compiled, bound.slots = rule, {slot: self._view(slots[slot][ALL], bound) for slot in rule.slots}
        return True

    def _slot(self, slot: str, stored: Tensor, bound: _Bound) -> Tensor:
        return stored[bound.first].clone() if slot in self._scalars else self._view(stored, bound)

    def _slot_tree(self, state: State, slot: str, like: Tensor) -> Tree:
        """A slot of weights that lie side by side, as one tensor named ALL; made of zeros where the state has none."""
        held = state.slots.get(slot)
        if held is None or self._whole.get(slot, (None, {}))[0] is not held:
            if held is None:
                base = like.new_zeros((state.members, like.shape[1]))
                held = state.slots[slot] = split(base, state.params)
            else:
                held = state.slots[slot] = side_by_side(held)
            self._whole[slot] = held, {ALL: joined(held)}
        return self._whole[slot][1]

    def _collect_slots(self, state: State) -> bool:
        """Copy what an instance keeps outside the stacked storage; True if it must be bound to new storage."""
        created = False
        for bound in self._bound:
            if bound.compiled is not None:
                continue
            for name, view in bound.views.items():
                for slot, value in bound.optimizer.state.get(view, {}).items():
                    if slot == "step" or value is None:
                        continue
                    value = torch.as_tensor(value)
                    scalar = slot in self._scalars
                    tree = self._slot_tree(state, slot, value) if name == ALL else state.slots.setdefault(slot, {})
                    if name not in tree:
                        shape = value.shape if scalar or self.separate else value.shape[1:]
                        tree[name] = value.new_zeros((state.members, *shape))
                    target = tree[name][bound.first] if self.separate else tree[name][bound.first : bound.last]
                    if target.data_ptr() != value.data_ptr():
                        target.copy_(value)
                        created = created or not scalar
        return created
