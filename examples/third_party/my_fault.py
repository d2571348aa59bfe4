"""``descentlab run recovery fault=my_fault:StuckColumn``: one output unit of a layer is zero for a whole batch."""

import math

import torch

from descentlab.core.matrixop import replaced
from descentlab.core.opmode import Ops, Site
from descentlab.core.protocols import Hit, Planned


class StuckColumn:
    """Unit 0 of the last linear map or convolution, at step ``step``."""

    def __init__(self, step=5):
        self.step = step

    def plan(self, case, ops, streams, *, replicate, steps_per_epoch):
        op = [op for op in ops if op.kind in ("linear", "conv")][-1]
        index = tuple(range(0, math.prod(op.out), op.out[1])) if len(op.out) == 2 else (0,)
        return Planned(case, self.step, Site(op.layer, op.call), index, {"kind": "value", "value": 0.0}, op.out)

    def realise(self, planned, hits, *, attempt):
        def stuck(x):
            index, new = torch.tensor(planned.index), torch.zeros(len(planned.index), dtype=x.dtype)
            hits.append(Hit(planned, tuple(x.flatten()[index].tolist()), tuple(new.tolist())))
            return replaced(x, index, new)

        return Ops({planned.site: stuck} if attempt == 0 else {})
