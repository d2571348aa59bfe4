"""Which results see a wrong operand that reaches 16 multiply lanes only.

The lanes share one operand and multiply it with 16 others. An element of the *first* operand is broadcast to 16
consecutive output channels of one output pixel; an element of the *weight-like* second operand to 16 consecutive output
positions of one output channel. Which results an element feeds at all, given stride, padding, dilation and groups, is
found by running the operation on zeros and ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..core.matrixop import gradient
from ..core.opmode import OpRecord
from .catalogue import LANES
from .positions import role, to_logical, walk

_COMPUTES = {"g": "forward", "x": "grad_input", "w": "grad_weight"}  # the operation whose output has a given role


def product(record: OpRecord, direction: str, a: Tensor, b: Tensor) -> Tensor:
    """The operation of ``record`` in ``direction`` on the operands ``a`` and ``b``, without bias."""
    op = record.stock()
    if direction == "forward":
        return op(a, b, None)
    if direction == "grad_input":
        return gradient(op, (torch.zeros(record.a), b, None), 0, a)
    return gradient(op, (a, torch.zeros(record.b), None), 1, b)


def feeding(record: OpRecord, direction: str, operand: str) -> np.ndarray:
    """Which elements of an operand feed any result: booleans in its shape (a strided 1x1 kernel skips most)."""
    wanted = _COMPUTES[role(direction, operand)]
    shapes = record.shapes(wanted)
    return (product(record, wanted, torch.ones(shapes["a"]), torch.ones(shapes["b"])) > 0.5).numpy()


def fed(record: OpRecord, direction: str, operand: str, index: np.ndarray) -> np.ndarray:
    """Which results depend on any of the flat elements ``index`` of an operand: booleans in the output's shape."""
    shapes = record.shapes(direction)
    operands = {name: torch.ones(shapes[name]) for name in ("a", "b")}
    hot = torch.zeros(shapes[operand])
    hot.view(-1)[torch.from_numpy(index)] = 1.0
    operands[operand] = hot
    return (product(record, direction, operands["a"], operands["b"]) > 0.5).numpy()


def draw_lanes(record: OpRecord, direction: str, operand: str, index: np.ndarray, u: np.ndarray) -> list[int]:
    """Flat results that see the wrong operand: 16 in a row (fewer where there are fewer) of which at least one depends
    on it, empty when none does. ``u`` ``[2]`` in [0, 1): the first picks the pixel or the channel, the second the run.
    """
    shape = record.shapes(direction)["out"]
    axes = walk(record.kind, role(direction, "out"), len(shape))
    mask = fed(record, direction, operand, index).transpose(axes).reshape(-1, shape[axes[-1]])  # position, channel
    lines = mask if operand == "a" else mask.T
    alive = np.flatnonzero(lines.any(1))
    if not len(alive):
        return []
    line = int(alive[int(u[0] * len(alive))])
    n = min(LANES, lines.shape[1])
    starts = np.minimum(np.arange(0, lines.shape[1], n), lines.shape[1] - n)
    starts = starts[[lines[line, s : s + n].any() for s in starts]]
    along = np.arange(n) + starts[int(u[1] * len(starts))]
    channels = mask.shape[1]
    walked = line * channels + along if operand == "a" else along * channels + line
    return [int(i) for i in to_logical(walked, shape, axes)]
