"""The three operations of a convolution or linear map, each of which can go wrong on its own.

Training computes a *result* (forward), an *input gradient* and a *weight gradient*. All three are bilinear, and each
has two operands and an output. :class:`FaultyOp` runs them with edits at any of these nine places. A wrong operand is
wrong for one operation: the backward pass uses the clean operands, and the stored weight stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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
    rest, places = index, []
    for size in reversed(x.shape):  # torch.unravel_index imports sympy, a second per process
        places.append(rest % size)
        rest = rest // size
    out[tuple(reversed(places))] = value.to(x.dtype)
    return out


def gradient(op: Stock, operands: Sequence[Tensor | None], of: int, upstream: Tensor) -> Tensor:
    """The gradient of ``op`` for its operand number ``of``, by the kernels autograd uses for the stock operation.

    Linear maps and convolutions (alone or as a ``partial`` with options) call those kernels themselves; anything else
    is differentiated, which imports sympy, a second per process.
    """
    held: list[Any] = [None if t is None else t.detach() for t in operands]
    stock, options = (op.func, op.keywords) if isinstance(op, partial) else (op, {})
    if stock is F.linear and held[0].dim() > 1:
        return _linear_gradient(held[0], held[1], of, upstream)
    dims = _CONVOLUTIONS.get(stock)
    if dims is not None and held[0].dim() == dims + 2 and not isinstance(options.get("padding"), str):
        return _convolution_gradient(held, of, upstream, dims, options)
    held[of].requires_grad_()
    with torch.enable_grad():
        out = op(*held)
    return torch.autograd.grad(out, held[of], upstream)[0]


_CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}  # -> spatial dimensions


def _linear_gradient(a: Tensor, b: Tensor, of: int, upstream: Tensor) -> Tensor:
    dy = upstream.reshape(-1, upstream.shape[-1])
    if of == 0:
        return dy.mm(b).view_as(a)
    return dy.t().mm(a.reshape(-1, a.shape[-1])) if of == 1 else dy.sum(0)


def _convolution_gradient(
    operands: Sequence[Any], of: int, upstream: Tensor, dims: int, options: Mapping[str, Any]
) -> Tensor:
    def each(name: str, default: int) -> list[int]:
        value = options.get(name, default)
        values = [value] if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    a, b, bias = operands
    geometry = each("stride", 1), each("padding", 0), each("dilation", 1), False, [0] * dims
    asked = [of == i for i in range(3)]
    sizes = None if bias is None else list(bias.shape)
    found = torch.ops.aten.convolution_backward(upstream, a, b, sizes, *geometry, options.get("groups", 1), asked)
    return found[of]


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
