"""Between an update and its consequences: states kept for a rewind, the check of a recovery arm, its action.

A rewound member goes back to a state before the last ``keeps`` updates and makes them again on the same batches and
dropout masks, as attempt 1, 2, …; a transient fault does not come back. It then stands where the others stand, so the
loop goes on in step. Where the work of a member depends on who shares its call (``vmap``), the steps are made again in
the same company and only this member's part is kept: what comes out equals an undisturbed run to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.protocols import Alarm, Arm, Inverse
from ..core.state import State
from ..core.tree import Tree, clone, leaves, put, restore, take
from .recorder import Recorder
from .work import MemberWork

if TYPE_CHECKING:
    from .driver import Engine
    from .program import BlockPlan, Slot

LARGE = 2**16  # elements of a tensor
NUMPY = (torch.float32, torch.float64, torch.int64)


@dataclass
class Kept:
    """All members as they were before the update ``step``; or, for an arm that inverts updates, what has no inverse of
    that state (no weights, slots and buffers) and the ``applied`` gradients and rates of the update."""

    step: int
    slots: tuple[Slot, ...]
    state: State
    applied: Tree = field(default_factory=dict)

    def row(self, slot: Slot) -> int:
        """The member that ``slot`` was then (a fork may have come between)."""
        return next(i for i, s in enumerate(self.slots) if any(run.id == slot.runs[0].id for run in s.runs))


class Guard:
    """Runs the recovery arm of one engine. ``replaying``: of steps made again, which keep nothing and do not rewind."""

    def __init__(self, arm: Arm, *, replaying: bool = False) -> None:
        self.arm, self.replaying = arm, replaying
        self.ring: list[Kept] = []
        self.alarms: list[Alarm] = []
        self.inverse: Inverse | None = getattr(arm, "inverse", None)
        self.again: Tree = {}  # applied in a repeated step

    def keep(self, engine: Engine) -> None:
        """Called before an update: a copy of the state into the oldest place of the ring."""
        self.alarms = []
        if self.replaying or not self.arm.keeps:
            return
        oldest = self.ring.pop(0) if len(self.ring) == self.arm.keeps else None
        if self.inverse is not None:
            self.ring.append(Kept(engine.step, engine.slots, without_inverse(engine.state).clone()))
        elif oldest is not None and same_shapes(oldest.state, engine.state):
            copy_into(oldest.state, engine.state)
            self.ring.append(Kept(engine.step, engine.slots, oldest.state))
        else:
            self.ring.append(Kept(engine.step, engine.slots, engine.state.clone()))

    def edit(self, grads: Tree, lr: Tensor) -> Tree:
        """The gradients to apply at the rates ``lr`` ``[M]``."""
        grads, alarms = self.arm.edit(grads)
        self.alarms += alarms
        if self.inverse is not None and not self.replaying:
            self.ring[-1].applied = clone({"grads": grads, "lr": lr})
        elif self.inverse is not None:
            self.again = {"grads": grads, "lr": lr}
        return grads

    def check(self, engine: Engine) -> None:
        """Called after an update, before it is recorded: everything but a rewind happens here."""
        found = self.arm.check(engine.state)
        self.alarms += found
        members = [alarm.member for alarm in found if alarm.act]
        if members and not self.arm.rewinds:
            before = self.ring[-1].state if self.ring else engine.state
            self.arm.act(engine.state, before, members)
            renew(engine.state)
            engine.after_update()

    def columns(self) -> dict[str, tuple[list[int], np.ndarray]]:
        """The alarms of this update as columns of the table: (members, values) each."""
        last = {alarm.member: alarm for alarm in self.alarms}  # of several, what was found after
        alarms = [last[member] for member in sorted(last)]
        if not alarms:
            return {}
        members = [alarm.member for alarm in alarms]
        back = len(self.ring) if self.arm.rewinds else 0
        values: dict[str, list[Any]] = {
            "alarm": [alarm.what for alarm in alarms],
            "alarm_value": [alarm.value for alarm in alarms],
            "alarm_bound": [alarm.bound for alarm in alarms],
            "action": [self.arm.name if alarm.act else "accepted" for alarm in alarms],
            "rewound": [back if alarm.act else 0 for alarm in alarms],
        }
        return {name: (members, np.array(column)) for name, column in values.items()}

    def rewind(self, engine: Engine) -> None:
        """Called when an update is recorded: members in alarm are taken back and run again, one after the other."""
        if not self.arm.rewinds or self.replaying:
            return
        for alarm in self.alarms:
            attempt, again = 1, alarm.act
            while again:
                again = self._run_again(engine, alarm.member, attempt)
                attempt += 1
        if any(alarm.act for alarm in self.alarms):
            engine.slots = engine.slots  # what was bound to the members of a repeated step is bound to all again
            renew(engine.state)

    def _run_again(self, engine: Engine, member: int, attempt: int) -> bool:
        """The kept steps once more for one member; True if it is in alarm again and is to be taken back again."""
        slot, recorder, part, again = engine.slots[member], Recorder(engine.recorder.now()), None, False
        alone = isinstance(engine.parts.many, MemberWork) or self.inverse is not None
        first = self._inverted(engine, member) if self.inverse is not None else None
        for kept in self.ring:
            row = kept.row(slot)
            company = [row] if alone else list(range(len(kept.slots)))
            at = company.index(row)
            if part is not None and kept.slots[row] == slot:
                restore(kept.state.state_dict(), row, part.state_dict(), 0)
            if first is None:
                state = kept.state.take(company)
            elif part is None:
                state = first
            else:
                state = part.clone()
            if part is not None:
                restore(state.state_dict(), at, part.state_dict(), 0)
            state.clock["attempt"][at] = attempt
            state.shared["arm"]["tries"][at] = attempt
            other = engine.beside(tuple(kept.slots[i] for i in company), state, kept.step, recorder)
            other.guard = Guard(self.arm, replaying=True)
            other.guard.ring = self.ring
            other.update()
            if self.inverse is not None:
                put(kept.applied, [row], other.guard.again)
            part = state.take([at])
            part.clock["attempt"][0] = 0
            again = any(alarm.member == at and alarm.act for alarm in other.guard.alarms)
        assert part is not None
        restore(engine.state.state_dict(), member, part.state_dict(), 0)
        engine.recorder.absorb(recorder, [run.id for run in slot.runs])
        return again

    def _inverted(self, engine: Engine, member: int) -> State:
        """One member before the oldest kept update, from where it stands now."""
        assert self.inverse is not None
        slot, state = engine.slots[member], engine.state.take([member])
        for kept in reversed(self.ring):
            row = kept.row(slot)
            applied = take(kept.applied, [row])
            self.inverse.undo(state, applied["grads"], applied["lr"])
            old = kept.state.take([row])
            state = State({**state.server, **old.server}, {**state.worker, **old.worker}, old.shared, old.clock)
        return state

    def state_dict(self) -> Tree:
        """What a checkpoint has to hold so that a resumed block rewinds to where an undisturbed one would."""
        return {str(kept.step): {**kept.state.state_dict(), "applied": kept.applied} for kept in self.ring}

    def load(self, held: Tree, plan: BlockPlan) -> None:
        """Inverse of :meth:`state_dict`."""
        steps = sorted(int(step) for step in held)
        trees = [held[str(step)] for step in steps]
        self.ring = [
            Kept(step, plan.slots(step), State.from_state_dict(tree), tree.get("applied", {}))
            for step, tree in zip(steps, trees, strict=True)
        ]


def without_inverse(state: State) -> State:
    """What inverting an update cannot bring back: data position, error feedback, the arm's memory, clock, counter."""
    worker = {k: v for k, v in state.worker.items() if k != "buffers"}
    return State({"opt_step": state.opt_step}, worker, state.shared, state.clock)


