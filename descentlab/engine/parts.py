"""What an engine is given: everything a block needs, reached through protocols only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from ..core.opmode import OpRecord
from ..core.protocols import (
    AdaptiveRankPolicy,
    Apply,
    Arm,
    Compressor,
    Effects,
    Link,
    Observable,
    Perturbation,
    RankPolicy,
    StalenessRule,
    Takeover,
    Work,
)
from ..core.state import State
from ..core.streams import Streams
from ..core.tree import Tree
from .stopping import Stopping


class Average(Protocol):
    """Averaged weights beside the last ones, in ``state.server["average"]``."""

    def start(self, state: State) -> None: ...

    def update(self, state: State) -> None: ...


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
    schedules: Sequence[Callable[[float, int], float]]  # one for each variant of the block
    observables: Sequence[Observable]
    on_schedule: Sequence[Observable]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    fresh: Callable[[int], tuple[Tree, Tree]]  # replicate -> (params, buffers) of one member, without the M axis
    operations: Sequence[OpRecord] = ()
    evaluator: Work = field(kw_only=True)
    workers: int = 1
    arm: Arm | None = None
    staleness_rule: StalenessRule | None = None
    rank_policy: RankPolicy | AdaptiveRankPolicy | None = None
    link: Link | None = None  # what sending costs; None: no time
    compute_s: float = 0.0  # seconds one worker needs for one gradient, where a link is simulated
    every: int = 1
    evaluate_every: int = 10
    hit_artifacts: bool = False
    effects: Effects | None = None  # what planned events do; None where a block has none
    takeover: Takeover | None = None  # where members go over to another optimizer
    average: Average | None = None
    stopping: Stopping | None = None  # which runs end before their time; None: none does
    slot_kinds: Mapping[str, str] = field(default_factory=dict)  # an optimizer's own name of a slot -> its kind
