"""Calls ``rules.c``: the updates of SGD, Adam, AdamW and RMSprop in one or two passes over all weights.

Results are torch's to the bit: before the first use in a process every rule is compared with torch's own class
(:func:`agrees`), and one that differs anywhere is not used. So nobody can tell from numbers which of the two ran.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.native import TYPES, enabled, library
from .eager import construct, step

SOURCE = Path(__file__).with_name("rules.c")
SLOTS = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq"), "rmsprop": ("square_avg", "momentum_buffer")}
RULES = {"SGD": "sgd", "Adam": "adam", "AdamW": "adam", "RMSprop": "rmsprop"}  # name in torch.optim -> rule
FUNCTIONS = ("sgd", "adam_moments", "adam_move", "rmsprop_square", "rmsprop_move")
UNCOVERED = ("amsgrad", "centered", "maximize", "capturable", "differentiable", "fused")


class CompiledRule:
    """One rule with its settings; ``slots``: those it keeps."""

    def __init__(self, name: str, settings: Mapping[str, Any], library: ctypes.CDLL) -> None:
        self.settings, self.library = settings, library
        self.slots = SLOTS[name] if settings.get("momentum", 1.0) != 0 else SLOTS[name][:-1]
        self._update = {"sgd": self._sgd, "adam": self._adam, "rmsprop": self._rmsprop}[name]
        self._root = torch.empty(0)  # room for square roots

    def __call__(self, p: Tensor, grad: Tensor, slots: Mapping[str, Tensor], lr: float, made: int) -> None:
        """Update number ``made`` (from 1) of contiguous ``p`` in place, and of the ``slots`` by torch's names."""
        self._update(p, grad, slots, lr, float(made))

    def _sgd(self, p: Tensor, grad: Tensor, slots: Mapping[str, Tensor], lr: float, made: float) -> None:
        s = self.settings
        numbers = _doubles(lr, s["momentum"], 1 - s["dampening"], s["weight_decay"])
        self.library.sgd(*_at(p, grad, slots.get("momentum_buffer")), *numbers, int(s["nesterov"]))

    def _adam(self, p: Tensor, grad: Tensor, slots: Mapping[str, Tensor], lr: float, made: float) -> None:
        s, first, second = self.settings, slots["exp_avg"], slots["exp_avg_sq"]
        (beta1, beta2), decay = s["betas"], s["weight_decay"]
        added, keep = (0.0, 1 - lr * decay) if s.get("decoupled_weight_decay") else (decay, 1.0)
        self.library.adam_moments(*_at(p, grad, first, second), *_doubles(1 - beta1, beta2, 1 - beta2, added))
        step, scale = lr / (1 - beta1**made), (1 - beta2**made) ** 0.5
        self.library.adam_move(*_at(p, first, self._rooted(second)), *_doubles(step, scale, s["eps"], keep))

    def _rmsprop(self, p: Tensor, grad: Tensor, slots: Mapping[str, Tensor], lr: float, made: float) -> None:
        s, square = self.settings, slots["square_avg"]
        decay = s["weight_decay"]
        self.library.rmsprop_square(*_at(p, grad, square), *_doubles(s["alpha"], 1 - s["alpha"], decay))
        numbers = _doubles(lr, s["eps"], decay, s["momentum"])
        self.library.rmsprop_move(*_at(p, grad, self._rooted(square), slots.get("momentum_buffer")), *numbers)

    def _rooted(self, t: Tensor) -> Tensor:
        if self._root.shape != t.shape or self._root.dtype != t.dtype:
            self._root = torch.empty_like(t)
        return torch.sqrt(t, out=self._root)


def _at(p: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The number of elements and all addresses."""
    return ctypes.c_int64(p.numel()), *(None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (p, *others))


def _doubles(*numbers: float) -> tuple[ctypes.c_double, ...]:
    return tuple(map(ctypes.c_double, numbers))


def compiled_rule(cls: type[torch.optim.Optimizer], settings: Mapping[str, Any], like: Tensor) -> CompiledRule | None:
    """The rule of a class of ``torch.optim`` for tensors as ``like``; None where torch has to do it."""
    name = RULES.get(cls.__name__) if getattr(torch.optim, cls.__name__, None) is cls else None
    if name is None or not enabled() or like.device.type != "cpu" or like.dtype not in TYPES:
        return None
    whole = {**_defaults(cls.__name__), **settings}
    if any(whole.get(switch) for switch in UNCOVERED) or not agrees(cls.__name__, like.dtype):
        return None
    loaded = library_for(like.dtype)
    return CompiledRule(name, whole, loaded) if loaded is not None else None


@functools.cache
def library_for(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled functions for ``dtype``; None (with a notice) where they cannot be built or loaded."""
    loaded = library(SOURCE, dtype)
    for name in FUNCTIONS if loaded is not None else ():
        getattr(loaded, name).restype = None
    return loaded


@functools.cache
def _defaults(name: str) -> dict[str, Any]:
    return dict(construct(getattr(torch.optim, name), [torch.ones(1, requires_grad=True)], {"lr": 1.0}).defaults)


TRIED: dict[str, tuple[dict[str, Any], ...]] = {
    "SGD": ({}, {"momentum": 0.9}, {"momentum": 0.7, "nesterov": True, "weight_decay": 0.03}),
    "Adam": ({}, {"betas": (0.3, 0.99), "weight_decay": 0.03}),
    "AdamW": ({"weight_decay": 0.03},),
    "RMSprop": ({}, {"momentum": 0.6, "weight_decay": 0.03}),
}


@functools.cache
def agrees(name: str, dtype: torch.dtype) -> bool:
    """Whether the compiled rule of a class gives torch's bits: in three updates of elements of all magnitudes, some not
    finite, whole vectors and a rest, with every switch on and off."""
    loaded = library_for(dtype)
    if loaded is None:
        return False
    return all(_same(name, settings, dtype, loaded) for settings in TRIED[name])


def _same(name: str, settings: Mapping[str, Any], dtype: torch.dtype, loaded: ctypes.CDLL) -> bool:
    n, rule = 1003, CompiledRule(RULES[name], {**_defaults(name), **settings}, loaded)
    at = torch.arange(1, n + 1, dtype=torch.float64)
    p = ((at * 0.7548776662).frac() - 0.5).to(dtype)  # of no pattern, and no draw from a generator of the user's
    theirs = p.clone().requires_grad_()
    optimizer = construct(getattr(torch.optim, name), [theirs], {**settings, "lr": 0.013})
    for made in (1, 2, 3):
        grad = ((at * 0.5698402910 * made).frac() - 0.5) * 10 ** ((at * 0.8191725134).frac() * 44 - 30)
        grad[made * 7 : made * 7 + 3] = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
        theirs.grad = grad.to(dtype)
        held = {k: v.clone() for k, v in optimizer.state[theirs].items() if k in rule.slots and v is not None}
        ours = theirs.detach().clone()
        step(optimizer)
        if made > 1 or not rule.slots:  # torch makes the slots in its first update
            rule(ours, theirs.grad, held, 0.013, made)
            pairs = [(ours, theirs.detach()), *((held[k], optimizer.state[theirs][k]) for k in held)]
            if not all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs):
                return False
    return True
