"""What an update of several workers sent, and what that took."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.protocols import Measured


class Sending:
    """``rank``: mean over the matrices of a low-rank compressor; ``gradient_change``: the relative change that an
    Accordion policy found at its last look (mean over matrices where it looks at each); over a simulated link
    ``messages``, those ``gathered``, and ``link_s``, all counted from the start; of real processes the seconds of this
    update, by part.
    """

    name, needs = "sending", frozenset[str]()

    def measure(self, m: Measured) -> dict[str, Tensor]:
        shared, found = m.state.shared, {}
        members = m.state.members
        if "q" in shared:
            widths = [q.shape[-1] for q in shared["q"].values()]
            found["rank"] = torch.full((members,), sum(widths) / len(widths), dtype=torch.float64)
        policy = shared.get("policy", {})
        change = policy.get("accordion", policy).get("change")
        if change is not None:
            found["gradient_change"] = torch.stack(list(change.values())).mean(0)
        if "link" in shared:
            found |= {key: shared["link"][key] for key in ("messages", "gathered") if key in shared["link"]}
            found["link_s"] = shared["link"]["seconds"]
        found.update(shared.get("times", {}))
        return found
