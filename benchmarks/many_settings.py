"""What a thousand settings cost beside one: an update of 1,000 members of MLP-386, one thread, one JSON line.

    python benchmarks/many_settings.py [--quick]

Ratios are processor time per update: ``vectorised_vs_one_<optimizer>``, the vectorised rule with 1,000 settings over
``torch.optim`` on stacked tensors with one setting; ``groups_vs_one_<optimizer>``, torch with a slice per setting (at
100 members, times ten). Nothing but the update is measured: gradients are the same in all three.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from common import ONE_THREAD, alternate, emit, median_ratio

os.environ.update(ONE_THREAD)

import torch

from descentlab.core.state import State
from descentlab.optim.specs import OPTIMIZERS
from descentlab.optim.stacked import Rule, StackedOptimizer
from descentlab.optim.vectorised import VectorisedOptimizer

MEMBERS, GROUPS = 1000, 100
SHAPES = {"0.weight": (8, 36), "0.bias": (8,), "2.weight": (10, 8), "2.bias": (10,)}
VARIED = {"sgd": "momentum", "adam": "eps", "adamw": "weight_decay", "rmsprop": "alpha", "nadam": "eps"}


def rules(name: str, n: int) -> list[Rule]:
    """``n`` settings of one optimizer."""
    varied = VARIED[name]
    low, high = (1e-8, 1e-3) if varied in ("eps", "weight_decay") else (0.5, 0.95)
    blocks: list[dict[str, Any]] = [{"name": name, varied: low + (high - low) * i / n} for i in range(n)]
    return [OPTIMIZERS.parse(block).build() for block in blocks]


def contestant(make: Callable[[], Any], members: int, updates: int) -> float:
    """Seconds of processor time per update."""
    generator = torch.Generator().manual_seed(0)
    params = {k: torch.randn(members, *s, generator=generator) for k, s in SHAPES.items()}
    grads = {k: torch.randn(members, *s, generator=generator) for k, s in SHAPES.items()}
    state, optimizer = State.start(params, {}), make()
    lr = torch.full((members,), 0.01, dtype=torch.float64)
    for _ in range(3):
        optimizer.apply(state, grads, lr)
    started = time.process_time()
    for _ in range(updates):
        optimizer.apply(state, grads, lr)
    return (time.process_time() - started) / updates


def assigned(optimizer: Any, members: int) -> Any:
    """Every member has a setting of its own."""
    optimizer.assign(range(members))
    return optimizer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    updates, repeats = (5, 3) if quick else (50, 7)
    ratios: dict[str, float | None] = {}
    for name in VARIED:
        every = rules(name, MEMBERS)

        def one(rule: Rule = every[0]) -> Any:
            return StackedOptimizer(rule, separate=False)

        def many(held: list[Rule] = every) -> Any:
            return assigned(VectorisedOptimizer(held), MEMBERS)

        def groups(held: list[Rule] = every) -> Any:
            return assigned(StackedOptimizer(held[0], separate=False, rules=held[:GROUPS]), GROUPS)

        measured = alternate(
            {
                "one": partial(contestant, one, MEMBERS, updates),
                "many": partial(contestant, many, MEMBERS, updates),
                "groups": partial(contestant, groups, GROUPS, max(2, updates // 10)),
            },
            repeats,
        )
        ratios[f"vectorised_vs_one_{name}"] = median_ratio(measured["many"], measured["one"])
        ratios[f"groups_vs_one_{name}"] = median_ratio([10 * s for s in measured["groups"]], measured["one"])
    emit("many_settings", ratios, MEMBERS, updates=updates, repeats=repeats)


if __name__ == "__main__":
    main()
