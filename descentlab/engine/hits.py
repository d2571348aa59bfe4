"""The members a perturbation is due for leave the ensemble for one step; so do their twins, by the same route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.matrixop import Edit, Lanes
from ..core.opmode import Ops, Site
from ..core.protocols import Batch, Grads, Hit
from ..core.state import State
from ..core.tree import cat, tree_map
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
        altered are a group of their own."""
        altered = [m for m in batch.members if m not in due] if isinstance(batch, Altered) else []
        rest = [m for m in range(len(slots)) if m not in due and m not in altered]
        groups = [*([m] for m in due), *(part for part in (altered, rest) if part)]
        view = State({**view.server, "slots": {}}, clock=view.clock)  # no gradient needs them; the groups are copies
        results = []
        for members in groups:
            part = {k: mask[members] for k, mask in masks.items()}
            part_view, part_batch = view.take(members), batch.take(members)
            if members is rest or members is altered:
                results.append(self.parts.many.work(part_view, part_batch, Ops(masks=part) if part else None))
                continue
            slot = slots[members[0]]
            self._keep_scene(slot, step, part_view, part_batch)
            ops = Ops(self._edits(slot, step, int(view.clock["attempt"][members[0]])), part)
            results.append(self.parts.single.work(part_view, part_batch, ops if ops.edits or ops.masks else None))
        return _joined(results, [m for members in groups for m in members])

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


def _joined(results: Sequence[Grads], order: Sequence[int]) -> Grads:
    """The groups' results as one, members in order; ``order``: the member each row belongs to."""
    pick = torch.argsort(torch.tensor(order)).tolist()
    return Grads(
        tree_map(lambda t: t[pick], cat([g.grads for g in results])),
        tree_map(lambda t: t[pick], cat([g.buffers for g in results])),
        torch.cat([g.loss for g in results])[pick],
        torch.cat([g.accuracy for g in results])[pick],
    )
