"""A fault in your own training loop: wrong values in one operation of any ``nn.Module``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import UserError, nearest
from ..core.matrixop import DIRECTIONS, OPERANDS, replaced
from ..core.opmode import OpMode, OpRecord, Ops, Site
from ..core.streams import Streams
from .positions import hittable_layers, role, to_logical, walk


@dataclass(frozen=True)
class Injected:
    """What one injection changed: the flat elements ``index`` of a tensor of ``shape``, before and after."""

    layer: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    old: tuple[float, ...]
    new: tuple[float, ...]


@dataclass(frozen=True)
class _Places:
    """Which elements: flat ``index``, or a run of ``elements`` along channels drawn from ``seed``."""

    index: Sequence[int] | None
    elements: int | None
    seed: int

    def of(self, shape: tuple[int, ...], kind: str, role: str) -> list[int]:
        """Flat elements of a tensor of ``shape``; runs start at a multiple of their length, as in planned faults."""
        size = math.prod(shape)
        if self.index is not None:
            wrong = [i for i in self.index if not 0 <= i < size]
            if wrong:
                raise UserError("index", wrong[0], f"0 to {size - 1}, the elements of a tensor of shape {shape}")
            return [int(i) for i in self.index]
        n = self.elements
        assert n is not None
        if n > size:
            raise UserError("elements", n, f"at most {size}, the elements of a tensor of shape {shape}")
        first = n * int(Streams(self.seed).integers("inject", size // n, replicate=0)[0])
        return [int(i) for i in to_logical(np.arange(first, first + n), shape, walk(kind, role, len(shape)))]


class _OwnLoopMode(OpMode):
    """:class:`OpMode` beside a training loop that draws its own dropout masks; remembers what kind of operation a
    layer computes."""

    kind = "linear"

    def _dropout(self, layer: str, call: int, func: Any, args: tuple, kwargs: dict) -> Tensor:
        return func(*args, **kwargs)

    def _matrix_op(self, layer: str, call: int, kind: str, func: Any, args: tuple, kwargs: dict) -> Tensor:
        if (layer, call) in self._edits:
            self.kind = kind
        return super()._matrix_op(layer, call, kind, func, args, kwargs)


@contextmanager
def inject(
    model: nn.Module,
    *,
    layer: str,
    value: float,
    index: Sequence[int] | None = None,
    elements: int | None = None,
    seed: int = 0,
    call: int = 0,
    direction: str = "forward",
    operand: str = "out",
) -> Iterator[list[Injected]]:
    """While active, one operation of ``model`` sees or gives wrong values; all others run on the right ones.

    ``layer`` is a name from ``model.named_modules()`` whose module computes a convolution or a linear map. The tensor
    at ``direction`` and ``operand`` (:class:`~descentlab.core.opmode.Site`; by default the result, before the bias)
    gets ``value`` at the flat elements ``index`` (torch's order), or at ``elements`` consecutive elements along
    channels, at a place drawn from ``seed``. Only the ``call``-th execution of the layer inside the block is hit; for
    ``grad_input`` and ``grad_weight`` the backward pass belongs into the block too. The block yields a list that holds
    an :class:`Injected` once the operation has run. Raises :class:`UserError` for an unknown layer or site, a position
    outside the tensor, and when the operation never ran.
    """
    _check(model, layer, index, elements, direction, operand)
    hits: list[Injected] = []
    record: list[OpRecord] = []
    places = _Places(index, elements, seed)

    def edit(x: Tensor) -> Tensor:
        found = places.of(tuple(x.shape), mode.kind, role(direction, operand))
        at = torch.tensor(found, device=x.device)
        old, new = x.flatten()[at], torch.full((len(found),), value, dtype=x.dtype, device=x.device)
        hits.append(Injected(layer, tuple(found), tuple(x.shape), tuple(old.tolist()), tuple(new.tolist())))
        return replaced(x, at, new)

    mode = _OwnLoopMode(model, Ops({Site(layer, call, direction, operand): edit}), record)
    with mode:
        yield hits
    if not hits:
        ran = hittable_layers([r for r in record if direction in r.directions])
        expected = f"a convolution or linear map that ran in the block (call {call}); these did: {', '.join(ran)}"
        if direction != "forward":
            expected += f", in direction {direction} if the block held the backward pass"
        raise UserError("layer", layer, expected if ran else "a forward pass of the model inside the block")


def _check(
    model: nn.Module, layer: str, index: Sequence[int] | None, elements: int | None, direction: str, operand: str
) -> None:
    names = [name for name, _ in model.named_modules()]
    if layer not in names:
        inner = [name for name in names if name]
        raise UserError("layer", layer, f"a layer of the model ({', '.join(inner)})", hint=nearest(layer, inner))
    for key, chosen, known in (("direction", direction, DIRECTIONS), ("operand", operand, OPERANDS)):
        if chosen not in known:
            raise UserError(key, chosen, f"one of {', '.join(known)}", hint=nearest(chosen, known))
    if (index is None) == (elements is None):
        raise UserError("index", index, "either index or elements")
    if elements is not None and elements < 1:
        raise UserError("elements", elements, "at least 1")
    if index is not None and len(index) == 0:
        raise UserError("index", list(index), "at least one element")
