"""Rank policies that decide from what they have seen: calibration, Accordion, and a budget spread over layers.

The :class:`~descentlab.core.protocols.AdaptiveRankPolicy` protocol: their memory is a tree of tensors ``[1, …]``.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from ..core.protocols import RankCosts, RankMoment, Ranks
from ..core.tree import Tree
from .powersgd import saves

FORCE_MAX, KEEP, CRITICAL, STABLE = "force_max", "keep", "critical", "stable"


def pick_rank(ratios: Mapping[int, float], threshold: float) -> int:
    """The largest candidate whose share of time spent on communication is at most ``threshold``, else the smallest.

    ``ratios``: candidate -> share. Where that is 1 and larger candidates exist, 2 or, if 2 is no candidate, the next
    larger one: rank 1 leaves nothing to adapt.
    """
    fitting = [rank for rank, ratio in ratios.items() if ratio <= threshold]
    pick = max(fitting) if fitting else min(ratios)
    larger = sorted(rank for rank in ratios if rank > 1)
    return (2 if 2 in ratios else larger[0]) if pick == 1 and larger else pick


@dataclass(frozen=True)
class Verdict:
    """What Accordion makes of one epoch: the rank to use, and why."""

    rank: int
    why: str
    change: float | None = None


@final
@dataclass(frozen=True)
class AccordionRule:
    """When a gradient changes fast, send more of it (arXiv 2010.16248, as the adaptive-rank program applies it).

    Every ``interval`` epochs the norm N of the epoch's summed gradient is compared with the one ``interval`` epochs
    before: a relative change of at least ``threshold`` asks for ``high``, a smaller one for ``low``. ``high`` in any
    case before epoch ``warm_epochs``, and for ``lr_cooldown`` epochs after the learning rate has dropped. After a
    change nothing changes for ``rank_cooldown`` epochs.
    """

    low: int = 1
    high: int = 2
    threshold: float = 0.5
    interval: int = 10
    warm_epochs: int = 20
    lr_cooldown: int = 20
    rank_cooldown: int = 0

    def decide(
        self,
        epoch: int,
        rank: int,
        norm: float,
        past: float | None,
        *,
        lr_cooldown: int = 0,
        rank_cooldown: int = 0,
    ) -> Verdict:
        """After ``epoch`` (from 0) with the current ``rank``; ``past``: the norm ``interval`` epochs before, if known;
        cooldowns: epochs left."""
        if epoch < self.warm_epochs or lr_cooldown > 0:
            return Verdict(self.high, FORCE_MAX)
        if rank_cooldown > 0 or past is None:
            return Verdict(rank, KEEP)
        change = abs(norm - past) / past if past > 0 else float("inf") if norm > 0 else 0.0
        if change >= self.threshold or past == 0:
            return Verdict(self.high, CRITICAL, change)
        return Verdict(self.low, STABLE, change)


@final
class Accordion:
    """:class:`AccordionRule` on averaged gradients as they arrive, for all matrices together or ``per_layer``.

    The trigger of the learning rate is its real drop: an update whose rate is below the previous one's by more than
    ``drop`` of it. (A slow decay is none.) Memory, all float64 or int64 with a member axis of one: ``sum`` (name ->
    the epoch's summed gradient), ``past`` and ``change`` (name -> norm and relative change at the last look, NaN
    before), ``rank``, ``cooldown`` (name -> epochs left), ``lr``, ``lr_cooldown``, ``epoch``.
    """

    def __init__(self, rule: AccordionRule, per_layer: bool = False, drop: float = 0.2) -> None:
        self.rule, self.per_layer, self.drop = rule, per_layer, drop

    def start(self, params: Tree) -> Tree:
        """See :class:`~descentlab.core.protocols.AdaptiveRankPolicy`."""
        watched = {name: p for name, p in params.items() if p.dim() > 2 or not self.per_layer}
        own = list(watched) if self.per_layer else ["all"]
        one = next(iter(params.values())).new_zeros(1, dtype=torch.float64)
        count = torch.zeros(1, dtype=torch.int64)
        return {
            "sum": {name: torch.zeros_like(p) for name, p in watched.items()},
            "past": {key: torch.full_like(one, torch.nan) for key in own},
            "change": {key: torch.full_like(one, torch.nan) for key in own},
            "rank": {key: torch.full_like(count, self.rule.high) for key in own},
            "cooldown": {key: count.clone() for key in own},
            "lr": one.clone(),
            "lr_cooldown": count.clone(),
            "epoch": count.clone(),
        }

    def decide(self, memory: Tree, moment: RankMoment, costs: RankCosts) -> Ranks:
        """See :class:`~descentlab.core.protocols.AdaptiveRankPolicy`."""
        if moment.epoch > int(memory["epoch"]):
            self._look(memory, int(memory["epoch"]))
            memory["epoch"].fill_(moment.epoch)
        before = float(memory["lr"])
        if before > 0 and moment.lr < (1 - self.drop) * before:
            memory["lr_cooldown"].fill_(self.rule.lr_cooldown)
            for rank in memory["rank"].values():
                rank.fill_(self.rule.high)
        memory["lr"].fill_(moment.lr)
        ranks = {key: int(rank) for key, rank in memory["rank"].items()}
        return ranks if self.per_layer else ranks["all"]

    def looks(self, moment: RankMoment, last: RankMoment) -> bool:
        """Whether the answer can differ from that at ``last``."""
        return moment.epoch != last.epoch or moment.lr != last.lr

    def observe(self, memory: Tree, moment: RankMoment, grads: Tree, shared: Tree) -> None:
        """See :class:`~descentlab.core.protocols.AdaptiveRankPolicy`."""
        if moment.epoch % self.rule.interval == 0:
            names = list(memory["sum"])
            torch._foreach_add_([memory["sum"][name] for name in names], [grads[name] for name in names])

    def _look(self, memory: Tree, epoch: int) -> None:
        """At the end of ``epoch``: decide where that is due, and let an epoch pass for every cooldown."""
        if epoch % self.rule.interval == 0:
            for key, rank in memory["rank"].items():
                self._judge(memory, key, rank, epoch)
            for total in memory["sum"].values():
                total.zero_()
        for left in (memory["lr_cooldown"], *memory["cooldown"].values()):
            left.sub_(1).clamp_(min=0)

    def _judge(self, memory: Tree, key: str, rank: Tensor, epoch: int) -> None:
        sums = memory["sum"].values() if key == "all" else [memory["sum"][key]]
        norm = float(torch.stack([s.double().square().sum() for s in sums]).sum().sqrt())
        past = float(memory["past"][key])
        verdict = self.rule.decide(
            epoch,
            int(rank),
            norm,
            None if past != past else past,
            lr_cooldown=int(memory["lr_cooldown"]),
            rank_cooldown=int(memory["cooldown"][key]),
        )
        if past == past:
            memory["change"][key].fill_(abs(norm - past) / past if past > 0 else torch.inf)
        memory["past"][key].fill_(norm)
        if verdict.rank != int(rank):
            memory["cooldown"][key].fill_(self.rule.rank_cooldown + 1)
            rank.fill_(verdict.rank)


@final
class Calibration:
    """The largest rank at which sending takes at most ``threshold`` of an update's time; then that rank, or Accordion
    up to it.

    Every ``check`` updates the time that sending takes at the current rank is compared with that at the last
    calibration; where it differs by more than ``tolerance`` of it, candidates are tried again. Over a simulated link
    times follow its formula; processes measure theirs (``RankCosts.send_s``). Memory: ``rank`` and ``asked`` int64,
    ``send_s`` float64, and Accordion's.
    """

    def __init__(
        self,
        candidates: Sequence[int],
        threshold: float,
        accordion: Accordion | None = None,
        *,
        check: int = 100,
        tolerance: float = 0.25,
        measuring: tuple[int, int] = (5, 20),
    ) -> None:
        self.candidates, self.threshold, self.accordion = sorted(set(candidates)), threshold, accordion
        self.check, self.tolerance = check, tolerance
        self.measuring = measuring  # messages that do not count, and that do, where processes measure the link

    def start(self, params: Tree) -> Tree:
        """See :class:`~descentlab.core.protocols.AdaptiveRankPolicy`."""
        zero = torch.zeros(1, dtype=torch.int64)
        then = {} if self.accordion is None else {"accordion": self.accordion.start(params)}
        return {"rank": {"all": zero}, "asked": zero - 1, "send_s": zero.double(), **then}

    def decide(self, memory: Tree, moment: RankMoment, costs: RankCosts) -> Ranks:
        """See :class:`~descentlab.core.protocols.AdaptiveRankPolicy`."""
        rank, asked = memory["rank"]["all"], memory["asked"]
        if int(asked) < 0:
            self._calibrate(memory, moment, costs)
        elif moment.step // self.check != int(asked) // self.check:
            asked.fill_(moment.step)
            before, now = float(memory["send_s"]), costs.send_s(int(rank), moment.step)
            if abs(now - before) > self.tolerance * before:
                self._calibrate(memory, moment, costs)
        if self.accordion is None:
            return int(rank)
        asked_for = self.accordion.decide(memory["accordion"], moment, costs)
        low, high = self.accordion.rule.low, max(int(rank), self.accordion.rule.low)
        if isinstance(asked_for, int):
            return high if asked_for > low else low
        return {name: high if r > low else low for name, r in asked_for.items()}

    def looks(self, moment: RankMoment, last: RankMoment) -> bool:
        """As :meth:`Accordion.looks`; also every ``check`` updates."""
        then = self.accordion is not None and self.accordion.looks(moment, last)
        return then or self.weighs_again(moment, last)

    def weighs_again(self, moment: RankMoment, last: RankMoment) -> bool:
        """Whether processes have to measure their link before it answers."""
        return moment.step // self.check != last.step // self.check

    def observe(self, memory: Tree, moment: RankMoment, grads: Tree, shared: Tree) -> None:
        """See :class:`~descentlab.core.protocols.AdaptiveRankPolicy`."""
        if self.accordion is not None:
            self.accordion.observe(memory["accordion"], moment, grads, shared)

    def _calibrate(self, memory: Tree, moment: RankMoment, costs: RankCosts) -> None:
        sending = {rank: costs.send_s(rank, moment.step) for rank in self.candidates}
        ratios = {rank: s / (s + costs.compute_s) if s + costs.compute_s else 0.0 for rank, s in sending.items()}
        pick = pick_rank(ratios, self.threshold)
        memory["rank"]["all"].fill_(pick)
        memory["asked"].fill_(moment.step)
        memory["send_s"].fill_(costs.send_s(pick, moment.step))


def spread(
    energy: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]], budget: float
) -> dict[str, int]:
    """Ranks of the matrices that keep the most ``energy`` within ``budget``.

    ``energy``: name -> what the first, second, … direction adds, falling; ``costs``: name -> price of rank 1, 2, …,
    never falling, in the unit of ``budget``. Every matrix gets rank 1; what is left goes to whichever step up adds
    most for its price. A step takes in the ranks that cost no more than its first, as all do once a matrix travels
    whole. For falling energies and prices that rise evenly this is the best choice at every total price it passes
    through.
    """

    def step(name: str, rank: int) -> tuple[int, float, float]:
        """The rank after the next step from ``rank``, its price and what it adds."""
        prices = costs[name]
        up = rank + 1
        while up < len(energy[name]) and prices[up] <= prices[up - 1]:
            up += 1
        return up, prices[up - 1] - (prices[rank - 1] if rank else 0.0), sum(energy[name][rank:up])

    ranks: dict[str, int] = {}
    left = budget
    heap: list[tuple[float, str, int, float]] = []

    def offer(name: str) -> None:
        if ranks[name] < len(energy[name]):
            up, price, gain = step(name, ranks[name])
            heapq.heappush(heap, (-gain / max(price, 1e-300), name, up, price))

    for name in energy:
        ranks[name], price, _ = step(name, 0)
        left -= price
        offer(name)
    while heap:
        _, name, up, price = heapq.heappop(heap)
        if price > left:
            continue
        left -= price
        ranks[name] = up
        offer(name)
    return ranks


@final
class Budget:
    """Ranks per matrix within a budget of bytes (or of seconds) per update, spread by how much each direction holds.

    For the first ``look`` updates of every ``every`` all matrices have rank ``most``; the squared singular values of
    what is applied, averaged over these updates, are the energies :func:`spread` goes by until the next look. A matrix
    whose factors would not be small enough travels whole and costs what it then does. A budget too small for rank 1
    everywhere gives rank 1. Memory: ``energy`` (name -> float64 ``[1, most]``), ``rank`` (name -> int64).
    """

    def __init__(
        self, budget: float, unit: Literal["bytes", "seconds"], *, most: int = 8, look: int = 5, every: int = 500
    ) -> None:
        self.budget, self.unit, self.most, self.look, self.every = budget, unit, most, look, every

    def start(self, params: Tree) -> Tree:
        """See :class:`~descentlab.core.protocols.AdaptiveRankPolicy`."""
        held = {name: min(self.most, p.shape[1], p[0, 0].numel()) for name, p in params.items() if p.dim() > 2}
        return {
            "energy": {name: torch.zeros(1, most, dtype=torch.float64) for name, most in held.items()},
            "rank": {name: torch.full((1,), most, dtype=torch.int64) for name, most in held.items()},
        }

    def decide(self, memory: Tree, moment: RankMoment, costs: RankCosts) -> Ranks:
        """See :class:`~descentlab.core.protocols.AdaptiveRankPolicy`."""
        at = moment.step % self.every
        if at == 0:
            for name, rank in memory["rank"].items():
                rank.fill_(memory["energy"][name].shape[1])
                memory["energy"][name].zero_()
        elif at == self.look:
            energy = {name: e[0].tolist() for name, e in memory["energy"].items()}
            for name, rank in spread(energy, *self._prices(costs, moment)).items():
                memory["rank"][name].fill_(rank)
        return {name: int(rank) for name, rank in memory["rank"].items()}

    def looks(self, moment: RankMoment, last: RankMoment) -> bool:
        """As :meth:`Accordion.looks`."""
        return moment.step % self.every in (0, self.look)

    def weighs_again(self, moment: RankMoment, last: RankMoment) -> bool:
        """As :meth:`Calibration.weighs_again`."""
        return self.unit == "seconds" and moment.step % self.every == self.look

    def observe(self, memory: Tree, moment: RankMoment, grads: Tree, shared: Tree) -> None:
        """See :class:`~descentlab.core.protocols.AdaptiveRankPolicy`."""
        if moment.step % self.every < self.look:
            for name, energy in memory["energy"].items():
                held = grads[name].flatten(2).double()  # P Q^T, or the whole matrix where that is what travels
                found = torch.linalg.svdvals(held.nan_to_num()).square()[:, : energy.shape[1]]
                energy[:, : found.shape[1]] += found / self.look

    def _prices(self, costs: RankCosts, moment: RankMoment) -> tuple[dict[str, list[float]], float]:
        """Bytes, or seconds above those of rank 1 everywhere, of each matrix at each rank; and the budget for them."""
        ones = dict.fromkeys(costs.shapes, 1)
        base = costs.send_s(ones, moment.step)

        def price(name: str, rank: int) -> float:
            if self.unit == "seconds":
                return max(costs.send_s({**ones, name: rank}, moment.step) - base, 0.0)
            n, m = costs.shapes[name]
            return float(costs.element_size * (rank * (n + m) if saves(n, m, rank, costs.min_rate) else n * m))

        most = {name: min(self.most, *shape) for name, shape in costs.shapes.items()}
        found = {name: [price(name, rank + 1) for rank in range(held)] for name, held in most.items()}
        return found, self.budget - (base if self.unit == "seconds" else 0.0)
