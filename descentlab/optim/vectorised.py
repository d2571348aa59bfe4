"""The rules of ``torch.optim`` with one setting per member: a thousand settings cost about as much as one.

``torch.optim`` takes a hyper-parameter as one number per parameter group, and a group per setting does not scale.
Here every hyper-parameter is a float64 array ``[M]`` and each rule repeats the operations of torch's own loop
(``torch/optim/*.py``, ``_single_tensor_*``) in their order, with a tensor in the place of each number::

    add(x, alpha=a)           -> addcmul(x, a)          one fused multiply-add in both
    addcmul(x, y, value=a)    -> addcmul(a x, y)        torch multiplies value * x first
    addcdiv(x, y, value=a)    -> addcdiv(a x, y)        likewise

Numbers that torch computes in Python (bias corrections) are computed in float64 here and rounded once to the dtype of
the weights, as torch does. On a CPU the result is torch's to the bit (``tests/test_vectorised.py``). Slots have
torch's names and shapes, so a checkpoint does not tell which of the two wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.state import State
from ..core.tree import Tree
from .stacked import Rule

Numbers = np.ndarray  # float64 [M]


def power(base: Numbers | float, exponent: Numbers) -> Numbers:
    """base^exponent by the C library, as torch computes it; numpy's own may differ in the last bit."""
    pairs = list(zip(np.broadcast_to(base, exponent.shape).tolist(), exponent.tolist(), strict=True))
    known = {pair: pair[0] ** pair[1] for pair in set(pairs)}
    return np.array([known[pair] for pair in pairs])


def column(numbers: Numbers, like: Tensor) -> Tensor:
    """Numbers ``[M]`` as a tensor that broadcasts along the members of ``like`` ``[M, …]``, in its dtype."""
    return torch.from_numpy(numbers).to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))


@dataclass
class Members:
    """What one update needs beside tensors: hyper-parameters and rates ``[M]``, flags that all members share, and
    ``step`` ``[M]``, the number of this update, from 1.

    ``held`` keeps tensors made of numbers that stay from update to update, ``once`` numbers that all tensors of one
    update need.
    """

    numbers: Mapping[str, Numbers]
    flags: Mapping[str, bool]
    lr: Numbers
    step: Numbers
    held: dict[Any, Tensor]
    once: dict[str, Numbers] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Numbers:
        return self.numbers[name]

    def decays(self) -> bool:
        """Whether there is weight decay; all members have it or none."""
        return bool(self["weight_decay"].any())

    def decayed(self, p: Tensor, g: Tensor) -> Tensor:
        """The gradient with the weight decay that is part of it."""
        return torch.addcmul(g, p, self.full("weight_decay", g)) if self.decays() else g

    def of(self, name: str, like: Tensor) -> Tensor:
        """A hyper-parameter (``-name``: 1 minus it) as :func:`column`."""
        key = name, like.dim(), like.dtype
        if key not in self.held:
            self.held[key] = column(1 - self[name[1:]] if name[0] == "-" else self[name], like)
        return self.held[key]

    def full(self, name: str, like: Tensor) -> Tensor:
        """The same in the shape of ``like``: operations of three tensors are slow on a broadcast one."""
        key = name, like.shape, like.dtype
        if key not in self.held:
            self.held[key] = self.of(name, like).expand(like.shape).contiguous()
        return self.held[key]

    def descend(self, p: Tensor, direction: Tensor) -> None:
        """p = p - lr direction."""
        key = "lr", p.shape, p.dtype
        if key not in self.held:
            self.held[key] = column(-self.lr, p).expand(p.shape).contiguous()
        p.addcmul_(direction, self.held[key])

    def average(self, slot: Tensor, g: Tensor, decay: str) -> None:
        """slot = decay slot + (1 - decay) g^2."""
        slot.mul_(self.of(decay, slot)).addcmul_(g * self.of(f"-{decay}", g), g)

    def corrections(self) -> tuple[Numbers, Numbers]:
        """1 - beta1^step and 1 - beta2^step."""
        if "corrections" not in self.once:
            both = [1 - power(self[name], self.step) for name in ("betas.0", "betas.1")]
            self.once["corrections"] = np.stack(both)
        one, two = self.once["corrections"]
        return one, two


