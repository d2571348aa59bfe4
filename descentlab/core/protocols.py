"""The seams: what each room promises to the engine. Everything here is abstract; a class is abstract or final."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
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
    """The worker half of a step: gradients at the weights of ``view`` on ``batch``; changes nothing in ``view``.

    One with an attribute ``reuses`` takes a fourth argument, the result of an earlier call that nobody needs any more,
    and may write over it.
    """

    def work(self, view: State, batch: Batch, ops: Ops | None = None) -> Grads: ...

    def evaluate(self, view: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss (nats) and accuracy of every member ``[M]`` on one shared set, in evaluation mode."""
        ...


class Apply(Protocol):
    """The server half of a step: one update of ``state`` in place, at per-member learning rates ``lr`` ``[M]``.

    ``assign``: member m has the ``variants[m]``-th of the settings in the block, until told otherwise; only blocks of
    several settings call it.
    """

    def apply(self, state: State, grads: Tree, lr: Tensor) -> None: ...

    def assign(self, variants: Sequence[int]) -> None: ...


class Takeover(Protocol):
    """What a ``member``'s slots become when it follows the settings ``after`` instead of ``before``; in place.

    ``how``: ``carried``, ``dropped`` or ``tracked``.
    """

    def __call__(self, state: State, member: int, before: int, after: int, how: str) -> None: ...


SERVER_TARGETS = ("weights", "gradient", "slot", "lr")  # what an event can change where the update is made
WORKER_TARGETS = ("worker_gradient", "buffer", "loss", "labels", "inputs", "batch")  # … on one worker


@dataclass(frozen=True)
class Planned:
    """A perturbation decided before training: no weight is needed, so every optimizer meets the same one.

    ``site`` says where, ``index`` which flat elements (torch's logical order), ``rule`` what happens to them
    (``{"kind": "value", "value": v}``), ``step`` and ``worker`` when first and on whom. It acts on each ``every``-th of
    ``duration`` steps from ``step`` on (None: to the end). The site of an event (anything but an operation) has the
    target as its direction, the moment as its operand and the pattern of tensor names as its layer.
    """

    case: int
    step: int
    site: Site
    index: tuple[int, ...]
    rule: Mapping[str, Any]
    shape: tuple[int, ...]
    worker: int = 0
    duration: int | None = 1
    every: int = 1

    @property
    def on_server(self) -> bool:
        """Whether it is an event at the update; all others happen while ``worker`` computes a gradient."""
        return self.site.direction in SERVER_TARGETS

    @property
    def event(self) -> bool:
        """Whether it changes something other than an operation."""
        return self.on_server or self.site.direction in WORKER_TARGETS

    def steps(self, stop: int) -> range:
        """The steps before ``stop`` on which it is due."""
        end = stop if self.duration is None else min(stop, self.step + self.duration)
        return range(self.step, end, self.every)

    def active(self, step: int) -> bool:
        """Whether it is due on ``step``."""
        return step in self.steps(step + 1)


@dataclass(frozen=True)
class Hit:
    """A realised perturbation: the elements before and after, as they stood in memory.

    Of an event also which elements were recorded (``index``, of ``tensor``), how many it changed, and why it was not
    ``applied`` where that is so.
    """

    planned: Planned
    old: tuple[float, ...]
    new: tuple[float, ...]
    index: tuple[int, ...] | None = None
    tensor: str = ""
    elements: int | None = None
    applied: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Strike:
    """Events that do the same on this step, one for each of the ``members`` ``[G]`` of an ensemble."""

    planned: Sequence[Planned]
    members: Sequence[int]
    replicates: np.ndarray
    step: int


class Effects(Protocol):
    """What events do to tensors; the same object serves every event of a block."""

    def change(self, strike: Strike, tensors: Tree) -> list[Hit]:
        """Change the members' rows of ``tensors`` (name -> ``[M, …]``) in place; one Hit per member."""
        ...

    def fires(self, strike: Strike, probability: float) -> np.ndarray:
        """Whether an intermittent event acts on this step, bool ``[G]``."""
        ...

    def other(self, strike: Strike, current: np.ndarray, count: int) -> np.ndarray:
        """For each member one of ``count`` things that is not the ``current`` one, ``[G]``."""
        ...


