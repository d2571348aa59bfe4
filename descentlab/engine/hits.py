"""The members a perturbation is due for leave the ensemble for one step; so do their twins, by the same route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.flat import take_rows
from ..core.matrixop import Edit, Lanes
from ..core.opmode import Ops, Site
from ..core.protocols import Batch, Grads, Hit
from ..core.state import State
from ..core.tree import cat, take, tree_map
from .events import Altered
from .parts import Parts
from .program import Slot
from .recorder import Recorder


class Hits:
    """Realises what a block has planned, and tells the recorder what was changed."""

    def __init__(self, parts: Parts, recorder: Recorder) -> None:
        self.parts, self.recorder = parts, recorder

    def due(self, slots: Sequence[Slot], step: int, workers: np.ndarray) -> list[int]:
        """The members for which ``workers`` ``[M]`` meets a perturbation (or would, if it were not the twin's)."""
        planned = [slot.planned_at(step) for slot in slots]
        return [m for m, found in enumerate(planned) if found is not None and found[0].worker == int(workers[m])]

    def work(
        self,
        slots: Sequence[Slot],
        step: int,
        view: State,
        batch: Batch,
        masks: Mapping[tuple[str, int], Tensor],
        due: list[int],
    ) -> Grads:
        """The worker half of a step with the members ``due`` one by one and all others together; those whose data are
        altered are a group of their own. Where no member's numbers depend on its neighbours the others stay in their
        places, and what was computed for those due is written over."""
        altered = [m for m in batch.members if m not in due] if isinstance(batch, Altered) else []
        rest = [m for m in range(len(slots)) if m not in due and m not in altered]
        apart = getattr(self.parts.many, "apart", None)
        if rest and not altered and apart is not None and apart(view, batch):
            result = self.parts.many.work(view, batch, Ops(masks=masks) if masks else None)
            for m in due:
                _write(result, m, self._alone(slots[m], step, view, batch, masks, m))
            return result
        view = State({**view.server, "slots": {}}, clock=view.clock)  # no gradient needs them; the groups are copies
        results = [self._alone(slots[m], step, view, batch, masks, m) for m in due]
        for members in (part for part in (altered, rest) if part):
            own = {k: mask[members] for k, mask in masks.items()}
            several = view.take(members), batch.take(members)
            results.append(self.parts.many.work(*several, Ops(masks=own) if own else None))
        return _joined(results, [*due, *altered, *rest])

    def _alone(
        self, slot: Slot, step: int, view: State, batch: Batch, masks: Mapping[tuple[str, int], Tensor], m: int
    ) -> Grads:
        """The worker half of a step of member ``m``, which meets a perturbation or is the twin of one that does."""
        own = State(
            {
                "params": take_rows(view.params, [m]),
                "buffers": take(view.buffers, [m]),
                "slots": {},
                "opt_step": view.opt_step[m : m + 1],
            }
        )
        part = batch.take([m])
        self._keep_scene(slot, step, own, part)
        ops = Ops(self._edits(slot, step, int(view.clock["attempt"][m])), {k: mask[[m]] for k, mask in masks.items()})
        return self.parts.single.work(own, part, ops if ops.edits or ops.masks else None)

    def _keep_scene(self, slot: Slot, step: int, view: State, batch: Batch) -> None:
        """What a replay of the hit of one member needs: weights and buffers before it, and the batch."""
        found = slot.planned_at(step)
        if self.parts.hit_artifacts and found is not None and found[1]:
            tensors = {f"params/{k}": p for k, p in view.params.items()}
            tensors |= {f"buffers/{k}": b for k, b in view.buffers.items()} | {"x": batch.x, "y": batch.y}
            self.recorder.scene(slot, {name: t[0].cpu().numpy() for name, t in tensors.items()})

    def _edits(self, slot: Slot, step: int, attempt: int) -> dict[Site, Edit]:
        """The edit of a perturbed member; for its twin the identity at the same site, so both take the same route."""
        found = slot.planned_at(step)
        assert found is not None and self.parts.perturbation is not None
        planned, perturbed = found
        if not perturbed:
            return {planned.site: lambda x: x}
        hits: list[Hit] = []
        ops = self.parts.perturbation.realise(planned, hits, attempt=attempt)

        def recorded(edit: Edit) -> Edit:
            def apply(x: Tensor) -> Tensor | Lanes:
                out = edit(x)
                self.recorder.hit(slot, hits[-1])
                return out

            return apply

        return {site: recorded(edit) for site, edit in ops.edits.items()}


def _write(result: Grads, m: int, own: Grads) -> None:
    """Member ``m`` of ``result`` becomes the one of ``own``."""
    for tree, part in ((result.grads, own.grads), (result.buffers, own.buffers)):
        tree_map(lambda t, new: t[m].copy_(new[0]), tree, part)
    result.loss[m], result.accuracy[m] = own.loss[0], own.accuracy[0]


def _joined(results: Sequence[Grads], order: Sequence[int]) -> Grads:
    """The groups' results as one, members in order; ``order``: the member each row belongs to."""
    pick = torch.argsort(torch.tensor(order)).tolist()
    return Grads(
        tree_map(lambda t: t[pick], cat([g.grads for g in results])),
        tree_map(lambda t: t[pick], cat([g.buffers for g in results])),
        torch.cat([g.loss for g in results])[pick],
        torch.cat([g.accuracy for g in results])[pick],
    )