Slots = Mapping[str, Tensor]
Update = Callable[[Members, Tensor, Tensor, Slots], None]  # (members, weights, gradient, slots): in place


def sgd(m: Members, p: Tensor, g: Tensor, s: Slots) -> None:
    """b = momentum b + (1 - dampening) g, from b = g; p = p - lr b, or p - lr (g + momentum b) with Nesterov."""
    g = m.decayed(p, g)
    if "momentum_buffer" in s:
        b = s["momentum_buffer"]
        begun = m.step > 1
        if begun.all():
            b.mul_(m.of("momentum", b)).addcmul_(g, m.full("-dampening", g))
        else:
            later = (b * m.of("momentum", b)).addcmul_(g, m.full("-dampening", g))
            b.copy_(torch.where(column(begun.astype(float), b).bool(), later, g))
        g = torch.addcmul(g, b, m.full("momentum", g)) if m.flags["nesterov"] else b
    m.descend(p, g)


def adam(m: Members, p: Tensor, g: Tensor, s: Slots, *, decoupled: bool = False) -> None:
    """p = p - lr m' / (sqrt(v') + eps), m' and v' the bias-corrected averages of g and g^2; AMSGrad: the largest v."""
    if decoupled and m.decays():
        p.mul_(column(1 - m.lr * m["weight_decay"], p))
    elif not decoupled:
        g = m.decayed(p, g)
    s["exp_avg"].lerp_(g, m.full("-betas.0", g))
    m.average(s["exp_avg_sq"], g, "betas.1")
    v = s["exp_avg_sq"]
    if m.flags["amsgrad"]:
        v = torch.maximum(s["max_exp_avg_sq"], v, out=s["max_exp_avg_sq"])
    one, two = m.corrections()
    if "root" not in m.once:
        m.once["root"] = power(two, np.full_like(two, 0.5))
    denominator = v.sqrt().div_(column(m.once["root"], v)).add_(m.of("eps", v))
    p.addcdiv_(s["exp_avg"] * column(-(m.lr / one), p), denominator)


def adamw(m: Members, p: Tensor, g: Tensor, s: Slots) -> None:
    """Adam after p = (1 - lr weight_decay) p."""
    adam(m, p, g, s, decoupled=True)


def nadam(m: Members, p: Tensor, g: Tensor, s: Slots) -> None:
    """Adam with mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2) for Nesterov's look ahead."""
    if m.flags["decoupled_weight_decay"]:
        if m.decays():
            p.mul_(column(1 - m.lr * m["weight_decay"], p))
    else:
        g = m.decayed(p, g)
    if "mu" not in m.once:
        for key, t in (("mu", m.step), ("ahead", m.step + 1)):
            m.once[key] = m["betas.0"] * (1 - 0.5 * power(0.96, t * m["momentum_decay"]))
    mu, ahead = m.once["mu"], m.once["ahead"]
    product = s["mu_product"]  # [M], in torch's scalar dtype
    product.mul_(column(mu, product))
    reached = product.double().cpu().numpy()
    s["exp_avg"].lerp_(g, m.full("-betas.0", g))
    m.average(s["exp_avg_sq"], g, "betas.1")
    v = s["exp_avg_sq"].div(column(m.corrections()[1], p))
    denominator = v.sqrt_().add_(m.of("eps", p))
    p.addcdiv_(g * column(-m.lr * (1 - mu) / (1 - reached), g), denominator)
    p.addcdiv_(s["exp_avg"] * column(-m.lr * ahead / (1 - reached * ahead), p), denominator)