class Perturbation(Protocol):
    """Something that goes wrong inside one step."""

    def plan(
        self, case: int, ops: Sequence[OpRecord], streams: Streams, *, replicate: int, steps_per_epoch: int
    ) -> Planned: ...

    def realise(self, planned: Planned, hits: list[Hit], *, attempt: int) -> Ops:
        """The edits for one work step; appends to ``hits`` when they fire. A transient fires only at attempt 0."""
        ...


@dataclass(frozen=True)
class Alarm:
    """A ``member`` in which ``what`` (a slot, a buffer, the gradient) has a ``value`` beyond its ``bound``.

    ``act``: something is done about it; False: that was tried often enough, the value is accepted.
    """

    member: int
    what: str
    value: float
    bound: float
    act: bool = True


class Inverse(Protocol):
    """Undoes updates of an optimizer; an arm that rewinds may have one as ``inverse`` instead of kept States."""

    def undo(self, state: State, grads: Tree, lr: Tensor) -> None:
        """Weights, slots and step counters before the update with ``grads`` at rates ``lr`` ``[M]``, in place."""
        ...


class Arm(Protocol):
    """A recovery arm. It remembers what it needs of every member ``[M]`` in ``state.shared["arm"]``.

    ``keeps``: how many States from before the last updates it needs. ``rewinds``: the members in alarm are taken back
    to the oldest of these and run again, instead of ``act``.
    """

    name: str
    keeps: int
    rewinds: bool

    def start(self, members: int) -> Tree:
        """Its memory at the start; an entry ``tries`` int64 ``[M]`` counts attempts in a row."""
        ...

    def edit(self, grads: Tree) -> tuple[Tree, list[Alarm]]:
        """The gradients ``[M, …]`` to apply, and for which members they were changed."""
        ...

    def check(self, state: State) -> list[Alarm]:
        """What is wrong after an update; brings the memory up to date."""
        ...

    def act(self, state: State, before: State, members: Sequence[int]) -> None:
        """Mend ``members`` of ``state`` in place; ``before``: all members before the update (or ``state`` itself)."""
        ...


@dataclass
class Measured:
    """What an observable may look at after one update; fields it did not ask for in ``needs`` may be None.

    ``evaluate(x, y)``: mean loss and accuracy ``[M]`` in evaluation mode, on the test set where not given. ``test``:
    that set, inputs and targets. ``late``: what the engine says of the contributions' staleness, ``[M]`` each.
    """

    state: State
    grads: Tree
    loss: Tensor
    accuracy: Tensor
    lr: Tensor
    before: Tree | None
    evaluate: Callable[..., tuple[Tensor, Tensor]] | None
    test: tuple[Tensor, Tensor] | None = None
    late: Tree = field(default_factory=dict)


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
        return _payload(self.tensor)


@dataclass(frozen=True)
class Means:
    """Several :class:`Mean` in one message, of one dtype; the answer is a tuple of ``[M, …]``."""

    tensors: tuple[Tensor, ...]

    @property
    def bytes_per_worker(self) -> int:
        """Payload one worker sends for one member."""
        return sum(map(_payload, self.tensors))


@dataclass(frozen=True)
class Gather:
    """A collective: every participating worker's part of ``tensor`` ``[M, K, …]`` to all; the answer is ``[M, W, …]``
    with all W of them, in the order of the workers."""

    tensor: Tensor

    @property
    def bytes_per_worker(self) -> int:
        """Payload one worker sends for one member."""
        return _payload(self.tensor)


def _payload(tensor: Tensor) -> int:
    members, workers = tensor.shape[:2]
    return tensor.numel() // (members * workers) * tensor.element_size()


