"""Local SGD: a worker makes several updates of its own copy before it sends anything."""

from __future__ import annotations

import torch

from ..core.opmode import Ops
from ..core.protocols import Batch, Grads, Selection, Work
from ..core.state import State
from ..core.tree import Tree


class LocalSteps:
    """A :class:`~descentlab.core.protocols.Work` that takes ``count`` plain SGD steps at rate ``lr`` from the weights
    it read, on ``count`` equal pieces of the batch, and gives back how far it went::

        w_0 = weights read,   w_(h+1) = w_h - lr g_h(w_h),   "gradient" = w_0 - w_count

    With sgd at rate 1 on the server the mean of the workers' copies becomes the new weights (local SGD, arXiv
    1805.09767); any other optimizer there is an outer optimizer, such as Nesterov momentum in DiLoCo (arXiv 2311.08105,
    whose inner steps are AdamW). Loss and accuracy are means over the pieces.
    """

    def __init__(self, inner: Work, count: int, lr: float) -> None:
        self.inner, self.count, self.lr = inner, count, lr

    def work(self, view: State, batch: Batch, ops: Ops | None = None) -> Grads:
        """See :class:`~descentlab.core.protocols.Work`; dropout masks are cut with the batch."""
        start, found = view.params, []
        params, buffers = {k: p.clone() for k, p in start.items()}, view.buffers
        for h in range(self.count):
            here = State({**view.server, "params": params, "buffers": buffers}, view.worker, view.shared, view.clock)
            found.append(self.inner.work(here, self._piece(batch, h), self._masks(ops, h)))
            params = {k: p - self.lr * found[-1].grads[k] for k, p in params.items()}
            buffers = found[-1].buffers
        moved: Tree = {k: start[k] - p for k, p in params.items()}
        loss, accuracy = (torch.stack([getattr(g, key) for g in found]).mean(0) for key in ("loss", "accuracy"))
        return Grads(moved, buffers, loss, accuracy)

    def evaluate(self, view: State, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`~descentlab.core.protocols.Work`."""
        return self.inner.evaluate(view, x, y)

    def _piece(self, batch: Batch, h: int) -> Batch:
        if isinstance(batch, Selection):
            return Selection(batch.source, batch.index.chunk(self.count, dim=1)[h].contiguous())
        return Batch(batch.x.chunk(self.count, dim=1)[h], batch.y.chunk(self.count, dim=1)[h])

    def _masks(self, ops: Ops | None, h: int) -> Ops | None:
        if ops is None:
            return None
        return Ops(ops.edits, {site: mask.chunk(self.count, dim=1)[h] for site, mask in ops.masks.items()})
