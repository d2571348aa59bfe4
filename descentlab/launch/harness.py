"""What the training study adds to a block's parts, each around what is there; nothing where a setting is off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.errors import UserError
from ..core.protocols import Apply, Observable
from ..core.streams import Streams
from ..core.tree import Tree
from ..engine.accumulation import Accumulating
from ..engine.local_steps import LocalSteps
from ..engine.parts import Parts
from ..engine.stopping import Stopping
from ..observe.sets import OnSet
from ..observe.training import TestSet
from ..optim.averaging import averaged
from ..optim.specs import NoAverage
from ..optim.stacked import Rule
from ..optim.wrapped import BiasDecay, Clipped, with_decay
from ..workloads.base import Data
from ..workloads.partition import Partitioned
from ..workloads.sampler import with_epochs
from ..workloads.slices import folded, sliced
from .accelerate import accelerate


def cut(cell: Any, data: Data) -> Data:
    """The data of a cell, cut as its ``splits`` and ``folds`` say."""
    if not hasattr(cell, "splits"):
        return data
    return folded(sliced(data, cell.splits.model_dump()), getattr(cell, "folds", None), getattr(cell, "fold", None))


def inferred_of(data: Data, module: nn.Module) -> dict[str, Any]:
    """Sizes that no setting says: samples of each part, classes, the shape of an input to the model, weights."""
    samples = dict(zip(("train", "validation", "test"), data.n, strict=True))
    weights = sum(p.numel() for p in module.parameters())
    return {"samples": samples, "classes": data.classes, "input_shape": list(data.shape), "parameters": weights}


def dealt(cell: Any, data: Data, streams: Streams) -> Any:
    """The sampler of a cell: of all samples, or of those its ``partition`` gives to each worker; with ``local_steps``
    a batch holds as many batches."""
    n, batch_size = len(data.x_train), cell.batch_size * getattr(cell, "local_steps", 1)
    partition = cell.partition.build() if hasattr(cell, "partition") else None
    if partition is None:
        return cell.sampler.build()(n, batch_size, streams)
    labels = data.y_train.numpy(force=True)
    return Partitioned(lambda replicate: partition(labels, cell.workers, streams, replicate), n, batch_size, streams)


def counted(cell: Any, sampler: Any) -> Any:
    """The sampler with the epochs the cell counts in; ``steps_per_epoch`` are updates, with a batch of every worker."""
    steps = getattr(cell, "steps_per_epoch", None)
    return with_epochs(sampler, steps and steps * cell.workers, getattr(cell, "samples_per_epoch", None))


def update_of(cell: Any, rules: Sequence[Rule], make: Callable[[Sequence[Rule]], Apply]) -> Apply:
    """The update of members that have these rules, with the biases' own decay and clipping around it."""
    update = make(rules)
    if getattr(cell, "bias_decay", None) is not None:
        update = BiasDecay(update, make([with_decay(rule, cell.bias_decay) for rule in rules]))
    longest = getattr(cell, "clip_norm", None)
    return update if longest is None else Clipped(update, longest)


def schedules_of(cell: Any, variants: Sequence[Any], steps_per_epoch: int) -> list[Callable[[float, int], float]]:
    """The schedules of the variants; one that leaves its length open is spread over the whole run."""
    length = getattr(cell, "length", None)
    schedules = [variant.schedule for variant in variants]
    if length is not None:
        schedules = [s.over(length(steps_per_epoch)) for s in schedules]
    return [schedule.build() for schedule in schedules]


def start_streams(cell: Any, streams: Streams) -> Streams:
    """What initial weights are drawn from: the study's streams, or those of ``seed_model``."""
    seed = getattr(cell, "seed_model", None)
    return streams if seed is None else Streams(seed)


def equip(cell: Any, parts: Parts, data: Data) -> Parts:
    """The parts of a training cell, or of one with workers that train by themselves; any others as they are."""
    if hasattr(cell, "local_steps"):
        if cell.local_steps > 1:
            parts.many = LocalSteps(parts.many, cell.local_steps, cell.local_lr)
        parts.on_schedule = _evaluations(cell, parts, data)
        return parts
    if not hasattr(cell, "accumulation"):
        return parts
    epoch = cell.evaluate_epochs and cell.updates(cell.evaluate_epochs, parts.sampler.steps_per_epoch)
    parts = replace(
        parts,
        average=cell.averaging.build(),
        stopping=_stopping(cell),
        evaluate_every=epoch or parts.evaluate_every,
        on_schedule=_evaluations(cell, parts, data),
    )
    if cell.amp != "none" or cell.compile != "none":
        accelerate(cell, parts)
    if cell.accumulation > 1:
        parts.many = Accumulating(parts.many, cell.accumulation)
    if cell.head_init == "zero":
        parts.fresh = _zero_head(parts.fresh)
    return parts


def _stopping(cell: Any) -> Stopping | None:
    watching = cell.patience is not None or cell.best_checkpoint
    if not watching and cell.max_loss is None:
        return None
    watch = cell.watch if watching else ""
    return Stopping(cell.max_loss, cell.patience, watch, cell.better(), cell.best_checkpoint)


def _evaluations(cell: Any, parts: Parts, data: Data) -> list[Observable]:
    """What is measured at evaluations: the test set as always, then further sets and the averaged weights."""
    sets = {"train": (data.x_train, data.y_train), "validation": (data.x_validation, data.y_validation)}
    sets["test"] = parts.test
    names = {"train": "train_set"}  # train_loss is that of the batch
    for part in cell.evaluate_on:
        if not len(sets[part][0]):
            raise UserError("evaluate_on", cell.evaluate_on, f"sets with samples; '{data.name}' has no {part} samples")
    averaging = getattr(cell, "averaging", NoAverage())
    has_average, only = averaging.name != "none", bool(getattr(averaging, "only", False))
    found: list[Observable] = [o for o in parts.on_schedule if not (only and isinstance(o, TestSet))]
    for part in cell.evaluate_on:
        name, args = names.get(part, part), (sets[part], parts.evaluator)
        if part != "test" and not only:
            found.append(OnSet(name, *args))
        if has_average:
            found.append(OnSet(name, *args, at=averaged, ending="" if only else "_average"))
    return found


def _zero_head(fresh: Callable[[int], tuple[Tree, Tree]]) -> Callable[[int], tuple[Tree, Tree]]:
    """Initial weights with those of the last layer zero."""

    def start(replicate: int) -> tuple[Tree, Tree]:
        params, buffers = fresh(replicate)
        head = next(reversed(params)).rpartition(".")[0]
        own = {name for name in params if name.rpartition(".")[0] == head}
        return {n: torch.zeros_like(p) if n in own else p for n, p in params.items()}, buffers

    return start