def rmsprop(m: Members, p: Tensor, g: Tensor, s: Slots) -> None:
    """p = p - lr g / (sqrt(v) + eps), v the average of g^2, less the squared average of g if centred."""
    g = m.decayed(p, g)
    v = s["square_avg"]
    m.average(v, g, "alpha")
    if m.flags["centered"]:
        s["grad_avg"].lerp_(g, m.full("-alpha", g))
        v = v.addcmul(s["grad_avg"], s["grad_avg"], value=-1)
    denominator = v.sqrt().add_(m.of("eps", v))
    if "momentum_buffer" in s:
        b = s["momentum_buffer"]
        b.mul_(m.of("momentum", b)).addcdiv_(g, denominator)
        m.descend(p, b)
    else:
        p.addcdiv_(g * column(-m.lr, g), denominator)


def adagrad(m: Members, p: Tensor, g: Tensor, s: Slots) -> None:
    """p = p - lr / (1 + (t - 1) lr_decay) g / (sqrt(sum of g^2) + eps)."""
    g = m.decayed(p, g)
    rate = m.lr / (1 + (m.step - 1) * m["lr_decay"])
    s["sum"].addcmul_(g, g)
    p.addcdiv_(g * column(-rate, g), s["sum"].sqrt().add_(m.of("eps", g)))


def adadelta(m: Members, p: Tensor, g: Tensor, s: Slots) -> None:
    """d = g sqrt(u + eps) / sqrt(v + eps), u and v the averages of d^2 and g^2; p = p - lr d."""
    g = m.decayed(p, g)
    m.average(s["square_avg"], g, "rho")
    eps = m.of("eps", g)
    d = (s["acc_delta"] + eps).sqrt_().div_((s["square_avg"] + eps).sqrt_()).mul_(g)
    m.average(s["acc_delta"], d, "rho")
    m.descend(p, d)


Starts = Mapping[str, Numbers | float]


@dataclass(frozen=True)
class _Form:
    """A rule, and the slots it has under given numbers and flags: name -> what they start at, a number or ``[M]``."""

    update: Update
    slots: Callable[[Mapping[str, Numbers], Mapping[str, bool]], Starts]


def _moments(n: Mapping[str, Numbers], f: Mapping[str, bool]) -> Starts:
    return {"exp_avg": 0.0, "exp_avg_sq": 0.0, **({"max_exp_avg_sq": 0.0} if f["amsgrad"] else {})}


def _rmsprop_slots(n: Mapping[str, Numbers], f: Mapping[str, bool]) -> Starts:
    buffer = {"momentum_buffer": 0.0} if n["momentum"].any() else {}
    return {"square_avg": 0.0} | buffer | ({"grad_avg": 0.0} if f["centered"] else {})


FORMS: dict[type, _Form] = {
    torch.optim.SGD: _Form(sgd, lambda n, f: {"momentum_buffer": 0.0} if n["momentum"].any() else {}),
    torch.optim.Adam: _Form(adam, _moments),
    torch.optim.AdamW: _Form(adamw, _moments),
    torch.optim.NAdam: _Form(nadam, lambda n, f: {"mu_product": 1.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}),
    torch.optim.RMSprop: _Form(rmsprop, _rmsprop_slots),
    torch.optim.Adagrad: _Form(adagrad, lambda n, f: {"sum": n["initial_accumulator_value"]}),
    torch.optim.Adadelta: _Form(adadelta, lambda n, f: {"square_avg": 0.0, "acc_delta": 0.0}),
}
PER_MEMBER = ("mu_product",)  # one number per member and tensor, where other slots have the tensor's shape


def split(settings: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, bool]]:
    """(numbers, flags) of an optimizer's settings; the betas become ``betas.0`` and ``betas.1``."""
    numbers: dict[str, float] = {}
    flags: dict[str, bool] = {}
    for key, value in settings.items():
        if isinstance(value, bool):
            flags[key] = value
        elif isinstance(value, list | tuple):
            numbers |= {f"{key}.{i}": float(v) for i, v in enumerate(value)}
        else:
            numbers[key] = float(value)
    return numbers, flags


