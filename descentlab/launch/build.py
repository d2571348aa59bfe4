"""Builds what a cell's settings name: the only place where every room meets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config.tree import StudySpec
from ..core.errors import UserError
from ..core.footprint import footprint
from ..core.opmode import OpRecord, trace
from ..core.protocols import Apply, Work
from ..core.streams import Streams
from ..core.tree import Tree
from ..engine.batched_cnn import BatchedCnn, cnn_kernel, convolutions
from ..engine.batched_mlp import BatchedMlp, plain_layers
from ..engine.parts import Parts, Sampler
from ..engine.program import Route, choose_route
from ..engine.work import MemberWork, VmapWork
from ..observe.extra import load as load_observables
from ..observe.specs import Observe
from ..observe.training import STANDARD, TestSet
from ..optim.handover import Handover, Tracking
from ..optim.stacked import SLOT_KINDS, Rule, StackedOptimizer
from ..optim.vectorised import VectorisedOptimizer
from ..perturb.events import EventEffects, EventModel, Layout
from ..workloads.base import Data, Workload
from ..workloads.loading import load_data
from ..workloads.models.cnn import SmallCNN
from ..workloads.models.mlp import MLP
from .accelerate import check_switches
from .arms import arm_of, with_switch
from .conditions import conditions
from .harness import counted, cut, dealt, equip, inferred_of, schedules_of, start_streams, update_of
from .memory import bytes_per_member, free_bytes, is_out_of_memory
from .packing import Update
from .sending import with_link

COVARIANCE_AT_MOST = 2000  # weights: 32 MB for every look at them


def resolve_device(asked: str) -> torch.device:
    """``auto`` = CUDA where there is one, else the CPU; a device this machine does not have is an error."""
    available = ["cpu"]
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    if asked == "auto":
        return torch.device("cuda" if "cuda" in available else "cpu")
    if asked not in available:
        raise UserError("device", asked, f"a device of this machine ({', '.join(available)}) or auto")
    return torch.device(asked)


@dataclass(frozen=True)
class Site:
    """What planning needs of a cell: its operations, the length of an epoch, its streams and its route; what a member
    of its ensemble needs of an accelerator's memory, and what is free there (None: not an accelerator's)."""

    operations: list[OpRecord]
    steps_per_epoch: int
    streams: Streams
    route: Route
    layout: Layout
    bytes_per_member: int
    free_bytes: int | None
    inferred: dict[str, Any]  # what the data and the model decide, as plan.json says it
    alone: bool = False  # whether a member's numbers are the same to the bit beside any others


def workload(cell: StudySpec) -> Workload:
    """Dataset and model of a cell on its device."""
    dtype = getattr(torch, cell.dtype)
    data = cut(cell, load_data(cell.dataset))
    n = len(data.x_train)
    if cell.sampler.name != "full" and cell.batch_size > n:
        raise UserError("batch_size", cell.batch_size, f"at most the {n} training samples of '{data.name}'")
    square = getattr(cell, "loss", "auto") == "square"
    return Workload.of(data, cell.model.build(), dtype=dtype, device=resolve_device(cell.device), square=square)


def survey(cell: StudySpec) -> Site:
    """Trace one batch through the model: which operations a perturbation can reach."""
    load_observables(cell.observe.extra)
    streams, work = Streams(cell.seed), workload(cell)
    sampler = _sampler(cell, work.data, streams)
    sample = work.data.x_train[: sampler.batch_size]
    module = _module(work, streams)
    _check_looks(cell.observe, module)
    try:
        operations = trace(module, sample)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        shape = tuple(sample.shape[1:])
        raise UserError("model", cell.model.name, f"a model that accepts inputs of shape {shape} ({error})") from None
    route = choose_route(device=work.device.type, operations=operations)
    check_switches(cell, route)
    layout = _layout(cell, module, work.data, sampler.batch_size)
    size = bytes_per_member(
        layout.params,
        layout.buffers,
        kept=footprint(module, work.data.x_train).kept,
        batch_size=sampler.batch_size,
        workers=layout.workers,
        element_size=getattr(torch, cell.dtype).itemsize,
    )
    inferred = inferred_of(work.data, module)
    free = free_bytes(work.device)
    alone = route == "vmap" and _one_by_one(_vectorised(module, work, 1, MemberWork(module, work)), work)
    return Site(operations, sampler.steps_per_epoch, streams, route, layout, size, free, inferred, alone)


def _one_by_one(many: Work, work: Workload) -> bool:
    """Whether the work of many members is done in code that takes one after the other."""
    if isinstance(many, BatchedCnn):
        return work.device.type == "cpu" and cnn_kernel(work.dtype) is not None
    return isinstance(many, BatchedMlp)


def _layout(cell: StudySpec, module: nn.Module, data: Data, batch_size: int) -> Layout:
    """Shapes an event can reach."""
    return Layout(
        params={name: tuple(p.shape) for name, p in module.named_parameters()},
        buffers={name: tuple(b.shape) for name, b in module.named_buffers() if b.is_floating_point()},
        inputs=(batch_size, *data.x_train.shape[1:]),
        labels=(batch_size, *data.y_train.shape[1:]),
        classes=data.classes,
        real_inputs=data.x_train.is_floating_point(),
        bits=torch.finfo(getattr(torch, cell.dtype)).bits,
        workers=getattr(cell, "workers", 1),
    )


def _check_looks(observe: Observe, module: nn.Module) -> None:
    """Whether the model has the weights that ``observe.weights`` is to look at, and not too many for a matrix."""
    held = sum(p.numel() for p in module.parameters())
    if observe.coordinates and max(observe.coordinates) >= held:
        raise UserError("observe.coordinates", max(observe.coordinates), f"places in the {held} weights, from 0")
    looked = len(observe.coordinates) or held
    if observe.weights == "covariance" and looked > COVARIANCE_AT_MOST:
        expected = f"at most {COVARIANCE_AT_MOST} weights for a matrix, not {looked}; choose observe.coordinates"
        raise UserError("observe.weights", "covariance", expected)


def data_order(cell: StudySpec, samples: int = 1000) -> str:
    """SHA-256 of the indices of the first ``samples`` training samples that replicate 0's worker 0 reads."""
    sampler, zero = _sampler(cell, cut(cell, load_data(cell.dataset)), Streams(cell.seed)), np.zeros(1, dtype=np.int64)
    batches = -(-samples // sampler.batch_size)
    read = np.concatenate([sampler.indices(zero, zero, zero + i)[0] for i in range(batches)])[:samples]
    return hashlib.sha256(np.ascontiguousarray(read, dtype="<i8").tobytes()).hexdigest()


def _sampler(cell: StudySpec, data: Data, streams: Streams) -> Sampler:
    return counted(cell, dealt(cell, data, streams))


def _module(work: Workload, streams: Streams) -> nn.Module:
    module = work.module(streams, 0)
    if not isinstance(module, nn.Module):
        raise UserError("model", type(module).__name__, "an nn.Module")
    return module


def _vectorised(module: nn.Module, work: Workload, per_sample: int, single: Work) -> Work:
    """The stated rule (docs/decisions/0004-plain-mlps.md and 0009): a plain MLP or the small convolutional network with
    a cross-entropy loss is written out, everything else is vectorised by ``vmap``."""
    if type(module) is SmallCNN and work.has_cross_entropy:
        net = convolutions(module, tuple(work.data.x_train.shape[1:]))
        other = VmapWork(module, work, per_sample)
        return BatchedCnn(net, other, single) if net else other
    chain = module.layers if type(module) is MLP else module if type(module) is nn.Sequential else None
    layers = plain_layers(module, chain) if isinstance(chain, nn.Sequential) and work.has_cross_entropy else None
    return BatchedMlp(layers) if layers else VmapWork(module, work, per_sample)


def _optimizer(cells: Sequence[StudySpec], update: Update) -> Apply:
    """The update of members that have the optimizers of ``cells``; see :func:`.packing.choose_update`."""

    def make(rules: Sequence[Rule]) -> Apply:
        if update == "vectorised":
            return VectorisedOptimizer(rules)
        return StackedOptimizer(rules[0], rules=rules, by_rate=update == "slices")

    return update_of(cells[0], [cell.optimizer.build() for cell in cells], make)


def with_takeover(parts: Parts, protocol: str, variants: Sequence[StudySpec], leading: Sequence[int]) -> None:
    """Let members go over from the ``leading`` variants to their own, which with ``shadow`` track the gradients."""
    parts.takeover = Handover([cell.optimizer.build() for cell in variants])
    if protocol == "shadow":
        assert isinstance(parts.optimizer, StackedOptimizer)
        parts.optimizer = Tracking(parts.optimizer, leading)


def build_parts(cell: StudySpec, route: Route, variants: Sequence[StudySpec] = (), update: Update = "slices") -> Parts:
    """Everything one block of this cell needs. ``variants``: cells with the optimizers and schedules that its members
    have, ``cell`` alone where empty."""
    variants = variants or (cell,)
    streams, work = Streams(cell.seed), workload(cell)
    starts = start_streams(cell, streams)
    module = _module(work, streams)
    per_sample = footprint(module, work.data.x_train).largest
    single = MemberWork(module, work, per_sample)
    many = single if route == "member" else _vectorised(_module(work, streams), work, per_sample, single)

    def fresh(replicate: int) -> tuple[Tree, Tree]:
        made = work.module(starts, replicate)
        params = {k: p.detach() for k, p in made.named_parameters()}
        return params, dict(made.named_buffers())

    extra = load_observables(cell.observe.extra)
    fault = getattr(cell, "fault", None)
    found = conditions(cell)
    data = work.data
    sampler = _sampler(cell, data, streams)
    operations = trace(module, data.x_train[: sampler.batch_size])
    parts = Parts(
        many=many,
        single=single,
        optimizer=with_switch(cell, _optimizer(variants, update)),
        arm=arm_of(cell),
        compressor=found.compressor,
        perturbation=fault.build() if fault is not None else None,
        sampler=sampler,
        streams=streams,
        schedules=schedules_of(cell, variants, sampler.steps_per_epoch),
        observables=[*(observable() for observable in STANDARD), *(o for o in extra if "eval" not in o.needs)],
        on_schedule=[TestSet(), *(o for o in extra if "eval" in o.needs)],
        train=(data.x_train, data.y_train),
        test=(data.x_test, data.y_test),
        fresh=fresh,
        evaluator=many
        if isinstance(many, BatchedCnn) or not any(r.kind == "conv" for r in operations)
        else single,  # large batches: no call overhead to save
        operations=operations,
        workers=getattr(cell, "workers", 1),
        staleness_rule=found.staleness_rule,
        rank_policy=found.rank_policy,
        every=cell.observe.every,
        evaluate_every=cell.observe.evaluate_every,
        hit_artifacts=cell.observe.hit_artifacts,
        effects=EventEffects(streams, data.classes),
        slot_kinds=SLOT_KINDS,
    )
    return equip(cell, with_link(cell, parts), data)


def plan_fault(cell: Any, case: int, replicate: int, site: Site) -> Any:
    """The planned perturbation of one case, or None; one that the model cannot have is a UserError."""
    model = cell.fault.build()
    if model is None:
        return None
    layout = {"layout": site.layout} if isinstance(model, EventModel) else {}
    draw = {"replicate": replicate, "steps_per_epoch": site.steps_per_epoch, **layout}
    return model.plan(case, site.operations, site.streams, **draw)
