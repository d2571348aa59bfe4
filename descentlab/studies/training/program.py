"""How the training study runs: every replicate from its own start for the same number of updates."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.protocols import Planned
from ...core.stage import Stage
from ...core.streams import Streams
from ...workloads.loading import load_data
from .spec import TrainingSpec


def engine(cell: TrainingSpec) -> str:
    """One worker, no delays."""
    return "lockstep"


def horizon(cell: TrainingSpec, planned: Sequence[Planned]) -> tuple[int, int]:
    """``steps`` updates, or those of ``epochs`` epochs; evaluated so that the last one is."""
    steps = cell.steps or cell.epochs * _steps_per_epoch(cell)
    return steps, (steps - 1) % (cell.observe.evaluate_every or steps)


def _steps_per_epoch(cell: TrainingSpec) -> int:
    sampler = cell.sampler.build()(len(load_data(cell.dataset).x_train), cell.batch_size, Streams(cell.seed))
    return int(sampler.steps_per_epoch)


def stages(cell: TrainingSpec) -> list[Stage]:
    """One training stage per configuration; the statistics over its replicates come from it."""
    return [Stage("training", "train", cell.identity()), Stage("statistics", "derive", {}, ("training",))]
