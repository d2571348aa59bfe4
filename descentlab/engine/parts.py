"""What an engine is given: everything a block needs, reached through protocols only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from ..core.opmode import OpRecord
from ..core.protocols import Apply, Compressor, Observable, Perturbation, Work
from ..core.streams import Streams
from ..core.tree import Tree


class Sampler(Protocol):
    """Which samples the ``positions``-th batch of a worker holds."""

    batch_size: int
    steps_per_epoch: int

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray: ...


@dataclass
class Parts:
    """Everything a block needs, built from its settings; the engine reaches every room through these protocols only."""

    many: Work
    single: Work
    optimizer: Apply
    compressor: Compressor
    perturbation: Perturbation | None
    sampler: Sampler
    streams: Streams
    schedule: Callable[[float, int], float]
    observables: Sequence[Observable]
    on_schedule: Sequence[Observable]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    fresh: Callable[[int], tuple[Tree, Tree]]  # replicate -> (params, buffers) of one member, without the M axis
    operations: Sequence[OpRecord] = ()
    evaluator: Work = field(kw_only=True)
    workers: int = 1
    every: int = 1
    evaluate_every: int = 10
    hit_artifacts: bool = False
