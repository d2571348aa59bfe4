"""Does an optimizer class keep the promises the engines rely on?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.state import State
from ..core.tree import Tree, clone, leaves, take
from ..optim.stacked import Rule, StackedOptimizer

SHAPES: dict[str, tuple[int, ...]] = {"weight": (5, 4), "kernel": (3, 2, 3, 3), "bias": (5,)}
MEMBERS, STEPS = 3, 10


def check_optimizer(cls: type[torch.optim.Optimizer], settings: Mapping[str, Any]) -> None:
    """``cls(params, **settings)`` with ``lr`` among the settings, on an ensemble of three members.

    It moves the weights and keeps them finite; an ensemble gives what each member alone gives, to the bit; taking the
    state apart at any step and going on with a new instance gives the same, to the bit; lr = 0 moves nothing.
    """
    name = f"{cls.__module__}:{cls.__qualname__}"
    assert isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer), f"{name} is no torch.optim.Optimizer"
    assert "lr" in settings, f"{name}: settings need an 'lr'"
    rule = Rule(cls, dict(settings))
    whole = _train(rule, _start(), range(STEPS))
    for key, p in whole.params.items():
        assert torch.isfinite(p).all(), f"{name}: '{key}' is not finite after {STEPS} steps"
        assert not torch.equal(p, _start().params[key]), f"{name}: '{key}' did not move in {STEPS} steps"
    for m in range(MEMBERS):
        alone = _train(rule, _start().take([m]), range(STEPS), lambda g, m=m: take(g, [m]))  # type: ignore[misc]
        _same(whole.take([m]), alone, f"{name}: member {m} of an ensemble differs from the same member alone")
    for cut in (1, STEPS // 2):
        resumed = _train(rule, _train(rule, _start(), range(cut)).clone(), range(cut, STEPS))
        what = f"{name}: a run taken up after {cut} steps differs from the undisturbed one; state is kept outside"
        _same(whole, resumed, f"{what} optimizer.state, or not as tensors shaped like the parameter or one number")
    frozen = _train(rule, _start(), range(2), lr=0.0)
    unmoved = all(torch.equal(p, _start().params[key]) for key, p in frozen.params.items())
    assert unmoved, f"{name}: weights move at lr = 0; take the rate from group['lr'] at every step"


def _start() -> State:
    generator = torch.Generator().manual_seed(0)
    params = {k: torch.randn(MEMBERS, *s, dtype=torch.float64, generator=generator) for k, s in SHAPES.items()}
    return State.start(params, {})


def _gradient(step: int) -> Tree:
    generator = torch.Generator().manual_seed(1000 + step)
    return {k: torch.randn(MEMBERS, *s, dtype=torch.float64, generator=generator) for k, s in SHAPES.items()}


def _train(
    rule: Rule, state: State, steps: range, pick: Callable[[Tree], Tree] = clone, lr: float | None = None
) -> State:
    optimizer = StackedOptimizer(rule)
    rates = torch.full((state.members,), rule.lr if lr is None else lr, dtype=torch.float64)
    for step in steps:
        optimizer.apply(state, pick(_gradient(step)), rates)
    return state


def _same(a: State, b: State, message: str) -> None:
    pairs: list[tuple[Tensor, Tensor]] = list(zip(leaves(a.server), leaves(b.server), strict=True))
    assert all(torch.equal(x, y) for x, y in pairs), message
