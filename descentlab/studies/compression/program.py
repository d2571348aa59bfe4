"""How the compression study runs: every replicate from its own start, all methods for the same number of updates."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.protocols import Planned
from ...core.stage import Stage
from ...core.streams import Streams
from ...workloads.loading import load_data
from .spec import CompressionSpec


def engine(cell: CompressionSpec) -> str:
    """Virtual workers of one process, or processes under torchrun."""
    return "distributed" if cell.distributed else "lockstep"


def horizon(cell: CompressionSpec, planned: Sequence[Planned]) -> tuple[int, int]:
    """Updates of a run; evaluated so that the last one is."""
    steps = cell.steps
    if cell.epochs is not None:
        data = load_data(cell.dataset)
        sampler = cell.sampler.build()(len(data.x_train), cell.batch_size, Streams(cell.seed))
        steps = cell.length(int(sampler.steps_per_epoch))
    return steps, (steps - 1) % (cell.observe.evaluate_every or steps)


def stages(cell: CompressionSpec) -> list[Stage]:
    """One training stage per method; the comparison over replicates comes from all of them."""
    return [Stage("training", "train", cell.identity()), Stage("comparison", "derive", {}, ("training",))]
