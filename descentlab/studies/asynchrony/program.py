"""How the asynchrony study runs: how many updates a budget is, and what a cell's cluster looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ...cluster.pace import Pace
from ...config.identity import canonical
from ...core.errors import UserError
from ...core.protocols import Planned, Tick, Timeline
from ...core.specs import External
from ...core.stage import Stage
from ...core.streams import Streams
from ...workloads.base import Data
from ...workloads.loading import load_data
from ...workloads.partition import class_counts
from ...workloads.slices import sliced
from .spec import AsynchronySpec

MOST_UPDATES = 10**6  # that a budget of virtual time may come to


def engine(cell: AsynchronySpec) -> str:
    """As the settings say."""
    return cell.engine.name


def horizon(cell: AsynchronySpec, planned: Sequence[Planned]) -> tuple[int, int]:
    """Updates within the budget, for every replicate the same; evaluated so that the last one is."""
    steps = _updates(_Key(canonical(cell.model_dump(mode="json")), cell))
    return steps, (steps - 1) % (cell.observe.evaluate_every or steps)


def stages(cell: AsynchronySpec) -> list[Stage]:
    """One training stage per cell; contrasts come from several."""
    return [Stage("training", "train", cell.identity()), Stage("contrasts", "derive", {}, ("training",))]


class _Key:
    """A cell that is cached by the text of its settings."""

    def __init__(self, text: str, cell: AsynchronySpec) -> None:
        self.text, self.cell = text, cell

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@lru_cache(maxsize=4096)
def _updates(key: _Key) -> int:
    cell = key.cell
    _check_parts(cell)
    if cell.time_s is not None:
        return _within(cell, cell.time_s)
    samples = cell.samples
    if cell.epochs is not None:
        samples = int(cell.epochs * len(_data(cell).x_train))
    if samples is None:
        return cell.steps
    gradients = len(timeline(cell).ticks(cell.workers, 1, Streams(cell.seed), 0)[0].workers)
    updates = samples // (cell.batch_size * cell.local_steps * gradients)
    if not updates:
        expected = f"at least one update: {gradients} gradients of {cell.local_steps} x {cell.batch_size} samples"
        raise UserError("samples", samples, expected)
    return updates


def _within(cell: AsynchronySpec, budget_s: float) -> int:
    """Updates that every replicate makes within the budget of virtual time."""
    least = MOST_UPDATES
    for replicate in cell.seeds:
        steps = 1024
        while True:
            ends = [tick.time_s for tick in ticks(cell, steps, replicate)]
            if ends[-1] > budget_s:
                break
            if ends[-1] * MOST_UPDATES / steps < budget_s:
                expected = f"a time in which there are at most {MOST_UPDATES} updates; {steps} take {ends[-1]:g} s"
                raise UserError("time_s", budget_s, expected, hint="delay and cost.compute_s make time pass")
            steps *= 2
        least = min(least, int(np.searchsorted(ends, budget_s, side="right")))
    if not least:
        raise UserError("time_s", budget_s, "time for one update at least")
    return least


def _data(cell: AsynchronySpec) -> Data:
    return sliced(load_data(cell.dataset), cell.splits.model_dump())


def _check_parts(cell: AsynchronySpec) -> None:
    """UserError for a worker that would not have a single batch."""
    partition = cell.partition.build()
    if partition is None:
        return
    labels, size = _data(cell).y_train.numpy(), cell.batch_size * cell.local_steps
    for replicate in cell.seeds:
        parts = partition(labels, cell.workers, Streams(cell.seed), replicate)
        least = min(map(len, parts))
        if least < size:
            worker = next(w for w, part in enumerate(parts) if len(part) == least)
            expected = f"at most the {least} samples that worker {worker} has in replicate {replicate}"
            raise UserError("batch_size", size, expected)


def timeline(cell: AsynchronySpec) -> Timeline:
    """Who waits for whom, at this cell's pace."""
    if isinstance(cell.timeline, External):
        return cell.timeline.build()
    cost = cell.cost
    size = cost.message_bytes or (_weights_bytes(cell) if cost.bytes_per_s else 0)
    pace = Pace(cell.delay.build(), cost.compute_s, cost.latency_s, cost.bytes_per_s, cost.shared_link, size)
    return cell.timeline.paced(pace, cell.workers)


def _weights_bytes(cell: AsynchronySpec) -> int:
    module = cell.model.build().build(_data(cell))
    return sum(p.numel() for p in module.parameters()) * {"float32": 4, "float64": 8}[cell.dtype]


def ticks(cell: AsynchronySpec, steps: int, replicate: int = 0) -> list[Tick]:
    """The first updates of one replicate."""
    return timeline(cell).ticks(cell.workers, steps, Streams(cell.seed), replicate)


def counts(settings: Mapping[str, Any], replicate: int = 0) -> list[list[int]]:
    """Samples of each class that each worker has ``[W][C]``, from the settings of a run."""
    cell = AsynchronySpec.model_validate(settings)
    data, partition = _data(cell), cell.partition.build()
    labels = data.y_train.numpy()
    everything = [np.arange(len(labels))] * cell.workers
    parts = partition(labels, cell.workers, Streams(cell.seed), replicate) if partition else everything
    return class_counts(labels, parts, data.classes)


def updates(settings: Mapping[str, Any], steps: int, replicate: int = 0) -> list[tuple[float, tuple[int, ...], float]]:
    """(time, workers, mean staleness) of the first updates, from the settings of a run."""
    found = ticks(AsynchronySpec.model_validate(settings), steps, replicate)
    return [(tick.time_s, tick.workers, float(np.mean(tick.staleness(t)))) for t, tick in enumerate(found)]
