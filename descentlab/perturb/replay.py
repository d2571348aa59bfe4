"""Replays an exact fault: the same elements of the same operation get the same values.

The published program works on N H W C activations and H W I O kernels, and computes a layer's gradients as convolutions
of its own making; :func:`translate` finds the elements of our tensors (N C H W, O I H W) that its coordinates mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import nearest
from ..core.opmode import MATRIX_OPS, OpRecord, Ops, Site
from ..core.protocols import Hit, Planned
from ..core.streams import Streams
from .hardware import edit_of
from .positions import role
from .replay_files import PublishedFault, StoredFault, find_hit, read
from .replay_specs import Replay

RESNET = re.compile(r"basicblock_([1-4])_basic_([01])_(conv1|conv2|downsample)$")


class ReplayedFault:
    """A fault read from a file (:class:`~descentlab.core.protocols.Perturbation`); ``build`` reads nothing yet."""

    def __init__(self, spec: Replay) -> None:
        self.spec = spec

    def plan(
        self, case: int, ops: Sequence[OpRecord], streams: Streams, *, replicate: int, steps_per_epoch: int
    ) -> Planned:
        """Draws nothing: every case and optimizer meets the fault of the file (``row`` none: case i that of row i)."""
        spec = self.spec
        if spec.hit is not None:
            fault: PublishedFault | StoredFault = find_hit(spec.hit)
        else:
            assert spec.path is not None
            fault = read(Path(spec.path), case if spec.row is None else spec.row)
        if isinstance(fault, StoredFault):
            record = _stored_record(fault, ops)
            site = Site(fault.layer, fault.call, fault.direction, fault.operand)
            step, index, rule = fault.step, fault.index, dict(fault.rule)
        else:
            record = _published_record(fault, ops)
            site = Site(record.layer, record.call, fault.direction, fault.operand)
            index = translate(fault, record)
            step = _step(fault, steps_per_epoch)
            same = len(set(fault.values)) == 1
            rule = (
                {"kind": "value", "value": fault.values[0]}
                if same
                else {"kind": "values", "values": list(fault.values)}
            )
        shape = record.shapes(site.direction)[site.operand]
        return Planned(case, step if spec.step is None else spec.step, site, index, rule, shape)

    def realise(self, planned: Planned, hits: list[Hit], *, attempt: int) -> Ops:
        """The edit of one member's work; nothing on a repeated attempt."""
        return Ops() if attempt > 0 else Ops({planned.site: edit_of(planned, hits)})


def native_layer(published: str) -> str:
    """Our name of a layer of the published ResNet-18 (with or without BatchNorm); other names stay as they are."""
    if published == "conv1":
        return "stem.0"
    found = RESNET.match(published)
    if found is None:
        return published
    block, unit, kind = int(found[1]), int(found[2]), found[3]
    inside = "shortcut.0" if kind == "downsample" else f"convs.{int(kind[-1]) - 1}.0"
    return f"blocks.{2 * (block - 1) + unit}.{inside}"


def _published_record(fault: PublishedFault, ops: Sequence[OpRecord]) -> OpRecord:
    able = [r for r in ops if r.kind in MATRIX_OPS]
    by_name = {r.layer: r for r in reversed(able)}  # the first call of each
    name = fault.layer if fault.layer in by_name else native_layer(fault.layer)
    if name not in by_name:
        expected = f"a layer of the model ({', '.join(dict.fromkeys(r.layer for r in able))})"
        raise fault.place.error("target_layer", fault.layer, expected, nearest(name, by_name))
    return _with_direction(by_name[name], fault.direction, fault.layer, "target_layer", fault)


def _stored_record(fault: StoredFault, ops: Sequence[OpRecord]) -> OpRecord:
    able = [r for r in ops if r.kind in MATRIX_OPS]
    names = list(dict.fromkeys(r.layer for r in able))
    found = [r for r in able if (r.layer, r.call) == (fault.layer, fault.call)]
    if not found:
        expected = f"a layer of the model ({', '.join(names)})"
        raise fault.place.error("layer", fault.layer, expected, nearest(fault.layer, names))
    record = _with_direction(found[0], fault.direction, fault.layer, "site", fault)
    shape = record.shapes(fault.direction).get(fault.operand)
    if shape is None:
        raise fault.place.error("site", f"{fault.direction}/{fault.operand}", "an operand a, b or out")
    if fault.shape is not None and fault.shape != shape:
        hint = "model, data and batch_size must be those of the run it was planned for"
        raise fault.place.error("shape", list(fault.shape), f"{list(shape)}, the shape of {fault.layer}", hint)
    size = math.prod(shape)
    wrong = [i for i in fault.index if not 0 <= i < size]
    if wrong:
        raise fault.place.error("index", wrong[0], f"0 to {size - 1}, the elements of {fault.layer} {list(shape)}")
    return record