Collective = Mean | Means | Gather
Exchange = Generator[Any, Any, tuple[Tree, Tree, Tree]]  # yields collectives


class Link(Protocol):
    """How long what the workers send to each other takes."""

    def seconds(self, request: Collective, workers: int, step: int) -> float:
        """Seconds of one collective of ``workers`` workers during update ``step``."""
        ...


Ranks = int | Mapping[str, int]  # one for all matrices, or name -> rank


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

    def resize(self, shared: Tree, rank: Ranks, streams: Streams) -> Tree:
        """The shared memory at another rank; a compressor that knows ranks of matrices takes name -> rank as well."""
        ...


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


class Delay(Protocol):
    """How long each worker needs for each of its gradients."""

    def seconds(self, workers: int, steps: int, streams: Streams, replicate: int) -> np.ndarray:
        """float64 ``[T, W]``, finite, never negative; row i is every worker's i-th gradient, however many rows there
        are."""
        ...


@dataclass(frozen=True)
class Lateness:
    """How late a contribution is: ``versions`` int64 ``[M]``, updates since the weights ``read`` ``[M, …]`` by the
    worker; ``now``: the server's weights before this update; ``memory`` ``[M, …]``: what a rule with ``start`` keeps
    from one contribution to the next, the one thing it may change."""

    versions: Tensor
    read: Tree
    now: Tree
    memory: Tree = field(default_factory=dict)


class StalenessRule(Protocol):
    """What the server makes of one worker's gradient that may be late, before anything is compressed or averaged.

    A rule that has to remember something has a method ``start(params) -> Tree`` too: its memory at the start, every
    tensor with the member axis first, given back as ``late.memory``.
    """

    def adjust(self, grads: Tree, late: Lateness) -> Tree:
        """Another tree ``[M, …]`` with the names of ``grads``; nothing that is given may be changed."""
        ...


@dataclass(frozen=True)
class RankMoment:
    """When a rank is asked for: before update ``step`` of ``epoch`` (both from 0), made at learning rate ``lr``."""

    step: int
    epoch: int
    lr: float = 0.0


class RankPolicy(Protocol):
    """Which rank a low-rank compressor has at each update.

    A pure function of the moment, so that a resumed run takes the same ranks. All members of a block share it.
    """

    def rank(self, moment: RankMoment) -> int: ...


@dataclass(frozen=True)
class RankCosts:
    """What a policy may know of an update at some ranks: seconds of computation, and of sending what the ranks make
    the workers send (over the link as it is at that step); and of the matrices what their bytes follow from: one
    travels whole unless its factors are ``min_rate`` times smaller."""

    compute_s: float
    send_s: Callable[[Ranks, int], float]  # (ranks, step)
    shapes: Mapping[str, tuple[int, int]]  # matrices, name -> (n, m)
    element_size: int = 4
    min_rate: float = 1.0


@runtime_checkable
class AdaptiveRankPolicy(Protocol):
    """A policy that decides from what it has seen. Its memory is tensors ``[1, …]`` in ``state.shared["policy"]``, so a
    resumed run takes the same ranks; a block has one member, for each has ranks of its own."""

    def start(self, params: Tree) -> Tree:
        """Its memory at the start."""
        ...

    def decide(self, memory: Tree, moment: RankMoment, costs: RankCosts) -> Ranks:
        """The ranks of the coming update; may change ``memory``."""
        ...

    def observe(self, memory: Tree, moment: RankMoment, grads: Tree, shared: Tree) -> None:
        """What the update sent: averaged gradients ``[1, …]`` and the compressor's shared memory after it."""
        ...


class ModuleMaker(Protocol):
    """Builds a fresh ``nn.Module``; randomness comes from torch's generator, seeded and isolated by the caller."""

    def __call__(self) -> nn.Module: ...


def isolated_init(make: ModuleMaker, seed: int, dtype: torch.dtype) -> nn.Module:
    """``make()`` under a private torch seed; the global generator is left as it was found."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed keeps a traceback for every absent accelerator
        return make().to(dtype)
