"""Recovery arms: a detector that looks at the state after every update, and an action on the members in alarm.

What an arm remembers of a member lies in ``state.shared["arm"]`` (``[M]`` each), so that it is forked, rewound and
stored with the rest of the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..core.member_stats import member_nonfinite, member_norm
from ..core.protocols import Alarm, Inverse
from ..core.state import State
from ..core.tree import Tree, leaves, restore, tree_map
from .arm_specs import Watching

VARIANCE = "running_var"
SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"})  # slots that hold squares
FIRST_MOMENTS = frozenset({"exp_avg", "grad_avg"})
FIRST_SLOT, FIRST_VARIANCE = 1e3, 1e4  # calibrated bounds before anything was accepted
LARGEST = 1.7e308  # a bound that every finite value meets


@dataclass
class Finding:
    """What a detector read: ``values`` and ``bounds`` ``[K, M]`` of the K ``kinds``, as float64."""

    kinds: list[str]
    values: Tensor
    bounds: Tensor

    @property
    def wrong(self) -> Tensor:
        """Members with a value beyond its bound, bool ``[M]``; NaN is beyond every bound."""
        return ~(self.values <= self.bounds).all(0)

    def worst(self, member: int) -> tuple[str, float, float]:
        """Kind, value and bound of what is furthest beyond its bound."""
        ratio = (self.values / self.bounds)[:, member].nan_to_num(nan=torch.inf)
        k = int(ratio.argmax())
        return self.kinds[k], float(self.values[k, member]), float(self.bounds[k, member])


class Detector:
    """Reads the state after an update; this one reads nothing."""

    def start(self, members: int) -> Tree:
        """What is remembered of every member ``[M]`` at the start."""
        return {}

    def read(self, state: State) -> Finding | None:
        """What was found, or None when there is nothing to look at."""
        return None

    def accept(self, memory: Tree, found: Finding, members: Tensor) -> None:
        """The values of ``members`` (bool ``[M]``) count as normal from now on."""


def watched(state: State, check: str) -> dict[str, list[Tensor]]:
    """Kind -> the tensors ``[M, …]`` in which gradients (or activations: BatchNorm's variance) are remembered."""
    kinds: dict[str, list[Tensor]] = {}
    for slot, tensors in state.slots.items():
        shaped = [t for name, t in tensors.items() if name in state.params and t.shape == state.params[name].shape]
        if check == "published":
            shaped = [t for t in shaped if slot in FIRST_MOMENTS and t.dim() == 5]  # [M, out, in, height, width]
        if shaped:
            kinds[slot] = shaped
    variances = [b for name, b in state.buffers.items() if name.endswith(VARIANCE)]
    if variances and check == "all":
        kinds[VARIANCE] = variances
    return kinds


def extreme(tensors: Sequence[Tensor], two_sided: bool) -> Tensor:
    """Largest element (of either sign) per member, float64 ``[M]``; reads every element once per side, copies none."""
    flat = [t.flatten(1) for t in tensors]
    tops = [t.amax(1) for t in flat]
    if two_sided:
        tops += [t.amin(1).neg() for t in flat]
    return torch.stack(tops).amax(0).double()


@final
class Bounds(Detector):
    """The bound check of :class:`~descentlab.perturb.arm_specs.Watching`."""

    def __init__(self, spec: Watching) -> None:
        self.spec = spec

    def start(self, members: int) -> Tree:
        return {"peak": {}}

    def read(self, state: State) -> Finding | None:
        kinds = watched(state, self.spec.check)
        if not kinds:
            return None
        peaks = state.shared["arm"]["peak"]
        values, bounds = [], []
        for kind, tensors in kinds.items():
            value = extreme(tensors, self.spec.check == "all")
            values.append(value.sqrt() if kind in SQUARES else value)
            peak = peaks.setdefault(kind, torch.zeros_like(values[-1]))
            bounds.append(self._bound(kind, peak))
        return Finding(list(kinds), torch.stack(values), torch.stack(bounds))

    def _bound(self, kind: str, peak: Tensor) -> Tensor:
        fixed = self.spec.variance_bound if kind == VARIANCE else self.spec.slot_bound
        if fixed is not None:
            return torch.full_like(peak, fixed)
        first = FIRST_VARIANCE if kind == VARIANCE else FIRST_SLOT
        return torch.where(peak > 0, peak * self.spec.factor, first).clamp_max(LARGEST)

    def accept(self, memory: Tree, found: Finding, members: Tensor) -> None:
        for kind, value in zip(found.kinds, found.values, strict=True):
            peak = memory["peak"][kind]
            normal = members & torch.isfinite(value)
            peak.copy_(torch.where(normal, torch.maximum(peak, value), peak))


@final
class NonFinite(Detector):
    """Counts NaN and Inf among weights, slots and buffers; one is too many."""

    def read(self, state: State) -> Finding | None:
        held = leaves({k: state.server[k] for k in ("params", "buffers", "slots")})
        real = {str(i): t for i, t in enumerate(held) if t.is_floating_point() and t.dim() > 1}
        counts = member_nonfinite(real).double().unsqueeze(0)
        return Finding(["nonfinite"], counts, torch.zeros_like(counts))


@dataclass
class Action:
    """What is done; this one does nothing. ``keeps``: States from before the last updates that it needs; ``rewinds``:
    the engine executes those updates again."""

    keeps: int = 0
    rewinds: bool = False

    def start(self, members: int) -> Tree:
        """What is remembered of every member ``[M]`` at the start."""
        return {}

    def edit(self, grads: Tree) -> tuple[Tree, list[Alarm]]:
        """The gradients ``[M, …]`` to apply, and for which members they were changed."""
        return grads, []

    def act(self, state: State, before: State, members: Sequence[int]) -> None:
        """Change ``members`` of ``state`` in place; ``before``: the members as they were before the update."""


def undo(state: State, before: State, member: int) -> None:
    """Nothing of the last update is kept; time, data position and the arm's memory go on."""
    for now, then, going_on in (
        (state.server, before.server, ""),
        (state.worker, before.worker, "cursor"),
        (state.shared, before.shared, "arm"),
    ):
        restore({k: v for k, v in now.items() if k != going_on}, member, then, member)


@final
class SkipUpdate(Action):
    """The update did not happen (``keep_slots``: only the weights did not move)."""

    def __init__(self, keep_slots: bool) -> None:
        super().__init__(keeps=1)
        self.keep_slots = keep_slots

    def act(self, state: State, before: State, members: Sequence[int]) -> None:
        for m in members:
            if self.keep_slots:
                restore(state.params, m, before.params, m)
            else:
                undo(state, before, m)


def forget(state: State, member: int) -> None:
    """The optimizer starts anew: its slots are made again by the next update, as by the first."""
    for slot in leaves(state.slots):
        slot[member] = 0
    state.opt_step[member] = 0


@final
class ResetSlots(Action):
    """Slots and running statistics start again; the weights stay where the update has put them."""

    def act(self, state: State, before: State, members: Sequence[int]) -> None:
        for m in members:
            forget(state, m)
            for tree in (state.buffers, state.worker.get("buffers", {})):
                for name, buffer in tree.items():
                    if name.endswith((VARIANCE, "running_mean", "num_batches_tracked")):
                        buffer[m] = 1 if name.endswith(VARIANCE) else 0


@final
class SwitchOptimizer(Action):
    """The update is undone; ``switched`` tells :class:`~descentlab.optim.switched.Switched` who has gone over."""

    def __init__(self) -> None:
        super().__init__(keeps=1)

    def start(self, members: int) -> Tree:
        return {"switched": torch.zeros(members, dtype=torch.bool)}

    def act(self, state: State, before: State, members: Sequence[int]) -> None:
        for m in members:
            undo(state, before, m)
            forget(state, m)
            state.shared["arm"]["switched"][m] = True
            for peak in leaves(state.shared["arm"]["peak"]):
                peak[m] = 0


@final
class ClipGradient(Action):
    """The factor of ``torch.nn.utils.clip_grad_norm_``, per member; a gradient within the norm is left to the bit."""

    def __init__(self, max_norm: float) -> None:
        super().__init__()
        self.max_norm = max_norm

    def edit(self, grads: Tree) -> tuple[Tree, list[Alarm]]:
        norms = member_norm(grads)
        factor = (self.max_norm / (norms + 1e-6)).clamp(max=1.0)
        beyond = [m for m, f in enumerate(factor.tolist()) if not f >= 1.0]
        if not beyond:
            return grads, []
        scaled = tree_map(lambda g: g * factor.to(g.dtype).view(-1, *[1] * (g.dim() - 1)), grads)
        return scaled, [Alarm(m, "gradient", float(norms[m]), self.max_norm) for m in beyond]


@final
class RestoreNonFinite(Action):
    """Element by element: a gradient that is not finite is 0, any other value what it was before the update."""

    def __init__(self) -> None:
        super().__init__(keeps=1)

    def edit(self, grads: Tree) -> tuple[Tree, list[Alarm]]:
        counts = member_nonfinite(grads).tolist()
        if not any(counts):
            return grads, []
        clean = tree_map(lambda g: torch.where(torch.isfinite(g), g, torch.zeros_like(g)), grads)
        return clean, [Alarm(m, "gradient", float(n), 0.0) for m, n in enumerate(counts) if n]

    def act(self, state: State, before: State, members: Sequence[int]) -> None:
        for m in members:
            old = tree_map(lambda t: t.clone(), {k: state.server[k] for k in ("params", "buffers", "slots")})
            restore(old, m, before.server, m)
            for now, then in zip(leaves({k: state.server[k] for k in old}), leaves(old), strict=True):
                now[m] = torch.where(torch.isfinite(now[m]), now[m], then[m])


@final
class GuardedArm:
    """A detector and an action as one :class:`~descentlab.core.protocols.Arm`.

    A member in alarm is acted upon ``max_attempts`` times in a row at most (None: without limit); then its values are
    accepted, once on record, and it is left alone until they are within the bounds again.
    """

    def __init__(self, name: str, detector: Detector, action: Action, max_attempts: int | None) -> None:
        self.name, self.detector, self.action = name, detector, action
        self.keeps, self.rewinds = action.keeps, action.rewinds
        self.inverse: Inverse | None = None  # takes the place of kept states
        self.max_attempts = 2**62 if max_attempts is None else max_attempts

    def start(self, members: int) -> Tree:
        memory = {"tries": torch.zeros(members, dtype=torch.int64)}
        return {**memory, **self.detector.start(members), **self.action.start(members)}

    def edit(self, grads: Tree) -> tuple[Tree, list[Alarm]]:
        return self.action.edit(grads)

    def check(self, state: State) -> list[Alarm]:
        found = self.detector.read(state)
        if found is None:
            return []
        memory, wrong = state.shared["arm"], found.wrong
        any_wrong = bool(wrong.any())  # the one place where the host waits
        tries = memory["tries"]
        self.detector.accept(memory, found, ~wrong | (tries == self.max_attempts) if any_wrong else ~wrong)
        alarms = []
        if any_wrong:
            left = (self.max_attempts - tries).tolist()
            alarms = [Alarm(m, *found.worst(m), act=left[m] > 0) for m, w in enumerate(wrong.tolist()) if w]
            alarms = [alarm for alarm in alarms if left[alarm.member] >= 0]
        tries.copy_(torch.where(wrong, (tries + 1).clamp_max(self.max_attempts + 1), 0))
        return alarms

    def act(self, state: State, before: State, members: Sequence[int]) -> None:
        self.action.act(state, before, members)
