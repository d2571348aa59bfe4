"""Events act on the members' own slices of tensors: the ensemble stays together, however long an event lasts.

Only what a worker computes *with* other data than the rest (labels, inputs) is computed apart, together with its twins,
so that both take the same route.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..core.protocols import Batch, Effects, Grads, Hit, Planned, Selection, Strike
from ..core.state import State
from ..core.tree import Tree
from .parts import Parts
from .program import RunPlan, Slot
from .recorder import Recorder


@dataclass
class _Group:
    """Events that do the same, of several members: parallel lists. ``perturbed``: false for the twin of a run.

    A member of several runs that meet the same event is in them once for each: its slice is read first and written
    then, so it is struck once.
    """

    members: list[int] = field(default_factory=list)
    runs: list[RunPlan] = field(default_factory=list)
    planned: list[Planned] = field(default_factory=list)
    starts: np.ndarray = field(default_factory=lambda: np.empty(0))
    replicates: np.ndarray = field(default_factory=lambda: np.empty(0))
    perturbed: np.ndarray = field(default_factory=lambda: np.empty(0))

    def close(self) -> None:
        self.starts = np.array([p.step for p in self.planned])
        self.replicates = np.array([run.replicate for run in self.runs], dtype=np.int64)
        self.perturbed = np.array([run.perturbed for run in self.runs])

    def due(self, step: int) -> np.ndarray:
        """Whose event is due, bool ``[G]``; as :meth:`Planned.active`, for all at once."""
        first, since = self.planned[0], step - self.starts
        due = (since >= 0) & (since % first.every == 0)
        return due if first.duration is None else due & (since < first.duration)


class Altered(Batch):
    """A batch in which some ``members`` (and their twins, unchanged) do not see the training set as it is.

    ``x`` and ``y`` ``[len(members), B, …]`` belong to these; everybody else's batch is ``rest``.
    """

    def __init__(self, rest: Selection, members: Sequence[int]) -> None:
        own = rest.take(members)
        self.rest, self.members = rest, list(members)
        super().__init__(own.x.clone(), own.y.clone())

    def take(self, members: Sequence[int]) -> Batch:
        """The batch of ``members``, all of them altered or none."""
        if members[0] not in self.members:
            return self.rest.take(members)
        places = [self.members.index(m) for m in members]
        return Batch(self.x[places], self.y[places])


class Events:
    """Finds the events due at each moment of a step and has them done."""

    def __init__(self, parts: Parts, recorder: Recorder) -> None:
        self.parts, self.recorder = parts, recorder
        self._groups: dict[tuple[str, str], list[_Group]] = {}

    def bind(self, slots: Sequence[Slot]) -> None:
        """The members are now ``slots``."""
        groups: dict[str, _Group] = {}
        for m, slot in enumerate(slots):
            for run in slot.runs:
                for p in run.planned:
                    if p.event:
                        key = [p.site.layer, p.site.direction, p.site.operand, dict(p.rule), len(p.index)]
                        text = json.dumps([*key, p.shape, p.worker, p.duration, p.every], sort_keys=True)
                        group = groups.setdefault(text, _Group())
                        group.members.append(m)
                        group.runs.append(run)
                        group.planned.append(p)
        self._groups = {}
        for group in groups.values():
            group.close()
            site = group.planned[0].site
            self._groups.setdefault((site.direction, site.operand), []).append(group)

    def _strikes(
        self, target: str, moment: str, state: State, step: int, workers: np.ndarray | None = None
    ) -> list[tuple[Strike, _Group]]:
        """The events of one target due now; a transient does not act again when a step is repeated."""
        found = []
        for group in self._groups.get((target, moment), ()):
            first, acts = group.planned[0], group.due(step) & group.perturbed
            if workers is not None:
                acts &= workers[group.members] == first.worker
            if not acts.any():
                continue
            if first.duration == 1:
                acts &= state.clock["attempt"][group.members].numpy() == 0
            strike = _strike(group, acts, step)
            if (chance := first.rule.get("probability")) is not None and strike.members:
                acts[acts] = (group.starts[acts] == step) | self.effects.fires(strike, chance)
                strike = _strike(group, acts, step)
            if strike.members:
                found.append((strike, group))
        return found

    @property
    def effects(self) -> Effects:
        """What is done to tensors; a block without events needs none."""
        assert self.parts.effects is not None
        return self.parts.effects

    def _act(
        self, target: str, moment: str, state: State, step: int, tensors: Tree, workers: np.ndarray | None = None
    ) -> bool:
        """Change ``tensors`` (name -> ``[M, …]``); whether anything was due."""
        strikes = self._strikes(target, moment, state, step, workers)
        for strike, group in strikes:
            self._record(group, self.effects.change(strike, tensors), state)
        return bool(strikes)

    def _record(self, group: _Group, hits: Sequence[Hit], state: State) -> None:
        """One line per event, of its first step, once; how often it acts is a matter of the plan."""
        for hit in hits:
            for m, run, p in zip(group.members, group.runs, group.planned, strict=True):
                if p is hit.planned and run.perturbed and state.clock["attempt"][m] == 0:
                    self.recorder.event(run, hit)

    def _slots(self, moment: str, state: State, step: int) -> None:
        """Slots by their kind; an optimizer may keep none or, as AMSGrad its two second moments, several."""
        for strike, group in self._strikes("slot", moment, state, step):
            kind = strike.planned[0].rule["slot"]
            trees = [tree for name, tree in state.slots.items() if self.parts.slot_kinds.get(name) == kind]
            hits = [self.effects.change(strike, tree) for tree in trees or [{}]]
            self._record(group, hits[0], state)

    # The moments of a step, in order

    def before_work(self, state: State, step: int) -> bool:
        """Weights at rest, before any worker reads them; whether they were changed."""
        return self._act("weights", "pre_forward", state, step, state.params)

    def batch(self, state: State, step: int, batch: Selection, workers: np.ndarray, cursor: np.ndarray) -> Batch:
        """The batch a worker gets: another one, or one with other labels or inputs."""
        strikes = self._strikes("batch", "pre_forward", state, step, workers)
        for strike, group in strikes:
            batch, hits = self._swapped(strike, batch, workers, cursor)
            self._record(group, hits, state)
        due = {target: self._strikes(target, "pre_forward", state, step, workers) for target in ("inputs", "labels")}
        if not any(due.values()):
            return batch
        altered = Altered(batch, self._with_twins(step, due))
        where = {m: i for i, m in enumerate(altered.members)}
        for target, tensor in (("inputs", altered.x), ("labels", altered.y)):
            for strike, group in due[target]:
                places = [where[m] for m in strike.members]
                part = Strike(strike.planned, places, strike.replicates, step)
                self._record(group, self.effects.change(part, {target: tensor}), state)
        return altered

    def _with_twins(self, step: int, due: dict[str, list[tuple[Strike, _Group]]]) -> list[int]:
        """The members whose data are changed, and those that are the twin of one with the same event."""
        members: set[int] = set()
        for strikes in due.values():
            for strike, group in strikes:
                struck = {(p.case, p.step) for p in strike.planned}
                members |= {m for m, p in zip(group.members, group.planned, strict=True) if (p.case, p.step) in struck}
        return sorted(members)

    def _swapped(
        self, strike: Strike, batch: Selection, workers: np.ndarray, cursor: np.ndarray
    ) -> tuple[Selection, list[Hit]]:
        """Another batch of the same worker, replicate and epoch."""
        members, sampler = list(strike.members), self.parts.sampler
        epoch, place = np.divmod(cursor[members], sampler.steps_per_epoch)
        other = epoch * sampler.steps_per_epoch + self.effects.other(strike, place, sampler.steps_per_epoch)
        new = sampler.indices(strike.replicates, workers[members], other)
        index = batch.index.clone()
        old = index[members]
        index[members] = torch.from_numpy(new).to(index.device)
        hits = [
            Hit(p, (float(a),), (float(b),), (), "place in the epoch", old.shape[1])
            for p, a, b in zip(strike.planned, place, other % sampler.steps_per_epoch, strict=True)
            if p.step == strike.step
        ]
        return Selection(batch.source, index), hits

    def buffers(self, state: State, step: int, buffers: Tree, workers: np.ndarray) -> None:
        """The BatchNorm buffers a worker starts from."""
        self._act("buffer", "pre_forward", state, step, _floating(buffers), workers)

    def after_work(self, state: State, step: int, result: Grads, workers: np.ndarray) -> None:
        """What a worker hands over: its gradient, the scale of its loss, its buffers."""
        if not self._groups:
            return
        scaled = {"loss": result.loss, **result.grads}  # a factor on the loss is a factor on its gradient
        self._act("loss", "post_forward", state, step, scaled, workers)
        self._act("worker_gradient", "post_forward", state, step, result.grads, workers)
        self._act("buffer", "post_forward", state, step, _floating(result.buffers), workers)

    def before_apply(self, state: State, step: int, grads: Tree, lr: Tensor) -> None:
        """Everything the update is made from."""
        if not self._groups:
            return
        self._act("weights", "pre_apply", state, step, state.params)
        self._slots("pre_apply", state, step)
        self._act("gradient", "pre_apply", state, step, grads)
        self._act("lr", "pre_apply", state, step, {"lr": lr})

    def after_apply(self, state: State, step: int) -> None:
        """What the update left behind."""
        if self._groups:
            self._act("weights", "post_apply", state, step, state.params)
            self._slots("post_apply", state, step)


def _strike(group: _Group, acts: np.ndarray, step: int) -> Strike:
    """The events of a group for which ``acts`` is true."""
    who = np.flatnonzero(acts).tolist()
    return Strike([group.planned[i] for i in who], [group.members[i] for i in who], group.replicates[who], step)


def _floating(buffers: Tree) -> Tree:
    """Running means and variances, not the counts of batches."""
    return {name: b for name, b in buffers.items() if b.is_floating_point()}
