"""One batch as several micro-batches: the mean of their gradients, with the memory of one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.opmode import Ops
from ..core.protocols import Batch, Grads, Selection, Work
from ..core.state import State
from ..core.tree import Tree


class Accumulating:
    """A :class:`~descentlab.core.protocols.Work` that gives every batch to another one in ``count`` equal pieces.

    The result is that of the whole batch up to rounding, BatchNorm apart: its statistics are those of each piece, and
    its buffers move once per piece. ``count`` divides the batch.
    """

    def __init__(self, inner: Work, count: int) -> None:
        self.inner, self.count = inner, count

    def work(self, view: State, batch: Batch, ops: Ops | None = None) -> Grads:
        """See :class:`~descentlab.core.protocols.Work`; dropout masks are cut with the batch."""
        found, buffers = [], view.buffers
        for k, piece in enumerate(self._pieces(batch)):
            here = State({**view.server, "buffers": buffers}, view.worker, view.shared, view.clock)
            found.append(self.inner.work(here, piece, self._masks(ops, k)))
            buffers = found[-1].buffers
        grads: Tree = {name: torch.stack([g.grads[name] for g in found]).mean(0) for name in found[0].grads}
        loss, accuracy = (torch.stack([getattr(g, key) for g in found]).mean(0) for key in ("loss", "accuracy"))
        return Grads(grads, buffers, loss, accuracy)

    def evaluate(self, view: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~descentlab.core.protocols.Work`."""
        return self.inner.evaluate(view, x, y)

    def _pieces(self, batch: Batch) -> list[Batch]:
        if isinstance(batch, Selection):
            return [Selection(batch.source, part.contiguous()) for part in batch.index.chunk(self.count, dim=1)]
        pairs = zip(batch.x.chunk(self.count, dim=1), batch.y.chunk(self.count, dim=1), strict=True)
        return [Batch(x, y) for x, y in pairs]

    def _masks(self, ops: Ops | None, k: int) -> Ops | None:
        if ops is None:
            return None
        return Ops(ops.edits, {site: mask.chunk(self.count, dim=1)[k] for site, mask in ops.masks.items()})
