"""Builds what a cell's settings name: the only place where every room meets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..config.tree import StudySpec
from ..core.errors import UserError
from ..core.opmode import OpRecord, trace
from ..core.protocols import Work
from ..core.streams import Streams
from ..core.tree import Tree
from ..engine.batched_mlp import BatchedMlp, plain_layers
from ..engine.parts import Parts
from ..engine.program import Route, choose_route
from ..engine.work import MemberWork, VmapWork
from ..observe.extra import load as load_observables
from ..observe.training import STANDARD, TestSet
from ..optim.stacked import StackedOptimizer
from ..perturb.forward import ForwardFaultModel
from ..workloads.base import Data, Workload
from ..workloads.models.mlp import MLP
from ..workloads.sampler import Shuffled


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


@lru_cache(maxsize=4)
def _data(text: str, spec: Any) -> Data:
    return spec.value.build()


@dataclass(frozen=True)
class _Key:
    """Hashes by nothing, so that :func:`lru_cache` keys on the text beside it alone (a spec may hold lists)."""

    value: Any

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key)


def load_data(spec: Any) -> Data:
    """The dataset, read once per process."""
    return _data(spec.model_dump_json(), _Key(spec))


@dataclass(frozen=True)
class Site:
    """What planning needs of a cell: its operations, the length of an epoch, its streams and its route."""

    operations: list[OpRecord]
    steps_per_epoch: int
    streams: Streams
    route: Route


def workload(cell: StudySpec) -> Workload:
    """Dataset and model of a cell on its device."""
    dtype = getattr(torch, cell.dtype)
    data = load_data(cell.dataset)
    n = len(data.x_train)
    if cell.batch_size > n:
        raise UserError("batch_size", cell.batch_size, f"at most the {n} training samples of '{data.name}'")
    return Workload.of(data, cell.model.build(), dtype=dtype, device=resolve_device(cell.device))


def survey(cell: StudySpec) -> Site:
    """Trace one batch through the model: which operations a perturbation can reach."""
    load_observables(cell.observe.extra)
    streams, work = Streams(cell.seed), workload(cell)
    sample = work.data.x_train[: cell.batch_size]
    module = _module(work, streams)
    try:
        operations = trace(module, sample)
    except RuntimeError as error:
        shape = tuple(sample.shape[1:])
        raise UserError("model", cell.model.name, f"a model that accepts inputs of shape {shape} ({error})") from None
    route = choose_route(device=work.device.type, operations=operations)
    return Site(operations, len(work.data.x_train) // cell.batch_size, streams, route)


def _module(work: Workload, streams: Streams) -> nn.Module:
    module = work.module(streams, 0)
    if not isinstance(module, nn.Module):
        raise UserError("model", type(module).__name__, "an nn.Module")
    return module


def _vectorised(module: nn.Module, work: Workload) -> Work:
    """The stated rule (docs/decisions/0004-plain-mlps.md): a plain MLP with a cross-entropy loss is written out,
    everything else is vectorised by ``vmap``."""
    chain = module.layers if type(module) is MLP else module if type(module) is nn.Sequential else None
    layers = plain_layers(module, chain) if isinstance(chain, nn.Sequential) and work.data.classes else None
    return BatchedMlp(layers) if layers else VmapWork(module, work)


def build_parts(cell: StudySpec, route: Route) -> Parts:
    """Everything one block of this cell needs."""
    streams, work = Streams(cell.seed), workload(cell)
    module = _module(work, streams)
    single = MemberWork(module, work)
    many = single if route == "member" else _vectorised(_module(work, streams), work)

    def fresh(replicate: int) -> tuple[Tree, Tree]:
        made = work.module(streams, replicate)
        params = {k: p.detach() for k, p in made.named_parameters()}
        return params, dict(made.named_buffers())

    extra = load_observables(cell.observe.extra)
    fault = getattr(cell, "fault", None)
    compressor = getattr(cell, "compressor", None)
    data = work.data
    operations = trace(module, data.x_train[: cell.batch_size])
    return Parts(
        many=many,
        single=single,
        optimizer=StackedOptimizer(cell.optimizer.build()),
        compressor=compressor.build() if compressor is not None else _dense(),
        perturbation=fault.build() if fault is not None else None,
        sampler=Shuffled(len(data.x_train), cell.batch_size, streams),
        streams=streams,
        schedule=cell.schedule.build(),
        observables=[*(observable() for observable in STANDARD), *(o for o in extra if "eval" not in o.needs)],
        on_schedule=[TestSet(), *(o for o in extra if "eval" in o.needs)],
        train=(data.x_train, data.y_train),
        test=(data.x_test, data.y_test),
        fresh=fresh,
        evaluator=single
        if any(r.kind == "conv" for r in operations)
        else many,  # large batches: no call overhead to save
        operations=operations,
        workers=getattr(cell, "workers", 1),
        every=cell.observe.every,
        evaluate_every=cell.observe.evaluate_every,
        hit_artifacts=cell.observe.hit_artifacts,
    )


def _dense() -> Any:
    from ..comm.dense import Dense

    return Dense()


def plan_fault(cell: Any, case: int, replicate: int, site: Site) -> Any:
    """The planned perturbation of one case, or None; a layer that cannot be hit is an error."""
    model = cell.fault.build()
    if model is None:
        return None
    if isinstance(model, ForwardFaultModel) and cell.fault.layer is not None:
        layers = [r.layer for r in site.operations if r.kind in ("linear", "conv")]
        if cell.fault.layer not in layers:
            raise UserError("fault.layer", cell.fault.layer, f"one of {', '.join(layers)}")
    return model.plan(case, site.operations, site.streams, replicate=replicate, steps_per_epoch=site.steps_per_epoch)
