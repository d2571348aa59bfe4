"""Events: plans them, and does to tensors what they say. Everything but the operations of a step; see docs/events.md.

A plan needs shapes and streams only, so every optimizer meets the same event. What is drawn anew on each step (noise,
other labels) comes from streams of the replicate and the step, so it too is the same for every optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError, nearest
from ..core.opmode import OpRecord, Site
from ..core.protocols import Hit, Planned, Strike
from ..core.streams import Streams
from ..core.tree import Tree
from .event_specs import NAMED, Event

RECORDED = 64  # elements of a hit that are stored
_ARITHMETIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "set": lambda x, size: size.expand_as(x).clone(),
    "add": torch.add,
    "mul": torch.mul,
}
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by bytes of a word


@dataclass(frozen=True)
class Layout:
    """Shapes an event can reach: one member's parameters and floating-point buffers, one batch of inputs and labels.

    ``classes`` is 0 for real targets; ``bits``: the length of a word of the study's dtype.
    """

    params: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[int, ...]]
    inputs: tuple[int, ...]
    labels: tuple[int, ...]
    classes: int
    real_inputs: bool
    bits: int
    workers: int = 1


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """The ``names`` a pattern means: ``*`` all, ``*.last`` those whose last part is ``last``, else the name itself."""
    if pattern == "*":
        return list(names)
    return [n for n in names if n == pattern or (pattern.startswith("*.") and n.endswith(pattern[1:]))]


@final
class EventModel:
    """Plans one event (:class:`~descentlab.core.protocols.Perturbation`, whose ``plan`` also gets the layout)."""

    def __init__(self, spec: Event) -> None:
        self.spec = spec

    def plan(
        self,
        case: int,
        ops: Sequence[OpRecord],
        streams: Streams,
        *,
        replicate: int,
        steps_per_epoch: int,
        layout: Layout,
    ) -> Planned:
        """Step uniform over epochs 0 to ``last_epoch``; elements uniform over all that ``parameter`` leaves open.

        Every draw is made whether it is needed or not, so fixing one leaves the others as they were. Raises UserError
        for a tensor that does not exist, an index beyond it, and what the workload does not have.
        """
        spec, u = self.spec, streams.uniform("event", 3, replicate=replicate)
        shapes = self._shapes(layout, steps_per_epoch)
        step = spec.step if spec.step is not None else int(u[0] * (spec.last_epoch + 1) * steps_per_epoch)
        if spec.target == "slot" and spec.moment == "pre_apply":
            step = max(1, step)  # before the first update there is no slot
        pattern = self._pattern(shapes)
        names = matching(shapes, pattern) if spec.target in NAMED else [spec.target]
        if spec.elements is not None:
            sizes = np.array([math.prod(shapes[n]) for n in names])
            pattern = names[int(np.searchsorted(sizes.cumsum(), u[1] * sizes.sum(), side="right"))]
            names = [pattern]
        shape = shapes[names[0]] if len(names) == 1 and names[0] in shapes else ()
        index = self._index(shape, streams, replicate)
        site = Site(pattern, 0, spec.target, spec.moment)
        rule = self._rule(int(u[2] * layout.bits))
        return Planned(case, step, site, index, rule, tuple(shape), spec.worker, spec.duration, spec.every)

    def _shapes(self, layout: Layout, steps_per_epoch: int) -> dict[str, tuple[int, ...]]:
        """The tensors of the target by name, after checking what only the workload can tell."""
        spec = self.spec
        if spec.worker >= layout.workers:
            raise UserError("fault.worker", spec.worker, f"a worker from 0 to {layout.workers - 1}")
        if spec.bit is not None and spec.bit >= layout.bits:
            raise UserError("fault.bit", spec.bit, f"0 to {layout.bits - 1}, the bits of a word of the study's dtype")
        if spec.target == "batch" and steps_per_epoch < 2:
            raise UserError("fault.target", "batch", "an epoch of at least two batches to swap")
        if spec.target == "inputs" and not layout.real_inputs:
            raise UserError("fault.target", "inputs", "real inputs; those of this dataset are token ids")
        if spec.target == "labels":
            self._check_labels(layout)
        if spec.target in NAMED:
            return dict(layout.buffers if spec.target == "buffer" else layout.params)
        return {"inputs": layout.inputs, "labels": layout.labels}

    def _check_labels(self, layout: Layout) -> None:
        spec, c = self.spec, layout.classes
        allowed = ("swap", "set") if c else ("set", "add", "mul", "noise")
        if spec.op not in allowed:
            kind = f"labels of {c} classes" if c else "real targets"
            raise UserError("fault.op", spec.op, f"one of {', '.join(allowed)} for {kind}")
        if c and spec.op == "set" and spec.magnitude not in range(c):
            raise UserError("fault.magnitude", spec.magnitude, f"a class from 0 to {c - 1}")

    def _pattern(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Which tensors may be hit, as the layer of a planned event's site."""
        asked = self.spec.parameter
        if self.spec.target not in NAMED:
            return self.spec.target
        kind = "buffer" if self.spec.target == "buffer" else "parameter"
        if not shapes:
            raise UserError("fault.target", self.spec.target, f"a model with {kind}s; this one has none")
        if asked is None:
            return "*"
        found = matching(shapes, asked) or matching(shapes, f"*.{asked}")
        if not found:
            hint = nearest(asked, shapes)
            raise UserError("fault.parameter", asked, f"a {kind} of the model: {', '.join(shapes)}", hint=hint)
        if self.spec.index is not None and len(found) > 1:
            expected = f"one tensor in which the elements of index lie, not {len(found)} ({', '.join(found)})"
            raise UserError("fault.parameter", asked, expected)
        return found[0] if len(found) == 1 else f"*.{asked}"

    def _index(self, shape: Sequence[int], streams: Streams, replicate: int) -> tuple[int, ...]:
        """The elements that are fixed before training; samples of a batch and shares of a tensor are drawn later."""
        spec, size = self.spec, math.prod(shape)
        if spec.index is not None:
            if max(spec.index) >= size:
                raise UserError("fault.index", max(spec.index), f"0 to {size - 1}, elements of a {tuple(shape)} tensor")
            return tuple(spec.index)
        if spec.elements is None:
            return ()
        if spec.elements > size:
            raise UserError("fault.elements", spec.elements, f"at most {size}, the elements of a {tuple(shape)} tensor")
        if spec.elements > size // 2:
            places: Iterable[int] = streams.permutation("event/elements", size, replicate=replicate)
        else:  # repetitions are dropped; so many draws always hold enough different ones
            draws = 4 * spec.elements + 64
            places = dict.fromkeys(streams.integers("event/elements", size, draws, replicate=replicate))
        return tuple(int(i) for i in places)[: spec.elements]

    def _rule(self, bit: int) -> dict[str, Any]:
        spec = self.spec
        rule: dict[str, Any] = {"kind": spec.op}
        if spec.magnitude is not None:
            rule["value"] = spec.magnitude
        if spec.op == "flip":
            rule["bit"] = spec.bit if spec.bit is not None else bit
        if spec.slot is not None:
            rule["slot"] = spec.slot
        plain = {"relative": False, "fraction": None, "drift": 1.0, "probability": 1.0}
        return rule | {key: getattr(spec, key) for key, usual in plain.items() if getattr(spec, key) != usual}


