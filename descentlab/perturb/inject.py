"""A fault in your own training loop: wrong values in the result of one operation of any ``nn.Module``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import UserError, nearest
from ..core.opmode import OpMode, OpRecord, Ops, ReplaceElements, Site
from ..core.streams import Streams
from .forward import channels_last_to_logical, hittable_layers


@dataclass(frozen=True)
class Injected:
    """What one injection changed: the flat elements ``index`` of an output of ``shape``, before and after."""

    layer: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    old: tuple[float, ...]
    new: tuple[float, ...]


class _OwnLoopMode(OpMode):
    """:class:`OpMode` beside a training loop that draws its own dropout masks."""

    def _dropout(self, layer: str, call: int, func: Any, args: tuple, kwargs: dict) -> Tensor:
        return func(*args, **kwargs)


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
) -> Iterator[list[Injected]]:
    """While active, one forward operation of ``model`` gives wrong values; the backward pass runs as if it had not.

    ``layer`` is a name from ``model.named_modules()`` whose module computes a convolution or a linear map. Its result
    before the bias gets ``value`` at the flat elements ``index`` (torch's order), or at ``elements`` consecutive
    elements along channels, at a place drawn from ``seed``. Only the ``call``-th execution of the layer inside the
    block is hit. The block yields a list that holds an :class:`Injected` once the operation has run. Raises
    :class:`UserError` for an unknown layer, a position outside the output, and when the operation never ran.
    """
    _check(model, layer, index, elements)
    hits: list[Injected] = []
    record: list[OpRecord] = []
    edit = _edit(layer, value, index, elements, seed, hits)
    with _OwnLoopMode(model, Ops({Site(layer, call): edit}), record):
        yield hits
    if not hits:
        ran = hittable_layers(record)
        expected = f"a convolution or linear map that ran in the block (call {call}); these did: {', '.join(ran)}"
        raise UserError("layer", layer, expected if ran else "a forward pass of the model inside the block")


def _check(model: nn.Module, layer: str, index: Sequence[int] | None, elements: int | None) -> None:
    names = [name for name, _ in model.named_modules()]
    if layer not in names:
        inner = [name for name in names if name]
        raise UserError("layer", layer, f"a layer of the model ({', '.join(inner)})", hint=nearest(layer, inner))
    if (index is None) == (elements is None):
        raise UserError("index", index, "either index or elements")
    if elements is not None and elements < 1:
        raise UserError("elements", elements, "at least 1")
    if index is not None and len(index) == 0:
        raise UserError("index", list(index), "at least one element")


def _edit(
    layer: str, value: float, index: Sequence[int] | None, elements: int | None, seed: int, hits: list[Injected]
) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        places = _places(tuple(x.shape), index, elements, seed)
        at = torch.tensor(places, device=x.device)
        new = torch.full((len(places),), value, dtype=x.dtype, device=x.device)
        old = x.detach().flatten()[at]
        hits.append(Injected(layer, tuple(places), tuple(x.shape), tuple(old.tolist()), tuple(new.tolist())))
        return ReplaceElements.apply(x, at, new)

    return replace


def _places(shape: tuple[int, ...], index: Sequence[int] | None, elements: int | None, seed: int) -> list[int]:
    """Flat elements of an output of ``shape``; runs start at a multiple of their length, as in planned faults."""
    size = math.prod(shape)
    if index is not None:
        wrong = [i for i in index if not 0 <= i < size]
        if wrong:
            raise UserError("index", wrong[0], f"0 to {size - 1}, the elements of an output of shape {shape}")
        return [int(i) for i in index]
    assert elements is not None
    if elements > size:
        raise UserError("elements", elements, f"at most {size}, the elements of an output of shape {shape}")
    first = elements * int(Streams(seed).integers("inject", size // elements, replicate=0)[0])
    return [int(i) for i in channels_last_to_logical(np.arange(first, first + elements), shape)]
