"""Does an optimizer class mix the members of a stacked tensor? Proved before training, not assumed.

Members get gradients of very different scale (1e-2 beside 1e3) and one gets Inf, NaN or 1e30; the class then runs 12
updates stacked and 12 alone. An element-wise rule gives the same bits. LARS, gradient clipping, centralised or
normalised gradients, Adafactor and skip-if-non-finite rules do not. A rule that starts mixing after more updates than
that is not caught. A user's ``step`` is called up to 96 times for this: 3 members alone, 3 stacks, 2 x 12 for the rate.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .eager import step

if TYPE_CHECKING:
    from .stacked import Rule

STEPS = 12
SCALES = (1e-2, 1e3, 1.0, 1.0)
POISONS = (math.inf, math.nan, 1e30)
SHAPES = ((5, 3), (4,), (2, 3, 2, 2))


def mixes_members(rule: Rule) -> bool:
    """True when stacked and single updates differ in any bit, or when the class refuses the stacked shape."""
    try:
        alone = [_trained(rule, member) for member in range(len(SCALES) - 1)]
        return any(_differs(rule, poison, alone) for poison in POISONS)
    except (RuntimeError, ValueError, IndexError):  # a class that insists on matrices cannot be stacked
        return True


def _differs(rule: Rule, poison: float, alone: list[list[torch.Tensor]]) -> bool:
    stacked = _trained(rule, poison=poison)
    return any(not torch.equal(p[m], q) for m, own in enumerate(alone) for p, q in zip(stacked, own, strict=True))


def _trained(rule: Rule, member: int | None = None, poison: float = 0.0) -> list[torch.Tensor]:
    """The weights after all updates: of one member by itself, or stacked, the last one meeting ``poison``."""
    generator = torch.Generator().manual_seed(0)
    members = len(SCALES)

    def own(stacked: torch.Tensor) -> torch.Tensor:
        return stacked if member is None else stacked[member].clone()

    params = [own(torch.randn(members, *s, generator=generator)).requires_grad_() for s in SHAPES]
    optimizer = rule.make(list(params), rule.lr)
    for update in range(STEPS):
        for param, shape in zip(params, SHAPES, strict=True):
            grad = torch.randn(members, *shape, generator=generator)
            grad *= torch.tensor(SCALES).view(-1, *[1] * len(shape))
            if update >= 2:
                grad[-1] = poison
            param.grad = own(grad)
        step(optimizer)
    return [param.detach() for param in params]


def linear_in_lr(rule: Rule) -> bool:
    """True when stepping at lr 1 and rescaling the displacement gives the same trajectory as stepping at lr."""
    generator = torch.Generator().manual_seed(1)
    lr = 0.37 * rule.lr
    plain = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    scaled = plain.detach().clone().requires_grad_()
    direct, unit = rule.make([plain], lr), rule.make([scaled], 1.0)
    for _ in range(STEPS):
        grad = torch.randn(6, dtype=torch.float64, generator=generator)
        plain.grad, scaled.grad = grad.clone(), grad.clone()
        before = scaled.detach().clone()
        step(direct)
        step(unit)
        with torch.no_grad():
            scaled.sub_(before).mul_(lr).add_(before)
    return torch.allclose(plain, scaled, rtol=1e-9, atol=1e-12)