def _with_direction(record: OpRecord, direction: str, shown: str, column: str, fault: Any) -> OpRecord:
    if direction not in record.directions:
        made = ", ".join(record.directions)
        raise fault.place.error(column, shown, f"an operation that a training step makes there ({made})")
    return record


def _step(fault: PublishedFault, steps_per_epoch: int) -> int:
    if fault.step >= steps_per_epoch:
        expected = f"0 to {steps_per_epoch - 1}, the steps of an epoch of this workload"
        raise fault.place.error("target_step", fault.step, expected, "fault.step=N gives the step instead")
    return fault.epoch * steps_per_epoch + fault.step


def translate(fault: PublishedFault, record: OpRecord) -> tuple[int, ...]:
    """Flat elements (torch's order) of the operand of ``record`` that the published coordinates mean.

    Raises :class:`UserError` for a coordinate outside the tensor, and for one that lies in the zeros with which the
    published program pads and spreads an operand: no tensor of ours holds those.
    """
    shape = record.shapes(fault.direction)[fault.operand]
    flat = []
    for position in fault.positions:
        if len(position) != len(shape):
            shown = "/".join(map(str, position))
            raise fault.place.error(
                "inj_pos", shown, f"{len(shape)} coordinates, for a tensor {_published_text(shape)}"
            )
        ours = _native(position, fault, record)
        if not all(0 <= i < n for i, n in zip(ours, shape, strict=True)):
            shown = "/".join(map(str, position))
            raise fault.place.error(
                "inj_pos",
                shown,
                f"an element of {record.layer}, whose {_what(fault)} is {list(shape)} in torch's order",
            )
        flat.append(int(np.ravel_multi_index(ours, shape)))
    return tuple(flat)


def _published_text(shape: Sequence[int]) -> str:
    return f"of {len(shape)} dimensions"


def _what(fault: PublishedFault) -> str:
    part = {"x": "input", "w": "weight", "g": "result"}[role(fault.direction, fault.operand)]
    return part if fault.direction == "forward" else f"{part} or its gradient"


def _native(position: Sequence[int], fault: PublishedFault, record: OpRecord) -> tuple[int, ...]:
    """Coordinates in torch's axis order; a negative one where there is no such element."""
    if record.kind == "linear":
        return tuple(reversed(position)) if role(fault.direction, fault.operand) == "w" else tuple(position)
    if fault.direction == "forward" or (fault.direction == "grad_input" and fault.operand == "out"):
        return _kernel(position) if fault.operand == "b" else _activation(position)
    kernel, stride = record.b[2:], _pair(record.options.get("stride", 1), len(record.b) - 2)
    before = _padding(record, kernel, stride)
    if fault.direction == "grad_input":
        if fault.operand == "b":  # [H, W, O, I], turned by 180 degrees
            *space, o, i = position
            return (o, i, *(k - 1 - s for k, s in zip(kernel, space, strict=True)))
        n, *space, c = position  # the incoming gradient, spread by the stride and padded to a full convolution
        edges = [k - 1 - p for k, p in zip(kernel, before, strict=True)]
        return (n, c, *(_spread(s - e, d) for s, e, d in zip(space, edges, stride, strict=True)))
    if fault.operand == "a":  # the padded input with images and channels exchanged: [C, H, W, N]
        c, *space, n = position
        return (n, c, *(s - p for s, p in zip(space, before, strict=True)))
    if fault.operand == "b":  # the incoming gradient as a kernel: [H, W, N, C], spread by the stride
        *space, n, c = position
        return (n, c, *(_spread(s, d) for s, d in zip(space, stride, strict=True)))
    i, *space, o = position  # the result before it is turned back: [I, H, W, O]
    return (o, i, *space)


def _activation(position: Sequence[int]) -> tuple[int, ...]:
    n, *space, c = position
    return (n, c, *space)


def _kernel(position: Sequence[int]) -> tuple[int, ...]:
    *space, i, o = position
    return (o, i, *space)


def _pair(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (int(value),) * dims


def _padding(record: OpRecord, kernel: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Zeros before the first element in the published program, whose convolutions keep sizes as ``SAME`` does."""
    return [
        max((math.ceil(size / s) - 1) * s + k - size, 0) // 2
        for size, k, s in zip(record.a[2:], kernel, stride, strict=True)
    ]


def _spread(place: int, stride: int) -> int:
    """The element at ``place`` of a tensor spread by ``stride``; -1 for one of the zeros between."""
    return place // stride if place >= 0 and place % stride == 0 else -1
