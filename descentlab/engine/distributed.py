"""One process of W that train one model together: DistributedDataParallel with a communication hook of ours.

Draws, batches and the compressor are those of a lockstep run of W workers, so the weights agree with it. What a process
measures of an update: seconds from its start to the end of the optimizer's step, evaluations and checkpoints apart.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..core.opmode import OpMode, Ops
from ..core.protocols import AdaptiveRankPolicy, Grads, RankMoment, Ranks
from ..core.ring import all_reduce_s
from ..core.state import State
from ..core.tree import Tree, tree_map
from .driver import Engine, Round
from .environment import Environment, LinkWatch, measure_environment, timed, told
from .work import MemberWork

BUSY = ("compress_s", "collective_s", "decompress_s")
_DDP = inspect.signature(DistributedDataParallel).parameters
TOLERANCE = 0.25  # relative change of the time of sending after which a policy without one of its own measures again


class Hook(Protocol):
    """What this engine needs of a communication hook."""

    bytes_sent: int
    messages: int
    gathered: int

    def attach(self, model: DistributedDataParallel) -> Any: ...

    def timings(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def buckets(self) -> list[Any]: ...

    def close(self) -> None: ...


@final
@dataclass
class Distributed(Engine):
    """Runs one run as process ``rank`` of the process group; process 0 measures and keeps the rows.

    ``hook`` exchanges gradients; ``environment`` is for policies that weigh times, and ``measured`` says at which
    updates they had the link measured again. A run without planned perturbations; what else it refuses is in
    :mod:`descentlab.engine.support`.
    """

    hook: Hook = field(kw_only=True)
    bucket_mb: float = field(default=25.0, kw_only=True)
    environment: Environment | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if len(self.plan.runs) != 1:
            raise ValueError("processes under torchrun train one run at a time")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.world != self.parts.workers:
            raise ValueError(f"{self.world} processes, but workers = {self.parts.workers}")
        super().__post_init__()
        single = self.parts.single
        assert isinstance(single, MemberWork)
        self._objective, self.module = single.objective, copy.deepcopy(single.module)
        self._named = dict(self.module.named_parameters())
        self._bind()
        keep = "forward_sync_buffers" if "forward_sync_buffers" in _DDP else "broadcast_buffers"  # its older name
        settings: dict[str, Any] = {"bucket_cap_mb": self.bucket_mb, keep: False}
        self.model = DistributedDataParallel(self.module, **settings)
        self.hook.attach(self.model)
        self._elapsed, self._started = float(self.state.clock["virtual_s"][0]), 0.0
        self._weighing_s = 0.0  # of the coming update
        self._compute_s = 0.0  # measured before a policy first asks, then a running mean of the updates
        self._watch = LinkWatch()
        self.measured: list[tuple[int, Environment]] = []
        self._last: RankMoment | None = None
        self._asked: Ranks | None = None

    def initial_state(self) -> State:
        state = super().initial_state()
        times = {key: torch.zeros(1, dtype=torch.float64) for key in ("compute_s", "exposed_s", *BUSY)}
        count = torch.zeros(1, dtype=torch.int64)
        link = {"seconds": count.double(), "messages": count, "gathered": count.clone()}
        kept = {key: value for key, value in state.shared.items() if key in ("policy",)}
        worker = {**state.worker, "memory": {}}
        return State(state.server, worker, {**kept, "times": times, "link": link}, state.clock)

    def _bind(self) -> None:
        """The module's parameters are the state's, without a copy."""
        for name, p in self._named.items():
            p.data = self.state.params[name][0]

    def round(self) -> Round:
        self._started, self._weighing_s = time.perf_counter(), 0.0
        if self.parts.rank_policy is not None:
            self._resize()
        return Round(np.array([[self.rank]]), np.array([[self.step]]), np.zeros(1))

    def view(self, versions: np.ndarray) -> Tree:
        return self.state.params

    def _resize(self, lr: Tensor | None = None) -> None:
        """Process 0 asks the policy where its answer can change, and tells the others."""
        policy, moment = self.parts.rank_policy, self.exchanging.moment(self.state, self.step, self._rates())
        looks = getattr(policy, "looks", None)
        if self._last is not None and looks is not None and not looks(moment, self._last):
            return
        if isinstance(policy, AdaptiveRankPolicy):
            began = time.perf_counter()
            self._weigh(policy, moment)
            self._weighing_s = time.perf_counter() - began
        self._last = moment
        names = [name for name, p in self._named.items() if p.dim() > 1]
        if not isinstance(policy, AdaptiveRankPolicy):  # a function of the moment, which all processes know
            assert policy is not None
            self._set_ranks(dict.fromkeys(names, policy.rank(moment)))
            return
        told = torch.zeros(len(names), dtype=torch.int64)
        if self.rank == 0:
            ranks = self._decide(policy, moment)
            told += torch.tensor([ranks[name] if isinstance(ranks, Mapping) else ranks for name in names])
        dist.broadcast(told, 0)
        self._set_ranks(dict(zip(names, told.tolist(), strict=True)))

    def _weigh(self, policy: AdaptiveRankPolicy, moment: RankMoment) -> None:
        """Before a policy's first answer measure how long a gradient takes; before others, where it wants to weigh
        again and the updates since have shown another speed, the link as well."""
        asked = getattr(policy, "measuring", None)
        if self._last is None:
            self._compute_s = self._computing_s(*asked) if asked else self.parts.compute_s
            return
        due = getattr(policy, "weighs_again", None)
        if due is None or not due(moment, self._last):
            return
        tolerance = getattr(policy, "tolerance", TOLERANCE)
        changed = self.rank == 0 and self._watch.changed(self._kind, tolerance)
        if told(float(changed)):
            before = self._sending_s(self._asked)
            self.environment = measure_environment(*(asked or ()))
            self.measured.append((self.step, self.environment))
            if self.rank == 0:
                same = abs(self._sending_s(self._asked) - before) <= tolerance * before
                self._watch.measured(self._kind, same)

    def _computing_s(self, warmup: int, repeats: int) -> float:
        """Median seconds of a gradient that is not sent, of the coming update's batch; the mean over processes."""
        now = Round(np.array([[self.rank]]), np.array([[self.step]]), np.zeros(1))

        def gradient() -> None:
            self._work(now, 0)

        with self.model.no_sync():
            found = torch.tensor([timed(gradient, warmup, repeats)], dtype=torch.float64)
        self.model.zero_grad(set_to_none=True)
        dist.all_reduce(found)
        return float(found) / self.world

    @property
    def _kind(self) -> Hashable:
        """What tells updates apart that send different things."""
        return tuple(self._asked.values()) if isinstance(self._asked, Mapping) else self._asked

    def _set_ranks(self, ranks: dict[str, int]) -> None:
        """A rank no matrix of this size has means what it does in lockstep: the matrix travels whole."""
        shapes = {name: (len(p), p.numel() // len(p)) for name, p in self._named.items() if name in ranks}
        ranks = {name: min(rank, *shapes[name]) for name, rank in ranks.items()}
        if ranks != self._asked:
            self._asked = ranks
            self.hook.set_rank(ranks)  # type: ignore[attr-defined]

    def _decide(self, policy: AdaptiveRankPolicy, moment: RankMoment) -> Ranks:
        costs = self.exchanging.costs(self.state)
        costs = replace(costs, compute_s=self._compute_s, send_s=lambda ranks, step: self._sending_s(ranks))
        return policy.decide(self.state.shared["policy"], moment, costs)

    def _sending_s(self, ranks: Ranks | None) -> float:
        """Seconds of an update's collectives at these ranks, by the last measurement."""
        requests = getattr(self.parts.compressor, "requests", None)
        if ranks is None or requests is None or self.environment is None:
            return 0.0
        shapes = {name: tuple(p.shape) for name, p in self._named.items()}
        link = (self.environment.bandwidth_mbps, self.environment.latency_s)
        size = next(iter(self._named.values())).element_size()
        return sum(all_reduce_s(r.bytes_per_worker, self.world, *link) for r in requests(shapes, ranks, size))

    def _work(self, now: Round, k: int) -> Grads:
        """This process's batch; the gradients that come back are already the average."""
        self._bind()
        state, who = self.state, now.workers[:, k]
        cursor = state.worker["cursor"][0, who].numpy()
        index = torch.from_numpy(self.parts.sampler.indices(self.replicates, who, cursor))[0]
        x, y = (t[index.to(t.device)] for t in self.parts.train)
        self._load_buffers()
        self.module.train()
        self.model.zero_grad(set_to_none=True)
        masks = {key: mask[0] for key, mask in self._masks(who, cursor).items()}
        if masks:
            with OpMode(self.module, Ops(masks=masks)):
                output = self.model(x)
        else:
            output = self.model(x)
        loss = self._objective.loss(output, y)
        loss.backward()
        grads = {name: _given(p).unsqueeze(0) for name, p in self._named.items()}
        buffers = {name: b.detach().unsqueeze(0).clone() for name, b in self.module.named_buffers()}
        accuracy = self._objective.accuracy(output.detach(), y)
        return Grads(grads, buffers, loss.detach().unsqueeze(0), accuracy.unsqueeze(0))

    def _load_buffers(self) -> None:
        held = self.state.worker.get("buffers")  # of one worker: the server's are its own
        for name, b in self.module.named_buffers():
            b.copy_(self.state.buffers[name][0] if held is None else held[name][0, self.rank])

    def _exchange(self, now: Round, grads: list[Tree], lr: Tensor) -> Tree:
        if self.rank == 0 and self.parts.rank_policy is not None:
            shared = {**self.state.shared, "q": self._factors()}
            policy = self.parts.rank_policy
            if isinstance(policy, AdaptiveRankPolicy):
                moment = self.exchanging.moment(self.state, self.step, lr)
                policy.observe(self.state.shared["policy"], moment, grads[0], shared)
        return grads[0]

    def _factors(self) -> Tree:
        q = getattr(self.hook, "q", None)
        return {} if q is None else {n: q(n).unsqueeze(0) for n, p in self._named.items() if p.dim() > 1}

    def _put_buffers(self, now: Round, buffers: list[Tree]) -> None:
        """Every process keeps its own; where an evaluation or an average looks at them, the server's are their mean."""
        state = self.state
        for name, value in buffers[0].items() if self.world > 1 else ():
            state.worker["buffers"][name][0, self.rank] = value[0]
        looked_at = self.parts.average is not None or bool(self.measuring.due(self.step))
        if not buffers[0] or not looked_at:
            tree_map(lambda t, new: t.copy_(new), state.buffers, buffers[0])
            return
        for name, value in buffers[0].items():
            total = value.clone()
            dist.all_reduce(total)
            state.buffers[name].copy_(total / self.world if total.is_floating_point() else value)

    def _advance(self, now: Round) -> None:
        spent = time.perf_counter() - self._started
        self._elapsed += spent
        spent -= self._weighing_s  # which takes time, but is no part of what an update computes
        clock, shared, sampler = self.state.clock, self.state.shared, self.parts.sampler
        self.state.worker["cursor"] += 1
        clock["step"].add_(1)
        clock["samples"].add_(self.world * sampler.batch_size)
        clock["virtual_s"].fill_(self._elapsed)
        clock["bytes_sent"].fill_(self.hook.bytes_sent * self.world)
        clock["epoch"].copy_((clock["samples"] - 1) // (sampler.steps_per_epoch * sampler.batch_size))
        found = self.hook.timings()
        exposed = found.get("exposed_s", 0.0)
        for key in BUSY:
            shared["times"][key].fill_(found.get(key, 0.0))
        shared["times"]["exposed_s"].fill_(exposed)
        shared["times"]["compute_s"].fill_(spent - exposed)
        self._compute_s = 0.9 * self._compute_s + 0.1 * (spent - exposed)
        if self.rank == 0 and hasattr(self.parts.rank_policy, "weighs_again"):
            should = self._sending_s(self._asked)
            if should > 0:
                self._watch.note(self._kind, found.get("collective_s", 0.0) / should)
        shared["link"]["messages"].fill_(self.hook.messages)
        if "gathered" in shared["link"]:  # not in a checkpoint of an earlier version
            shared["link"]["gathered"].fill_(self.hook.gathered)
        shared["link"]["seconds"].add_(found.get("collective_s", 0.0))
        if (factors := self._factors()) and self.rank == 0:
            shared["q"] = factors

    def state_dict(self) -> dict[str, Any]:
        """Everything this process needs to go on; other than :class:`State`, every process has its own."""
        state = self.state.state_dict()
        state["shared"] = {key: value for key, value in state["shared"].items() if key != "q"}
        return {"state": state, "hook": self.hook.state_dict()}


def _given(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad.detach()
