"""The seams: what each room promises to the engine. Everything here is abstract; a class is abstract or final."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from .opmode import OpRecord, Ops, Site
from .state import State
from .streams import Streams
from .tree import Tree


@dataclass
class Batch:
    """``x`` ``[M, B, …]``, ``y`` ``[M, B, …]``."""

    x: Tensor
    y: Tensor

    def take(self, members: Sequence[int]) -> Batch:
        return Batch(self.x[list(members)], self.y[list(members)])


class Selection(Batch):
    """A batch by the places of its samples in the training set: ``index`` ``[M, B]`` into ``source`` (x, y), gathered
    when first looked at."""

    def __init__(self, source: tuple[Tensor, Tensor], index: Tensor) -> None:
        self.source, self.index = source, index

    @cached_property
    def x(self) -> Tensor:  # type: ignore[override]
        return _rows(self.source[0], self.index)

    @cached_property
    def y(self) -> Tensor:  # type: ignore[override]
        return _rows(self.source[1], self.index)

    def take(self, members: Sequence[int]) -> Selection:
        return Selection(self.source, self.index[list(members)])


def _rows(t: Tensor, index: Tensor) -> Tensor:
    """``t[index]`` for an ``index`` ``[M, B]`` (``index_select`` is the faster of the two)."""
    return t.index_select(0, index.flatten()).view(*index.shape, *t.shape[1:])


@dataclass
class Grads:
    """What one worker's work gives: gradients and the buffers after it ``[M, …]``, loss and accuracy ``[M]``."""

    grads: Tree
    buffers: Tree
    loss: Tensor
    accuracy: Tensor


class Work(Protocol):
    """The worker half of a step: gradients at the weights of ``view`` on ``batch``; changes nothing in ``view``."""

    def work(self, view: State, batch: Batch, ops: Ops | None = None) -> Grads: ...

    def evaluate(self, view: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss (nats) and accuracy of every member ``[M]`` on one shared set, in evaluation mode."""
        ...


class Apply(Protocol):
    """The server half of a step: one update of ``state`` in place, at per-member learning rates ``lr`` ``[M]``."""

    def apply(self, state: State, grads: Tree, lr: Tensor) -> None: ...


@dataclass(frozen=True)
class Planned:
    """A perturbation decided before training: no weight is needed, so every optimizer meets the same one.

    ``site`` says where, ``index`` which flat elements (torch's logical order), ``rule`` what happens to them
    (``{"kind": "value", "value": v}``), ``step`` and ``worker`` when and on whom.
    """

    case: int
    step: int
    site: Site
    index: tuple[int, ...]
    rule: Mapping[str, Any]
    shape: tuple[int, ...]
    worker: int = 0


@dataclass(frozen=True)
class Hit:
    """A realised perturbation: the elements before and after, as they stood in memory."""

    planned: Planned
    old: tuple[float, ...]
    new: tuple[float, ...]


class Perturbation(Protocol):
    """Something that goes wrong inside one step."""

    def plan(
        self, case: int, ops: Sequence[OpRecord], streams: Streams, *, replicate: int, steps_per_epoch: int
    ) -> Planned: ...

    def realise(self, planned: Planned, hits: list[Hit], *, attempt: int) -> Ops:
        """The edits for one work step; appends to ``hits`` when they fire. A transient fires only at attempt 0."""
        ...


class Arm(Protocol):
    """A recovery arm: ``check`` says per member whether something is wrong, ``act`` what to do about it."""

    def check(self, before: State, grads: Grads, after: State) -> Tensor: ...

    def act(self, state: State, members: Sequence[int]) -> str: ...


@dataclass
class Measured:
    """What an observable may look at after one update; fields it did not ask for in ``needs`` may be None.

    ``evaluate(x, y)``: mean loss and accuracy ``[M]`` in evaluation mode, on the test set where not given. ``test``:
    that set, inputs and targets.
    """

    state: State
    grads: Tree
    loss: Tensor
    accuracy: Tensor
    lr: Tensor
    before: Tree | None
    evaluate: Callable[..., tuple[Tensor, Tensor]] | None
    test: tuple[Tensor, Tensor] | None = None


@runtime_checkable
class Observable(Protocol):
    """A measurement reduced as it is made: ``measure`` gives one number (or a row) per member, by column name.

    Rows ``[M, K]`` become the columns ``name_0`` to ``name_K-1``. Observables that need ``eval`` are measured when an
    evaluation is due, the others with every recorded step.

    ``needs``: subset of {"loss", "grad", "update", "eval"}; the engine computes each need once for all observables.
    """

    name: str
    needs: frozenset[str]

    def measure(self, m: Measured) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Mean:
    """A collective: the mean over the participating workers of ``tensor`` ``[M, K, …]``; the answer is ``[M, …]``."""

    tensor: Tensor

    @property
    def bytes_per_worker(self) -> int:
        """Payload one worker sends for one member."""
        members, workers = self.tensor.shape[:2]
        return self.tensor.numel() // (members * workers) * self.tensor.element_size()


Exchange = Generator[Mean, Tensor, tuple[Tree, Tree, Tree]]


class Compressor(Protocol):
    """Communication happens inside compression, so ``exchange`` is a coroutine that yields collectives.

    The engine answers each with the mean; in lockstep over the W axis, with processes by an all-reduce in one fixed
    order, with a parameter server by a send. Link models and the byte count sit at each yield.
    """

    def start(self, params: Tree, workers: int, streams: Streams, replicates: np.ndarray) -> tuple[Tree, Tree]:
        """Fresh (per-worker memory ``[M, W, …]``, shared memory ``[M, …]``); both may be empty."""
        ...

    def exchange(self, grads: Tree, memory: Tree, shared: Tree) -> Exchange:
        """Yields collectives; returns (averaged gradient ``[M, …]``, new memory ``[M, K, …]``, new shared)."""
        ...

    def resize(self, shared: Tree, rank: int, streams: Streams) -> Tree: ...


@dataclass(frozen=True)
class Tick:
    """One server update: which ``workers`` contribute, the version each had read, and its virtual time."""

    workers: tuple[int, ...]
    versions: tuple[int, ...]
    time_s: float

    def staleness(self, step: int) -> tuple[int, ...]:
        return tuple(step - v for v in self.versions)


class Timeline(Protocol):
    """Delay laws that ignore the weights are a table computed ahead: ``ticks`` gives one Tick per server update."""

    def ticks(self, workers: int, steps: int, streams: Streams, replicate: int) -> list[Tick]: ...


class ModuleMaker(Protocol):
    """Builds a fresh ``nn.Module``; randomness comes from torch's generator, seeded and isolated by the caller."""

    def __call__(self) -> nn.Module: ...


def isolated_init(make: ModuleMaker, seed: int, dtype: torch.dtype) -> nn.Module:
    """``make()`` under a private torch seed; the global generator is left as it was found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(dtype)
