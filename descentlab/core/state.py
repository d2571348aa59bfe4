"""Everything a kill, a fork or a rewind must restore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import tree
from .flat import side_by_side, take_rows
from .tree import Tree

CLOCK_FIELDS = ("step", "attempt", "epoch", "samples", "virtual_s", "bytes_sent")


def new_clock(members: int) -> Tree:
    """A clock at zero: int64 ``[M]`` each, ``virtual_s`` float64."""
    return {
        name: torch.zeros(members, dtype=torch.float64 if name == "virtual_s" else torch.int64) for name in CLOCK_FIELDS
    }


@dataclass(frozen=True)
class State:
    """The whole state of an ensemble; every tensor has the member axis M first.

    ``server``: ``params`` and ``buffers`` (name -> tensor), ``slots`` (optimizer's own name -> name -> tensor; empty
    before the first update), ``opt_step`` int64 [M]. ``worker``: per-worker state ``[M, W, …]`` (``buffers``,
    ``residual``), absent where unused. ``shared``: what all workers hold alike (PowerSGD's ``q``). ``clock``: see
    :func:`new_clock`. The dataclass is frozen, its tensors are updated in place by the engine: a State that must
    survive an update is cloned first.
    """

    server: Tree
    worker: Tree = field(default_factory=dict)
    shared: Tree = field(default_factory=dict)
    clock: Tree = field(default_factory=dict)

    @classmethod
    def start(cls, params: Tree, buffers: Tree) -> State:
        """A fresh state from stacked parameters and buffers ``[M, …]``."""
        members = next(tree.leaves(params)).shape[0]
        server = {
            "params": side_by_side(params),
            "buffers": buffers,
            "slots": {},
            "opt_step": torch.zeros(members, dtype=torch.int64),
        }
        return cls(server, clock=new_clock(members))

    @property
    def members(self) -> int:
        return int(self.server["opt_step"].shape[0])

    @property
    def params(self) -> Tree:
        return self.server["params"]

    @property
    def buffers(self) -> Tree:
        return self.server["buffers"]

    @property
    def slots(self) -> Tree:
        return self.server["slots"]

    @property
    def opt_step(self) -> Tensor:
        return self.server["opt_step"]

    def state_dict(self) -> Tree:
        """The four trees; what a checkpoint stores."""
        return {"server": self.server, "worker": self.worker, "shared": self.shared, "clock": self.clock}

    @classmethod
    def from_state_dict(cls, d: Tree) -> State:
        return cls(d["server"], d["worker"], d["shared"], d["clock"])

    def clone(self) -> State:
        return State.from_state_dict(tree.clone(self.state_dict()))

    def take(self, members: Sequence[int]) -> State:
        """Copies of some members; an index may occur twice, which is a fork. Weights and slots lie side by side."""
        server: Tree = {}
        for name, held in self.server.items():
            if name == "params":
                server[name] = take_rows(held, members)
            elif name == "slots":
                server[name] = {slot: take_rows(tensors, members) for slot, tensors in held.items()}
            else:
                server |= tree.take({name: held}, members)
        worker, shared, clock = (tree.take(part, members) for part in (self.worker, self.shared, self.clock))
        return State(server, worker, shared, clock)

    def put(self, members: Sequence[int], part: State) -> None:
        """Write the members of ``part`` back, in place."""
        tree.put(self.state_dict(), members, part.state_dict())

    def fork(self, n: int) -> State:
        """Every member ``n`` times, copies of one member side by side."""
        return self.take([m for m in range(self.members) for _ in range(n)])

    def to(self, device: torch.device) -> State:
        return State.from_state_dict(tree.tree_map(lambda t: t.to(device), self.state_dict()))
