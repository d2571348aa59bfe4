"""Plans and realises the hardware faults of :mod:`descentlab.perturb.catalogue`.

A plan needs shapes and streams, no weights: every optimizer meets the same fault. Realising it needs the plan alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError, nearest
from ..core.matrixop import DIRECTIONS, Edit, Lanes, replaced
from ..core.opmode import MATRIX_OPS, OpRecord, Ops, Site
from ..core.protocols import Hit, Planned
from ..core.streams import Streams
from .catalogue import OPERAND
from .lanes import draw_lanes, feeding
from .positions import chunks, given, hittable_layers, role, span, to_logical, walk
from .specs import HardwareFault
from .values import BITS, finite_patterns, realised

_GROUPS = {"backward": ("grad_input", "grad_weight"), "any": DIRECTIONS}


def layers_with(ops: Sequence[OpRecord], direction: str) -> list[str]:
    """Names of the layers that make an operation of this ``direction`` (or group of directions) in training."""
    asked = _GROUPS.get(direction, (direction,))
    return hittable_layers([r for r in ops if any(d in r.directions for d in asked)])


class HardwareFaultModel:
    """One wrong operand or result in one operation (:class:`~descentlab.core.protocols.Perturbation`)."""

    def __init__(self, spec: HardwareFault) -> None:
        self.spec, self.type = spec, spec.kind

    def plan(
        self, case: int, ops: Sequence[OpRecord], streams: Streams, *, replicate: int, steps_per_epoch: int
    ) -> Planned:
        """Direction, layer, step, place and value, each uniform over what the settings allow.

        Every draw has its own place in the streams, so fixing one leaves the others as they were.
        """
        u = streams.uniform("fault", 4, replicate=replicate)
        spec = self.spec
        direction, record = self._operation(ops, streams, u[0], replicate)
        step = spec.step if spec.step is not None else int(u[1] * (spec.last_epoch + 1) * steps_per_epoch)
        operand = OPERAND[self.type.target]
        shape = record.shapes(direction)[operand]
        index = self._elements(record, direction, operand, streams, u[3], replicate)
        rule = self._rule(index, math.prod(shape), streams, u[2], replicate)
        if self.type.lanes:
            pick = streams.uniform("fault/lanes", 2, replicate=replicate)
            rule["lanes"] = draw_lanes(record, direction, operand, np.array(index), pick)
            if not rule["lanes"]:
                raise UserError("fault.index", list(index), "an element that at least one result depends on")
        return Planned(case, step, Site(record.layer, record.call, direction, operand), index, rule, shape)

    def _operation(self, ops: Sequence[OpRecord], streams: Streams, u: float, replicate: int) -> tuple[str, OpRecord]:
        """The direction uniform over those asked for that exist, then the layer uniform over those that have it."""
        spec, names = self.spec, hittable_layers(ops)
        if spec.layer is not None and spec.layer not in names:
            raise UserError("fault.layer", spec.layer, f"one of {', '.join(names)}", hint=nearest(spec.layer, names))
        hittable = [r for r in ops if r.kind in MATRIX_OPS and spec.layer in (None, r.layer)]
        asked = _GROUPS.get(spec.direction, (spec.direction,))
        there = [d for d in asked if any(d in r.directions for r in hittable)]
        if not there:
            where = f"layer '{spec.layer}'" if spec.layer is not None else "the model"
            has = [d for d in DIRECTIONS if any(d in r.directions for r in hittable)]
            expected = f"an operation {where} makes in training ({', '.join(has)})"
            raise UserError("fault.direction", spec.direction, expected)
        way = there[int(streams.uniform("fault/direction", 1, replicate=replicate)[0] * len(there))]
        chosen = [r for r in hittable if way in r.directions]
        return way, chosen[int(u * len(chosen))]

    def _elements(
        self, record: OpRecord, direction: str, operand: str, streams: Streams, u: float, replicate: int
    ) -> tuple[int, ...]:
        """Flat elements in torch's logical order."""
        shape = record.shapes(direction)[operand]
        if self.spec.index is not None:
            return given(self.spec.index, shape)
        axes = walk(record.kind, role(direction, operand), len(shape))
        n, total = chunks(math.prod(shape), self.type.run)
        first, count = int(u * total), 1
        if self.type.span:
            share = float(streams.uniform("fault/span", 1, replicate=replicate)[0])
            count = span(first, total, share, getattr(self.spec, "max_span", None))
        if self.type.lanes:  # a run that feeds no result would be no fault
            alive = feeding(record, direction, operand).transpose(axes).reshape(-1)[: n * total].reshape(total, n)
            able = np.flatnonzero(alive.any(1))
            if not len(able):
                raise UserError("fault", self.spec.name, f"elements of '{record.layer}' that a result depends on")
            first = int(able[int(u * len(able))])
        walked = np.arange(first * n, (first + count) * n)
        return tuple(int(i) for i in to_logical(walked, shape, axes))

    def _rule(self, index: Sequence[int], size: int, streams: Streams, u: float, replicate: int) -> dict[str, Any]:
        """What happens to the elements; see :mod:`descentlab.perturb.values`."""
        spec, n = self.spec, len(index)
        if spec.value_mode == "fixed":
            return {"kind": "value", "value": spec.value}
        if spec.value_mode == "list":
            return {"kind": "value", "value": spec.values[int(u * len(spec.values))]}
        if spec.value_mode == "log_uniform":
            low, high = math.log10(spec.value_low), math.log10(spec.value_high)
            return {"kind": "value", "value": float(np.float32(10.0 ** (low + u * (high - low))))}
        if self.type.native == "zero":
            return {"kind": "zero"}
        if self.type.native == "copy":
            return {"kind": "copy", "from": streams.integers("fault/copy", size, n, replicate=replicate).tolist()}
        word = getattr(spec, "word", "float32")
        if self.type.native == "flip":
            return {"kind": "flip", "bit": int(u * BITS[word]), "word": word}
        values = finite_patterns(streams, n, word, replicate=replicate)
        return {"kind": "value", "value": values[0]} if n == 1 else {"kind": "values", "values": values}

    def realise(self, planned: Planned, hits: list[Hit], *, attempt: int) -> Ops:
        """The edit of one member's work; nothing on a repeated attempt."""
        return Ops() if attempt > 0 else Ops({planned.site: edit_of(planned, hits)})


def edit_of(planned: Planned, hits: list[Hit]) -> Edit:
    """The planned fault as an edit; an element that held NaN is overwritten too. Appends to ``hits`` when it fires."""

    def edit(x: Tensor) -> Tensor | Lanes:
        index = torch.tensor(planned.index, device=x.device)
        old, new = realised(planned.rule, x, index)
        hits.append(Hit(planned, tuple(old.tolist()), tuple(new.tolist())))
        wrong = replaced(x, index, new)
        lanes = planned.rule.get("lanes")
        return wrong if lanes is None else Lanes(wrong, lanes)

    return edit