@final
class EventEffects:
    """What planned events do (:class:`~descentlab.core.protocols.Effects`), for all members of an ensemble at once.

    ``classes`` of the labels, 0 for real targets.
    """

    def __init__(self, streams: Streams, classes: int) -> None:
        self.streams, self.classes = streams, classes
        self._places: dict[tuple, Tensor] = {}

    def fires(self, strike: Strike, probability: float) -> np.ndarray:
        """See the protocol: one draw per replicate and step."""
        return self.streams.uniform("event/fires", 1, replicate=strike.replicates, step=strike.step)[:, 0] < probability

    def other(self, strike: Strike, current: np.ndarray, count: int) -> np.ndarray:
        """See the protocol: uniform over the ``count - 1`` others."""
        shift = self.streams.integers("event/other", count - 1, replicate=strike.replicates, step=strike.step)[:, 0]
        return (current + 1 + shift) % count

    def change(self, strike: Strike, tensors: Tree) -> list[Hit]:
        """See the protocol; a Hit says that nothing was applied where no tensor of the planned name exists."""
        first = strike.planned[0]
        names = matching(tensors, first.site.layer) if first.site.direction in NAMED else list(tensors)
        if not names:
            whose = "" if first.site.layer == "*" else f" of {first.site.layer}"
            reason = f"this optimizer keeps no {first.rule.get('slot')}{whose}"
            return [Hit(p, (), (), (), "", 0, False, reason) for p in strike.planned if p.step == strike.step]
        rows = torch.tensor(strike.members, device=tensors[names[0]].device)
        for n in names:
            if any(s == 0 and length > 1 for s, length in zip(tensors[n].stride(), tensors[n].shape, strict=True)):
                tensors[n] = tensors[n].contiguous()  # an expanded gradient: its elements share memory
        old = {n: tensors[n][rows].reshape(len(rows), -1) for n in names}
        where = {n: self._where(strike, n, old[n]) for n in names}
        picked = {n: old[n] if w is None else old[n].gather(1, w) for n, w in where.items()}
        changed = self._changed(strike, old, picked)
        for name, new in changed.items():
            w = where[name]
            whole = new if w is None else old[name].scatter(1, w, new)
            tensors[name][rows] = whole.view(len(rows), *tensors[name].shape[1:])
        return self._hits(strike, names[0], where[names[0]], picked, changed)

    def _where(self, strike: Strike, name: str, old: Tensor) -> Tensor | None:
        """Flat elements to change, int64 ``[G, n]``; None for all of them."""
        first, size = strike.planned[0], old.shape[1]
        if first.index:
            return torch.tensor([p.index for p in strike.planned], device=old.device)
        fraction = first.rule.get("fraction")
        data = first.site.direction in ("inputs", "labels")
        if fraction is None or (first.site.direction == "labels" and self.classes):  # drawn one by one, see _labels
            return None
        n, fixed = max(1, round(fraction * size)), not data
        key = (first.site, n, size, strike.replicates.tobytes(), 0 if fixed else strike.step)
        if key not in self._places:
            if len(self._places) >= 32:
                self._places.clear()
            purpose = f"event/places/{name}"
            u = self.streams.uniform(purpose, size, replicate=strike.replicates, step=key[-1])
            self._places[key] = torch.from_numpy(np.argpartition(u, n - 1, axis=1)[:, :n])
        return self._places[key].to(old.device)

    def _changed(self, strike: Strike, old: Mapping[str, Tensor], picked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new values of the picked elements, ``[G, n]`` by name."""
        rule = strike.planned[0].rule
        if rule["kind"] == "flip":
            return {n: _flipped(x, rule["bit"]) for n, x in picked.items()}
        if strike.planned[0].site.direction == "labels" and self.classes:
            return {n: self._labels(strike, x) for n, x in picked.items()}
        size = self._size(strike, old)
        if rule["kind"] in ("noise", "kick"):
            draws = {n: self._normal(strike, n, x) for n, x in picked.items()}
            if rule["kind"] == "kick":
                norm = torch.stack([d.square().sum(1) for d in draws.values()]).sum(0).sqrt()
                draws = {n: d / norm.unsqueeze(1) for n, d in draws.items()}
            return {n: x + (draws[n] * size).to(x.dtype) for n, x in picked.items()}
        with_size = _ARITHMETIC[rule["kind"]]
        return {n: with_size(x, size.to(x.dtype)) for n, x in picked.items()}

    def _size(self, strike: Strike, old: Mapping[str, Tensor]) -> Tensor:
        """The magnitude on this step, float64 ``[G, 1]``.

        A relative one is in units of the root mean square of all elements of the target's tensors, for a kick of their
        norm.
        """
        rule = strike.planned[0].rule
        since = np.array([strike.step - p.step for p in strike.planned], dtype=np.float64)
        with np.errstate(over="ignore"):
            size = torch.from_numpy(rule["value"] * rule.get("drift", 1.0) ** since)
        size = size.to(next(iter(old.values())).device)
        if rule.get("relative"):
            square = torch.stack([x.double().square().sum(1) for x in old.values()]).sum(0)
            count = 1 if rule["kind"] == "kick" else sum(x.shape[1] for x in old.values())
            size = size * (square / count).sqrt()
        return size.unsqueeze(1)

    def _normal(self, strike: Strike, name: str, x: Tensor) -> Tensor:
        """Standard normal float64 ``[G, n]``, fresh on every step."""
        site, worker = strike.planned[0].site, strike.planned[0].worker
        draws = self.streams.normal(
            f"event/{site.direction}/{name}", x.shape[1], replicate=strike.replicates, worker=worker, step=strike.step
        )
        return torch.from_numpy(draws).to(x.device)

    def _labels(self, strike: Strike, y: Tensor) -> Tensor:
        """Class labels: each one, or with the planned chance, becomes the class asked for or another one, uniformly."""
        first = strike.planned[0]
        draws = self.streams.uniform(
            "event/labels", 2 * y.shape[1], replicate=strike.replicates, worker=first.worker, step=strike.step
        )
        chance, which = torch.from_numpy(draws).to(y.device).chunk(2, dim=1)
        if first.rule["kind"] == "set":
            new = torch.full_like(y, int(first.rule["value"]))
        else:
            new = (y + 1 + (which * (self.classes - 1)).to(y.dtype)) % self.classes
        return torch.where(chance < first.rule.get("fraction", 1.0), new, y)

    def _hits(
        self,
        strike: Strike,
        tensor: str,
        where: Tensor | None,
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
    ) -> list[Hit]:
        """On the first step of an event: elements of the first tensor, and how many of all tensors were changed."""
        hits = []
        for g, p in enumerate(strike.planned):
            if strike.step != p.step:
                continue
            before, after = old[tensor][g], new[tensor][g]
            count = sum(int((old[n][g] != new[n][g]).sum()) for n in old)
            keep = (before != after).nonzero().flatten() if where is None else torch.arange(len(before))
            keep = keep[:RECORDED].to(before.device)
            index = keep if where is None else where[g][keep]
            ends = tuple(before[keep].tolist()), tuple(after[keep].tolist())
            hits.append(Hit(p, *ends, tuple(index.tolist()), tensor, count))
        return hits


def _flipped(x: Tensor, bit: int) -> Tensor:
    """One bit of every element turned; bit 0 is the sign, as in a word written from the left."""
    word = INTEGERS[x.element_size()]
    place = torch.iinfo(word).bits - 1 - bit
    mask = torch.tensor(1, dtype=word, device=x.device) << place
    return (x.contiguous().view(word) ^ mask).view(x.dtype)
