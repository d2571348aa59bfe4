"""What the workers of an update send each other: the compressor's coroutine, its ranks, the link and the byte count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.exchange import drive, over_workers
from ..core.protocols import AdaptiveRankPolicy, Collective, Gather, RankCosts, RankMoment, Ranks
from ..core.state import State
from ..core.tree import Tree, tree_map
from .parts import Parts


class Exchanging:
    """The exchange of a block's updates; ``ranks`` are those the compressor has now, None before the first update.

    With a link, ``state.shared["link"]`` holds what it has cost so far: ``seconds`` float64 ``[M]`` and ``messages``
    int64 ``[M]``, which one worker had to wait for one after the other, and how many of them were ``gathered``.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.ranks: Ranks | None = None

    def start(self, params: Tree, members: int) -> Tree:
        """What is kept in ``state.shared`` beside the compressor's own memory."""
        found: Tree = {}
        if self.parts.link is not None:
            zero = torch.zeros(members, dtype=torch.int64)
            found["link"] = {"seconds": zero.double(), "messages": zero, "gathered": zero.clone()}
        if isinstance(self.parts.rank_policy, AdaptiveRankPolicy):
            if members != 1:
                name = type(self.parts.rank_policy).__name__
                raise UserError("members_per_block", members, f"1 beside the policy {name}: each run has its own ranks")
            found["policy"] = self.parts.rank_policy.start(params)
        return found

    @property
    def idle(self) -> bool:
        """Whether nothing is sent and nothing changed: one worker whose compressor leaves its gradient whole."""
        return self.parts.workers == 1 and bool(getattr(self.parts.compressor, "whole", False))

    def run(self, state: State, step: int, workers: np.ndarray, grads: Tree) -> Tree:
        """The averaged gradient of the contributions ``[M, K, …]`` of ``workers`` ``[M, K]``."""
        if self.idle:
            return {name: g.squeeze(1) for name, g in grads.items()}
        rows, at = torch.arange(len(workers)).unsqueeze(1), torch.from_numpy(workers)
        memory = tree_map(lambda t: t[rows, at], state.worker["memory"])
        k, sent, seconds, messages, gathered = workers.shape[1], 0, 0.0, 0, 0
        link = self.parts.link

        def answer(request: Collective) -> Any:
            nonlocal sent, seconds, messages, gathered
            if self.parts.workers > 1:
                sent += request.bytes_per_worker * k
                if link is not None:
                    seconds += link.seconds(request, k, step)
                    messages += 1
                    gathered += isinstance(request, Gather)
            return over_workers(request)

        mean, memory, shared = drive(self.parts.compressor.exchange(grads, memory, state.shared), answer)

        def write(t: Tensor, new: Tensor) -> Tensor:
            t[rows, at] = new
            return t

        tree_map(write, state.worker["memory"], memory)
        tree_map(lambda new, t: t.copy_(new), shared, state.shared)
        state.clock["bytes_sent"].add_(sent)
        if link is not None:
            state.shared["link"]["seconds"].add_(seconds)
            state.shared["link"]["messages"].add_(messages)
            if "gathered" in state.shared["link"]:  # not in a checkpoint of an earlier version
                state.shared["link"]["gathered"].add_(gathered)
        return mean

    def moment(self, state: State, step: int, lr: Tensor) -> RankMoment:
        """Where the update ``step`` stands."""
        sampler, seen = self.parts.sampler, int(state.clock["samples"].amax())
        return RankMoment(step, seen // (sampler.steps_per_epoch * sampler.batch_size), float(lr.max()))

    def resize(self, state: State, moment: RankMoment) -> None:
        """Bring the compressor to the ranks its policy asks for; where nothing changes, this changes no bit."""
        policy = self.parts.rank_policy
        if policy is None:
            return
        ranks: Ranks
        if isinstance(policy, AdaptiveRankPolicy):
            ranks = policy.decide(state.shared["policy"], moment, self.costs(state))
        else:
            ranks = policy.rank(moment)
        asked = list(ranks.values()) if isinstance(ranks, Mapping) else [ranks]
        if any(not isinstance(rank, int) or rank < 1 for rank in asked):
            raise UserError("compressor.policy", ranks, f"a rank of at least 1 at step {moment.step}")
        if ranks != self.ranks:
            state.shared.update(self.parts.compressor.resize(state.shared, ranks, self.parts.streams))
            self.ranks = ranks

    def observe(self, state: State, moment: RankMoment, grads: Tree) -> None:
        """Show an adaptive policy what was sent."""
        if isinstance(self.parts.rank_policy, AdaptiveRankPolicy):
            self.parts.rank_policy.observe(state.shared["policy"], moment, grads, state.shared)

    def costs(self, state: State) -> RankCosts:
        """What an update costs at other ranks, by the link's own formula; without a link nothing costs time."""
        params = {name: p for name, p in state.params.items() if p.dim() > 2}
        shapes = {name: (p.shape[1], p[0, 0].numel()) for name, p in params.items()}
        size = next(iter(state.params.values())).element_size()

        def seconds(ranks: Ranks, step: int) -> float:
            link, requests = self.parts.link, getattr(self.parts.compressor, "requests", None)
            if link is None or requests is None:
                return 0.0
            asked = requests({name: tuple(p.shape[1:]) for name, p in state.params.items()}, ranks, size)
            return sum(link.seconds(request, self.parts.workers, step) for request in asked)

        min_rate = float(getattr(self.parts.compressor, "min_rate", 1.0))
        return RankCosts(self.parts.compute_s, seconds, shapes, size, min_rate)
