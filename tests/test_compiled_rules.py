"""The compiled updates against torch's own classes, to the bit; and the short ways of a step against the long ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from descentlab.config.resolve import resolve
from descentlab.core.native import compiled_code
from descentlab.core.state import State
from descentlab.core.tree import clone
from descentlab.engine.batched_cnn import BatchedCnn
from descentlab.engine.batched_mlp import BatchedMlp
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.program import BlockPlan
from descentlab.engine.recorder import Recorder
from descentlab.launch.build import build_parts, survey
from descentlab.launch.plan import make_plan, read_block
from descentlab.observe.training import TestSet
from descentlab.optim import compiled
from descentlab.optim.stacked import StackedOptimizer, torch_rule

SHAPES = {"a": (5, 7), "b": (5,), "c": (3, 5), "d": (3,)}
RULES: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"momentum": 0.0}),
    ("sgd", {"momentum": 0.9, "dampening": 0.2, "weight_decay": 1e-2}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("adam", {"betas": (0.9, 0.999), "eps": 1e-8}),
    ("adam", {"betas": (0.2, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    ("adamw", {"weight_decay": 0.1}),
    ("rmsprop", {"alpha": 0.9}),
    ("rmsprop", {"alpha": 0.5, "momentum": 0.8, "weight_decay": 1e-2}),
]


@pytest.fixture(autouse=True)
def compiler() -> None:
    if compiled.library_for(torch.float32) is None:
        pytest.skip("no C compiler on this machine")


def draws(dtype: torch.dtype, members: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    while True:
        found = {k: torch.randn(members, *s, dtype=torch.float64, generator=generator) for k, s in SHAPES.items()}
        scale = 10.0 ** torch.randint(-12, 6, (members, 1), generator=generator)
        yield {k: (t * scale.view(-1, *[1] * (t.dim() - 1))).to(dtype) for k, t in found.items()}


def trained(rules: list[tuple[str, dict[str, Any]]], dtype: torch.dtype, use: bool) -> State:
    """Twelve updates of six members; one meets NaN, rates change on the way."""
    members, several = 6, [torch_rule(name, {"lr": 0.01, **settings}) for name, settings in rules]
    gradients = draws(dtype, members)
    state = State.start(next(gradients), {})
    with compiled_code(use):
        optimizer = StackedOptimizer(several[0], rules=several, by_rate=True)
        optimizer.assign([m * len(several) // members for m in range(members)])
        for i in range(12):
            grads = next(gradients)
            if i == 7:
                grads["b"][2, 1], grads["a"][3, 0, 0] = math.nan, math.inf
            optimizer.apply(state, grads, torch.full((members,), 0.01 / (1 + i // 5), dtype=torch.float64))
        assert any(bound.compiled is not None for bound in optimizer._bound) == use
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "settings"), RULES)
def test_updates_have_torchs_bits(name: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Broken on purpose: a multiplication and an addition rounded apart, the processor's own square root, the step
    count one too small; each fails here, and the first two are found before the rule is used."""
    ours, theirs = (trained([(name, settings)], dtype, use) for use in (True, False))
    assert ours.slots.keys() == theirs.slots.keys() and torch.equal(ours.opt_step, theirs.opt_step)
    for tree, other in ((ours.params, theirs.params), *zip(ours.slots.values(), theirs.slots.values(), strict=True)):
        for k in tree:
            torch.testing.assert_close(tree[k], other[k], rtol=0, atol=0, equal_nan=True)


def test_several_rules_side_by_side_have_torchs_bits() -> None:
    ours, theirs = (trained([RULES[1], RULES[3], RULES[7]], torch.float32, use) for use in (True, False))
    assert set(ours.slots) == {"momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg"}
    for tree, other in ((ours.params, theirs.params), *((ours.slots[s], theirs.slots[s]) for s in theirs.slots)):
        for k in tree:
            torch.testing.assert_close(tree[k], other[k], rtol=0, atol=0, equal_nan=True)


def test_a_rule_that_differs_in_one_bit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when nobody compares."""
    like, settings = torch.zeros(2, 2), {"lr": 0.1, "momentum": 0.9}
    assert compiled.compiled_rule(torch.optim.SGD, settings, like) is not None
    right = compiled._doubles
    monkeypatch.setattr(compiled, "_doubles", lambda *numbers: right(numbers[0] * (1 + 2e-7), *numbers[1:]))
    compiled.agrees.cache_clear()
    try:
        assert compiled.compiled_rule(torch.optim.SGD, settings, like) is None
    finally:
        compiled.agrees.cache_clear()


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.SGD, {"maximize": True}),
    ],
)
def test_what_is_not_covered_is_left_to_torch(cls: type[torch.optim.Optimizer], settings: dict[str, Any]) -> None:
    assert compiled.compiled_rule(cls, {"lr": 0.1, **settings}, torch.zeros(2, 2)) is None
    assert compiled.compiled_rule(torch.optim.SGD, {"lr": 0.1}, torch.zeros(2, 2, dtype=torch.bfloat16)) is None


def recorded(model: str, *, short: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[dict], State]:
    """Rows, hits and last state of a small recovery study, with or without the short ways of a step."""
    settings = ["size=quick", "dataset=digits", "batch_size=32", "cases=3", f"model={model}", "optimizer=adam,sgd"]
    resolved = resolve("recovery", [*settings, *(["model.pool=1"] if model == "cnn" else [])])
    block = read_block(make_plan(resolved, {})[0]["blocks"][0])
    cell = type(resolved.cells[0]).model_validate(block.settings)
    variants = [type(cell).model_validate({**block.settings, **_rated(v, cell)}) for v in block.variants]
    with monkeypatch.context() as patch:
        if not short:
            for work in (BatchedMlp, BatchedCnn):
                patch.delattr(work, "apart")
            patch.delattr(TestSet, "only_evaluates")
        parts = build_parts(cell, block.plan.route, variants, block.update)
        engine = Lockstep(BlockPlan("k", 0, block.plan.route, block.plan.runs), parts, recorder=Recorder())
        last = [clone(p.state.params) for p in engine.run()][-1]
    columns, hits = engine.recorder.flush()
    return {k: v for k, v in columns.items() if k != "wall_s"}, hits, last


def _rated(variant: dict[str, Any], cell: Any) -> dict[str, Any]:
    return {**variant, "optimizer": {"lr": cell.optimizer.lr, **variant["optimizer"]}} if variant else {}


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_members_that_stay_in_their_places_get_the_same_numbers(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits and evaluations without copies of the members against those with them. Broken on purpose: an evaluation of
    the first members instead of those due, and a hit member's row that is not written over."""
    assert survey(resolve("recovery", [f"model={model}"]).cells[0]).route == "vmap"
    short, hits, last = recorded(model, short=True, monkeypatch=monkeypatch)
    long, others, end = recorded(model, short=False, monkeypatch=monkeypatch)
    assert short.keys() == long.keys() and hits == others and len(hits) == 6
    assert all(short[k].equals(long[k], null_equal=True) for k in short)
    assert all(torch.equal(last[k], end[k]) for k in last)