def alike(rules: Sequence[Rule]) -> bool:
    """Whether one vectorised update can hold these rules: one class of :data:`FORMS`, equal flags, and every number
    zero in all of them or in none (a zero switches a part of a rule off, and its slot with it)."""
    kinds = set()
    for rule in rules:
        numbers, flags = split({key: value for key, value in rule.settings.items() if key != "lr"})
        kinds.add((rule.cls, *sorted(flags.items()), *sorted((name, n == 0) for name, n in numbers.items())))
    return len(kinds) == 1 and rules[0].cls in FORMS


@dataclass
class VectorisedOptimizer:
    """The :class:`~descentlab.core.protocols.Apply` of many settings; ``rules`` as :func:`alike` wants them.

    :meth:`assign` says which of them each member has; of a single one it need not be called.
    """

    rules: Sequence[Rule]
    _variants: np.ndarray | None = field(default=None, repr=False)
    _numbers_of: dict[str, Numbers] = field(default_factory=dict, repr=False)  # by member
    _held: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    _rates: Numbers | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not alike(self.rules):
            raise ValueError("rules of different kinds in one vectorised update")
        self._form = FORMS[self.rules[0].cls]
        numbers = [split(rule.settings)[0] for rule in self.rules]
        self._numbers = {name: np.array([n[name] for n in numbers]) for name in numbers[0] if name != "lr"}
        self._flags = split(self.rules[0].settings)[1]

    @property
    def rule(self) -> Rule:
        """The first of the rules."""
        return self.rules[0]

    def assign(self, variants: Sequence[int]) -> None:
        """Member m follows ``rules[variants[m]]`` from now on."""
        self._variants = np.asarray(variants, dtype=np.int64)
        self._numbers_of, self._held = {}, {}

    @torch.no_grad()
    def apply(self, state: State, grads: Tree, lr: Tensor) -> None:
        """One update of every member, in place. ``grads``: name -> ``[M, …]``; ``lr``: ``[M]`` float64."""
        made = state.opt_step.cpu().numpy().astype(np.float64)
        if len(self.rules) == 1 and (self._variants is None or len(self._variants) != len(made)):
            self.assign([0] * len(made))
        if self._variants is None or len(self._variants) != len(made):
            raise ValueError(f"{len(made)} members: assign() has not said which rule each of them has")
        if not self._numbers_of:
            self._numbers_of = {name: values[self._variants] for name, values in self._numbers.items()}
        rates = lr.double().cpu().numpy().copy()
        if self._rates is None or not np.array_equal(rates, self._rates):
            self._rates = rates
            self._held = {key: tensor for key, tensor in self._held.items() if key[0] != "lr"}
        members = Members(self._numbers_of, self._flags, rates, made + 1, self._held)
        starts = self._form.slots(self._numbers_of, self._flags)
        for name, p in state.params.items():
            slots = {slot: self._slot(state, slot, name, p, start, made == 0) for slot, start in starts.items()}
            self._form.update(members, p, grads[name], slots)
        state.opt_step.add_(1)

    def _slot(self, state: State, slot: str, name: str, p: Tensor, start: Numbers | float, fresh: np.ndarray) -> Tensor:
        """The stored slot; members at their first update have theirs (re)set to where the rule starts."""
        tree = state.slots.setdefault(slot, {})
        if name not in tree:
            per_member = slot in PER_MEMBER
            tree[name] = torch.ones(len(fresh)) if per_member else torch.zeros_like(p)
        if fresh.any():
            first = np.broadcast_to(np.asarray(start, dtype=np.float64), fresh.shape)[fresh]
            at = torch.from_numpy(fresh).to(tree[name].device)
            tree[name][at] = column(first, tree[name]).expand(tree[name][at].shape)
        return tree[name]
