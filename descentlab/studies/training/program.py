"""How the training study runs: every replicate from its own start for the same number of updates."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.protocols import Planned
from ...core.stage import Stage
from ...core.streams import Streams
from ...workloads.loading import load_data
from ...workloads.sampler import with_epochs
from ...workloads.slices import folded, sliced
from .spec import FOLD_METRIC, TrainingSpec


def engine(cell: TrainingSpec) -> str:
    """Workers of one process, or processes under torchrun; nobody is late."""
    return "distributed" if cell.distributed else "lockstep"


def horizon(cell: TrainingSpec, planned: Sequence[Planned]) -> tuple[int, int]:
    """Updates of a run; evaluated at the end of epochs where those are counted, else so that the last one is."""
    if cell.evaluate_epochs is None and (cell.steps or cell.samples):
        steps = cell.length(1)
        return steps, (steps - 1) % (cell.observe.evaluate_every or steps)
    epoch = _batches_per_epoch(cell)
    steps = cell.length(epoch)
    if cell.evaluate_epochs is not None:
        return steps, cell.updates(cell.evaluate_epochs, epoch) - 1
    return steps, (steps - 1) % (cell.observe.evaluate_every or steps)


def _batches_per_epoch(cell: TrainingSpec) -> int:
    data = folded(sliced(load_data(cell.dataset), cell.splits.model_dump()), cell.folds, cell.fold)
    sampler = cell.sampler.build()(len(data.x_train), cell.batch_size, Streams(cell.seed))
    batches = cell.steps_per_epoch and cell.steps_per_epoch * cell.workers
    return int(with_epochs(sampler, batches, cell.samples_per_epoch).steps_per_epoch)


def stages(cell: TrainingSpec) -> list[Stage]:
    """One training stage per configuration; the statistics over its replicates come from it, and with folds the choice
    of the configuration with the best mean over them."""
    made = [Stage("training", "train", cell.identity()), Stage("statistics", "derive", {}, ("training",))]
    if cell.folds is None:
        return made
    return [*made, Stage("choice", "choose", {"folds": cell.folds, "metric": FOLD_METRIC}, ("statistics",))]
