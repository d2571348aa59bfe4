"""Do a dataset and a model make a workload that can be trained, alone and in an ensemble?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.opmode import Ops, trace
from ..core.protocols import Batch
from ..core.specs import Option
from ..core.state import State
from ..core.streams import Streams
from ..core.tree import clone, leaves, stack
from ..engine.work import MemberWork, VmapWork
from ..workloads.base import Data, Workload

BATCH, MEMBERS = 6, 2


def check_workload(dataset: Option, model: Option, *, vectorised: bool = True) -> None:
    """Settings of a dataset and of a model, such as ``Digits()`` and ``Mlp()``.

    No sample is in two parts; numbers are finite; the same stream gives the same weights and the global generator is
    left alone; the vectorised route gives what one plain module after the other gives, in float64 to 1e-9; the gradient
    is that of finite differences. ``vectorised=False`` leaves out the vectorised route, for modules ``vmap`` refuses.
    """
    name = f"{dataset.name} with {model.name}"
    data: Data = dataset.build()
    _check_data(dataset.name, data)
    work = Workload.of(data, model.build(), dtype=torch.float64, device=torch.device("cpu"))
    state = _check_start(name, work)
    batch = _batch(work.data)
    operations = trace(work.module(Streams(0), 0), batch.x[0])
    masks = {(r.layer, r.call): torch.ones(MEMBERS, *r.a, dtype=torch.float64) for r in operations if r.p}
    ops = Ops(masks=masks) if masks else None
    member = MemberWork(work.module(Streams(0), 0), work)
    before = clone(state.server)
    one = member.work(state, batch, ops)
    same = all(torch.equal(a, b) for a, b in zip(leaves(before), leaves(state.server), strict=True))
    assert same, f"{name}: a forward and backward pass changes its weights or buffers in place"
    assert torch.isfinite(one.loss).all(), f"{name}: the loss of a fresh model is not finite"
    if vectorised:
        many = VmapWork(work.module(Streams(0), 0), work).work(state, batch, ops)
        for what in ("loss", "accuracy", "grads", "buffers"):
            error = _difference(getattr(one, what), getattr(many, what))
            assert error < 1e-9, f"{name}: {what} of the vectorised route differ from a plain module's by {error:.1e}"
    _check_gradient(name, member, state, batch, ops)


def _check_data(name: str, data: Data) -> None:
    seen: dict[bytes, str] = {}
    for part in ("train", "validation", "test"):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        assert len(x) == len(y), f"{name}: {len(x)} inputs but {len(y)} targets in the {part} part"
        assert torch.isfinite(x.double()).all(), f"{name}: inputs of the {part} part are not finite"
        if data.classes:
            inside = len(y) == 0 or (int(y.min()) >= 0 and int(y.max()) < data.classes)
            assert inside, f"{name}: targets of the {part} part lie outside 0 to {data.classes - 1}"
        for sample in zip(x.numpy(), y.numpy(), strict=True):
            key = b"".join(np.ascontiguousarray(t).tobytes() for t in sample)
            other = seen.setdefault(key, part)
            assert other == part, f"{name}: a sample of the {part} part is also in the {other} part"
    assert data.source and data.licence, f"{name}: source and licence have to be given"


def _check_start(name: str, work: Workload) -> State:
    generator = torch.get_rng_state()
    modules: list[nn.Module] = [work.module(Streams(0), replicate) for replicate in (0, 0, 1)]
    untouched = torch.equal(generator, torch.get_rng_state())
    assert untouched, f"{name}: building the model changes torch's global generator"
    first, again, other = ({k: p.detach() for k, p in m.named_parameters()} for m in modules)
    assert first, f"{name}: the model has no parameters"
    assert all(torch.equal(first[k], again[k]) for k in first), f"{name}: the same seed gives two different models"
    assert all(p.dtype == torch.float64 for p in first.values()), f"{name}: the model does not take the study's dtype"
    buffers = [{k: b.detach() for k, b in m.named_buffers()} for m in (modules[0], modules[2])]
    return State.start(stack([first, other]), stack(buffers))


def _batch(data: Data) -> Batch:
    x, y = data.x_train[: BATCH * MEMBERS], data.y_train[: BATCH * MEMBERS]
    return Batch(x.unflatten(0, (MEMBERS, BATCH)), y.unflatten(0, (MEMBERS, BATCH)))


def _difference(a: Any, b: Any) -> float:
    """Largest difference relative to the largest number; equal NaNs count as equal."""
    pairs = list(zip(leaves(a), leaves(b), strict=True)) if isinstance(a, dict) else [(a, b)]
    scale = max((float(x.double().nan_to_num().abs().max()) for x, _ in pairs if x.numel()), default=0.0) or 1.0
    return max((float((x.double() - y.double()).nan_to_num().abs().max()) / scale for x, y in pairs), default=0.0)


def _check_gradient(name: str, member: MemberWork, state: State, batch: Batch, ops: Ops | None) -> None:
    """Along the gradient itself the slope of the loss is its squared norm: the steps shrink until they agree."""
    grads = member.work(state, batch, ops).grads
    slope = float(torch.stack([g[0].square().sum() for g in leaves(grads)]).sum())
    assert slope > 0, f"{name}: the gradient of a fresh model is zero"
    errors = []
    for step in (1e-4, 1e-5, 1e-6):
        losses: list[Tensor] = []
        for sign in (1.0, -1.0):
            moved = state.clone()
            for key, p in moved.params.items():
                p.add_(sign * step / slope**0.5 * grads[key])
            losses.append(member.work(moved, batch, ops).loss[0])
        errors.append(abs(float(losses[0] - losses[1]) / (2 * step) / slope**0.5 - 1.0))
    assert min(errors) < 1e-4, f"{name}: gradient and finite differences of the loss differ by {min(errors):.1e}"
