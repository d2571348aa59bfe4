"""How old the contributions to an update are, in versions and in weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.flat import joined
from ..core.member_stats import member_norms
from .driver import Engine, Round


def lateness(engine: Engine, now: Round) -> dict[str, Tensor]:
    """``staleness``: versions between the weights that were read and those the update changes, and ``weight_gap``:
    the norm of their difference; both as means over the contributions. ``worker``: who, -1 where several."""
    members, k = now.workers.shape
    gaps = torch.zeros(members, dtype=torch.float64)
    for i in range(k):
        if (now.versions[:, i] != engine.step).any():
            read = engine.view(now.versions[:, i])
            if len({t.dtype for t in read.values()}) == 1:  # all weights side by side: one pass
                gap, _ = member_norms({"": joined(engine.state.params)}, {"": joined(read)})
            else:
                gap, _ = member_norms(engine.state.params, read)
            gaps += gap.double() / k
    staleness = torch.from_numpy((engine.step - now.versions).mean(1))
    worker = torch.from_numpy(now.workers[:, 0]) if k == 1 else torch.full((members,), -1, dtype=torch.int64)
    return {"staleness": staleness, "weight_gap": gaps, "worker": worker}
