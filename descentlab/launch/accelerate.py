"""Mixed precision and torch.compile for the forward passes of training steps; both off by default.

They change the module's own forward, so parameters keep their names. Evaluations and perturbed operations that look
at the module in evaluation mode run as without them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..engine.parts import Parts
from ..engine.work import MemberWork, VmapWork

Forward = Callable[[Tensor], Tensor]


def check_switches(cell: Any, route: str) -> None:
    """Raise :class:`UserError` for a switch that the route of a cell cannot have."""
    backend = getattr(cell, "compile", "none")
    if backend != "none" and route == "vmap":
        expected = "none for a model whose members are trained in one vectorised call, which torch.compile cannot enter"
        raise UserError("compile", backend, f"{expected} (convolutions on a CPU train one member after the other)")


def accelerate(cell: Any, parts: Parts) -> None:
    """Give both works of ``parts`` a forward pass with autocast and compilation, as the cell asks."""
    single = parts.single
    assert isinstance(single, MemberWork)
    if not isinstance(parts.many, MemberWork | VmapWork):  # written out: it would not see autocast; it still evaluates
        parts.many = VmapWork(copy.deepcopy(single.module), single.objective, single.per_sample)
    works = [work for work in (parts.many, single) if isinstance(work, MemberWork | VmapWork)]
    for module in {id(work.module): work.module for work in works}.values():
        _replace_forward(module, cell)


def _replace_forward(module: nn.Module, cell: Any) -> None:
    plain: Forward = module.forward
    fast: Forward = torch.compile(plain, backend=cell.compile) if cell.compile != "none" else plain
    if cell.amp != "none":
        fast = _autocast(fast, getattr(torch, cell.amp))

    def forward(x: Tensor) -> Tensor:
        return (fast if module.training else plain)(x)

    module.forward = forward


def _autocast(inner: Forward, dtype: torch.dtype) -> Forward:
    def forward(x: Tensor) -> Tensor:
        # casts of stacked weights must not outlive the call they belong to: no cache
        with torch.autocast(x.device.type, dtype=dtype, cache_enabled=False):
            return inner(x).float()

    return forward
