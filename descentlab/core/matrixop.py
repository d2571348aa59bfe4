"""The three operations of a convolution or linear map, each of which can go wrong on its own.

Training computes a *result* (forward), an *input gradient* and a *weight gradient*. All three are bilinear, and each
has two operands and an output. :class:`FaultyOp` runs them with edits at any of these nine places. A wrong operand is
wrong for one operation: the backward pass uses the clean operands, and the stored weight stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DIRECTIONS = ("forward", "grad_input", "grad_weight")
OPERANDS = ("a", "b", "out")


@dataclass(frozen=True)
class Lanes:
    """What an edit of operand ``a`` or ``b`` returns when only some multiply lanes get the wrong operand.

    The operation sees ``tensor`` while it computes the flat elements ``index`` of its result, and the right operand
    for all others.
    """

    tensor: Tensor
    index: Sequence[int]


Edit = Callable[[Tensor], Tensor | Lanes]  # of the tensor found at a site, without gradient
Stock = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # input, weight, bias -> result


def replaced(x: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """A copy of ``x`` with ``value`` at the flat elements ``index`` (torch's logical order); same strides."""
    out = x.clone()
    out[torch.unravel_index(index, x.shape)] = value.to(x.dtype)
    return out


def gradient(op: Stock, operands: Sequence[Tensor | None], of: int, upstream: Tensor) -> Tensor:
    """The gradient of ``op`` for its operand number ``of``, by the kernels autograd uses for the stock operation."""
    held: list[Any] = [None if t is None else t.detach() for t in operands]
    held[of].requires_grad_()
    with torch.enable_grad():
        out = op(*held)
    return torch.autograd.grad(out, held[of], upstream)[0]


def _edited(
    direction: str, op: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, edits: Mapping[tuple[str, str], Edit]
) -> Tensor:
    """``op(a, b)`` with the edits of ``direction`` at its operands and its output."""
    seen, partial = [a, b], []
    for i, operand in enumerate(("a", "b")):
        edit = edits.get((direction, operand))
        new = seen[i] if edit is None else edit(seen[i])
        if isinstance(new, Lanes):
            partial.append((i, new))
        else:
            seen[i] = new
    out = op(*seen)
    for i, wrong in partial:
        result = op(wrong.tensor, seen[1]) if i == 0 else op(seen[0], wrong.tensor)
        index = torch.tensor(wrong.index, device=out.device)
        out = replaced(out, index, result.flatten()[index])
    edit = edits.get((direction, "out"))
    if edit is not None:
        edited = edit(out)
        assert isinstance(edited, Tensor), "lanes are a matter of operands"
        out = edited
    return out


class FaultyOp(torch.autograd.Function):
    """``op(a, b, bias)`` with edits by (direction, operand). Identity edits give the bits of the stock operation."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, op: Stock, edits: Mapping[tuple[str, str], Edit]
    ) -> Tensor:
        ctx.save_for_backward(a, b, bias)
        ctx.op, ctx.edits = op, edits
        return _edited("forward", lambda x, w: op(x, w, bias), a, b, edits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        a, b, bias = ctx.saved_tensors
        op, edits = ctx.op, ctx.edits
        grads: list[Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[0]:
            of_input = lambda dy, w: gradient(op, (a, w, bias), 0, dy)  # noqa: E731
            grads[0] = _edited("grad_input", of_input, upstream, b, edits)
        if ctx.needs_input_grad[1]:
            of_weight = lambda x, dy: gradient(op, (x, b, bias), 1, dy)  # noqa: E731
            grads[1] = _edited("grad_weight", of_weight, a, upstream, edits)
        if ctx.needs_input_grad[2]:
            grads[2] = gradient(op, (a, b, bias), 2, upstream)
        return (*grads, None, None)
