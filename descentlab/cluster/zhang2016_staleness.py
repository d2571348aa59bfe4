"""Zhang, Gupta, Lian, Liu: Staleness-aware async-SGD for distributed deep learning (IJCAI 2016, arXiv 1511.05950)."""

from __future__ import annotations

from typing import final

from ..core.protocols import Lateness
from ..core.tree import Tree, tree_map


@final
class InverseStaleness:
    """g / max(1, tau), tau the number of updates since the weights were read: the learning rate over tau of
    the paper's equation 6 with the staleness of each gradient."""

    def adjust(self, grads: Tree, late: Lateness) -> Tree:
        """See :class:`~descentlab.core.protocols.StalenessRule`."""
        tau = late.versions.clamp(min=1)
        if bool((tau == 1).all()):
            return grads
        return tree_map(lambda g: g / tau.to(g).view(-1, *[1] * (g.dim() - 1)), grads)
