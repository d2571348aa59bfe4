"""Transient faults in the result of one forward operation, as an accelerator's matrix unit would make them.

Positions run along channels: activations are addressed in NHWC order (the order of the accelerator fault model), so 16
consecutive elements are 16 channels of one pixel where there are that many; the indices stored are torch's NCHW ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.opmode import MATRIX_OPS, OpRecord, Ops, ReplaceElements, Site
from ..core.protocols import Hit, Planned
from ..core.streams import Streams
from .specs import ForwardFault

RUN_LENGTH = {"RD": 1, "N16_RD": 16}


def channels_last_to_logical(flat: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Flat indices in N…C order to torch's logical NC… order, for an activation of logical ``shape`` (N, C, …)."""
    if len(shape) <= 2:
        return flat
    n, c, *space = shape
    coordinates = np.unravel_index(flat, (n, *space, c))
    return np.ravel_multi_index((coordinates[0], coordinates[-1], *coordinates[1:-1]), tuple(shape))


class ForwardFaultModel:
    """Plans and realises one replaced run of elements (:class:`~descentlab.core.protocols.Perturbation`)."""

    def __init__(self, spec: ForwardFault) -> None:
        self.spec = spec

    def plan(
        self, case: int, ops: Sequence[OpRecord], streams: Streams, *, replicate: int, steps_per_epoch: int
    ) -> Planned:
        """Layer uniform over convolutions and linear maps, step and chunk uniform, value log-uniform.

        Every draw is made whether it is needed or not, so fixing the layer leaves the step and the value as they were.
        """
        u = streams.uniform("fault", 4, replicate=replicate)
        spec, hittable = self.spec, [r for r in ops if r.kind in MATRIX_OPS]
        chosen = [r for r in hittable if spec.layer in (None, r.layer)]
        record = chosen[int(u[0] * len(chosen))]
        step = spec.step if spec.step is not None else int(u[1] * (spec.last_epoch + 1) * steps_per_epoch)
        low, high = math.log10(spec.value_low), math.log10(spec.value_high)
        value = float(np.float32(10.0 ** (low + u[2] * (high - low))))
        size = math.prod(record.out)
        n = min(RUN_LENGTH[spec.name], size)
        chunk = int(u[3] * (size // n))
        flat = channels_last_to_logical(np.arange(chunk * n, (chunk + 1) * n), record.out)
        rule = {"kind": "value", "value": value}
        site = Site(record.layer, record.call, "forward", "out")
        return Planned(case, step, site, tuple(int(i) for i in flat), rule, record.out)

    def realise(self, planned: Planned, hits: list[Hit], *, attempt: int) -> Ops:
        """The edit of one member's forward pass; nothing on a repeated attempt."""
        if attempt > 0:
            return Ops()

        def replace(x: Tensor) -> Tensor:
            index = torch.tensor(planned.index, device=x.device)
            new = torch.full((len(planned.index),), planned.rule["value"], dtype=x.dtype, device=x.device)
            old = x.detach().flatten()[index]
            hits.append(Hit(planned, tuple(old.tolist()), tuple(new.tolist())))
            return ReplaceElements.apply(x, index, new)

        return Ops({planned.site: replace})


def hittable_layers(ops: Sequence[OpRecord]) -> list[str]:
    """Names of the layers a forward fault can hit, in order of execution."""
    return list(dict.fromkeys(r.layer for r in ops if r.kind in MATRIX_OPS))