def same_shapes(a: State, b: State) -> bool:
    """Whether ``b`` can be copied into ``a`` (slots appear with the first update, members come and go)."""
    return signature(a.state_dict()) == signature(b.state_dict())


def signature(tree: Tree) -> list[Any]:
    """Names and shapes of all leaves."""
    return [(k, signature(v) if isinstance(v, dict) else v.shape) for k, v in tree.items()]


def copy_into(target: State, source: State) -> None:
    """Every tensor of ``source`` into the same one of ``target``.

    Large ones on the CPU by numpy, which copies as ``memcpy`` does: 10 to 15 % less time than torch's copy.
    """
    pairs = list(zip(leaves(target.state_dict()), leaves(source.state_dict()), strict=True))
    large = [_is_block(new) and _is_block(old) for new, old in pairs]
    for (new, old), by_numpy in zip(pairs, large, strict=True):
        if by_numpy:
            np.copyto(new.detach().numpy(), old.detach().numpy())
    rest = [pair for pair, by_numpy in zip(pairs, large, strict=True) if not by_numpy]
    if rest:
        torch._foreach_copy_([new for new, _ in rest], [old for _, old in rest])


def _is_block(t: Tensor) -> bool:
    """Whether numpy can copy it whole, and it is large enough for that to matter."""
    return t.numel() >= LARGE and t.device.type == "cpu" and t.is_contiguous() and t.dtype in NUMPY


def renew(state: State) -> None:
    """New mappings around the same tensors: an optimizer that is bound to the old ones reads slots and counts again."""
    state.server["params"], state.server["slots"] = dict(state.params), dict(state.slots)
