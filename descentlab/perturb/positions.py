"""Where a hardware fault lands: runs of elements in the order in which the accelerator walks through a tensor.

Activations and their gradients are walked in N H W C order and kernels and theirs in H W I O order, so that a run of 16
or 64 lies along the channels of one pixel, or along the output channels of one weight. What is stored are torch's
logical flat indices (N C H W, O I H W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..core.errors import UserError
from ..core.opmode import MATRIX_OPS, OpRecord

_ROLES = {  # which tensor of the layer an operand is: input x, weight w, gradient of the result g
    "forward": {"a": "x", "b": "w", "out": "g"},
    "grad_input": {"a": "g", "b": "w", "out": "x"},
    "grad_weight": {"a": "x", "b": "g", "out": "w"},
}


def role(direction: str, operand: str) -> str:
    """``x`` (input or its gradient), ``w`` (weight or its gradient) or ``g`` (result or its gradient)."""
    return _ROLES[direction][operand]


def walk(kind: str, role: str, dims: int) -> tuple[int, ...]:
    """The axes of a tensor from the slowest to the fastest, as the accelerator walks them."""
    if role == "w":
        return (*range(2, dims), 1, 0)
    return (0, *range(2, dims), 1) if kind == "conv" else tuple(range(dims))


def to_logical(flat: np.ndarray, shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """Places on the walk along ``axes`` as flat indices in torch's logical order, for a tensor of ``shape``."""
    walked = np.unravel_index(flat, [shape[axis] for axis in axes])
    logical = [walked[axes.index(axis)] for axis in range(len(shape))]
    return np.ravel_multi_index(logical, tuple(shape))


def chunks(size: int, run: int) -> tuple[int, int]:
    """(length of a run, how many of them lie one after the other): a run longer than the tensor is cut to it."""
    run = min(run, size)
    return run, size // run


def span(first: int, total: int, u: float, most: int | None) -> int:
    """How many runs a span takes that starts at run ``first`` of ``total``: uniform from 1 to what is left, or to
    ``most``. ``u`` in [0, 1)."""
    left = total - first
    return 1 + int(u * (left if most is None else min(left, most)))


def given(index: Sequence[int] | Sequence[Sequence[int]], shape: Sequence[int]) -> tuple[int, ...]:
    """The flat elements a user asked for, by flat index or by coordinates; beyond the tensor is a UserError."""
    flat = []
    for place in index:
        if isinstance(place, int):
            inside = 0 <= place < math.prod(shape)
            expected = f"0 to {math.prod(shape) - 1}, the elements of a tensor of shape {tuple(shape)}"
        else:
            inside = len(place) == len(shape) and all(0 <= i < n for i, n in zip(place, shape, strict=True))
            expected = f"coordinates inside a tensor of shape {tuple(shape)}"
        if not inside:
            raise UserError("fault.index", place if isinstance(place, int) else list(place), expected)
        flat.append(place if isinstance(place, int) else int(np.ravel_multi_index(tuple(place), tuple(shape))))
    return tuple(flat)


def hittable_layers(ops: Sequence[OpRecord]) -> list[str]:
    """Names of the layers a fault can hit, in order of execution."""
    return list(dict.fromkeys(r.layer for r in ops if r.kind in MATRIX_OPS))
