"""torch.optim on stacked tensors: parity with single models, detection of classes that mix members."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from descentlab.core.state import State
from descentlab.optim.member_check import linear_in_lr, mixes_members
from descentlab.optim.schedules import linear
from descentlab.optim.specs import Adam, AdamW, RmsProp, Sgd
from descentlab.optim.stacked import Rule, StackedOptimizer

M = 4
SHAPES = {"matrix": (4, 3), "vector": (3,), "scalar": ()}
RULES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.01}),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-3}),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.01}),
    (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "momentum": 0.5}),
    (torch.optim.NAdam, {"lr": 0.01}),
    (torch.optim.RAdam, {"lr": 0.01}),
    (torch.optim.Adagrad, {"lr": 0.01}),
    (torch.optim.Adadelta, {"lr": 1.0}),
]


class Lars(torch.optim.Optimizer):
    """A whole-tensor norm: the rule that stacking would get wrong."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad * p.norm() / (p.grad.norm() + 1e-9))


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(M, *s, dtype=torch.float64, generator=generator) for k, s in SHAPES.items()}


def gradients(params: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """A noisy quadratic whose noise depends on the step only."""
    generator = torch.Generator().manual_seed(step)
    return {k: p + torch.randn(p.shape, dtype=p.dtype, generator=generator) for k, p in params.items()}


def largest_difference(cls: type, settings: dict[str, Any], rates: list[float], steps: int = 200) -> float:
    """Norm-relative, over members and tensors, after ``steps`` updates; half-way through, the state is rebuilt."""
    state = State.start(start(), {})
    optimizer = StackedOptimizer(Rule(cls, settings))
    lr = torch.tensor(rates, dtype=torch.float64)
    singles = []
    for m in range(M):
        ps = {k: p[m].clone().requires_grad_() for k, p in start().items()}
        singles.append((ps, cls(list(ps.values()), **{**settings, "lr": rates[m]})))
    for t in range(steps):
        optimizer.apply(state, gradients(state.params, t), lr)
        stacked = {k: torch.stack([ps[k].detach() for ps, _ in singles]) for k in SHAPES}
        g = gradients(stacked, t)
        for m, (ps, single) in enumerate(singles):
            for k, p in ps.items():
                p.grad = g[k][m].clone()
            single.step()
        if t == steps // 2:
            state, optimizer = State.from_state_dict(state.clone().state_dict()), StackedOptimizer(Rule(cls, settings))
    return max(
        float((state.params[k][m] - ps[k].detach()).norm() / ps[k].detach().norm())
        for m, (ps, _) in enumerate(singles)
        for k in SHAPES
    )


@pytest.mark.parametrize(("cls", "settings"), RULES, ids=lambda v: getattr(v, "__name__", ""))
def test_parity_with_single_models(cls: type, settings: dict[str, Any]) -> None:
    assert not StackedOptimizer(Rule(cls, settings)).separate
    assert largest_difference(cls, settings, [settings["lr"]] * M) <= 1e-12
    assert largest_difference(cls, settings, [settings["lr"] * f for f in (0.1, 0.5, 1.0, 0.7)]) <= 1e-12


@pytest.mark.parametrize("cls", [Lars, torch.optim.Adafactor])
def test_a_class_that_mixes_members_is_detected_and_still_right(cls: type) -> None:
    """What stacking would do to Lars is shown by the next test."""
    settings = {"lr": 0.01}
    assert mixes_members(Rule(cls, settings))
    assert largest_difference(cls, settings, [0.01] * M) <= 1e-12
    assert largest_difference(cls, settings, [0.01, 0.02, 0.03, 0.04]) <= 1e-12


def test_stacking_a_mixing_class_would_be_wrong() -> None:
    state, rule = State.start(start(), {}), Rule(Lars, {"lr": 0.01})
    alone = State.start(start(), {})
    rates = torch.full((M,), 0.01, dtype=torch.float64)
    StackedOptimizer(rule, separate=False).apply(state, gradients(state.params, 1), rates)
    StackedOptimizer(rule).apply(alone, gradients(alone.params, 1), rates)
    assert not torch.allclose(state.params["matrix"], alone.params["matrix"], rtol=1e-6)


def test_members_with_their_own_step_counters() -> None:
    """A member that starts later (its slots empty) equals a single model that starts later."""
    rule = Rule(torch.optim.Adam, {"lr": 0.01})
    state, optimizer = State.start(start(), {}), StackedOptimizer(rule)
    lr = torch.full((M,), 0.01, dtype=torch.float64)
    for t in range(3):
        optimizer.apply(state, gradients(state.params, t), lr)
    for k, p in start().items():
        state.params[k][2] = p[2]
    state.opt_step[2] = 0
    single = {k: p[2].clone().requires_grad_() for k, p in start().items()}
    reference = torch.optim.Adam(list(single.values()), lr=0.01)
    for t in range(3, 8):
        g = gradients(state.params, t)
        for k, p in single.items():
            p.grad = g[k][2].clone()
        reference.step()
        optimizer.apply(state, g, lr)
    for k, p in single.items():
        torch.testing.assert_close(state.params[k][2], p.detach(), rtol=1e-12, atol=1e-14)


def test_a_poisoned_member_leaves_the_others_to_the_bit() -> None:
    for cls, settings in RULES:
        clean, poisoned = State.start(start(), {}), State.start(start(), {})
        a, b = StackedOptimizer(Rule(cls, settings)), StackedOptimizer(Rule(cls, settings))
        lr = torch.full((M,), settings["lr"], dtype=torch.float64)
        for t in range(5):
            g, bad = gradients(clean.params, t), gradients(poisoned.params, t)
            if t == 2:
                for p in bad.values():
                    p[1] = float("nan")
            a.apply(clean, g, lr)
            b.apply(poisoned, bad, lr)
        for k in SHAPES:
            assert torch.equal(clean.params[k][[0, 2, 3]], poisoned.params[k][[0, 2, 3]])
            assert poisoned.params[k][1].isnan().all()


def test_a_rule_that_is_not_linear_in_its_rate_is_noticed() -> None:
    class Squared(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] ** 2 * p.grad)

    assert linear_in_lr(Rule(torch.optim.Adam, {"lr": 0.01}))
    assert not linear_in_lr(Rule(Squared, {"lr": 0.1}))
    assert largest_difference(Squared, {"lr": 0.1}, [0.1, 0.2, 0.3, 0.4]) <= 1e-12


def test_specs_build_what_torch_would() -> None:
    for spec, cls in ((Sgd(), "SGD"), (Adam(), "Adam"), (AdamW(), "AdamW"), (RmsProp(), "RMSprop")):
        rule = spec.build()
        made = rule.make([torch.zeros(2, requires_grad=True)], rule.lr)
        usual = getattr(torch.optim, cls)([torch.zeros(2, requires_grad=True)], lr=rule.lr)
        shown = {k: v for k, v in made.param_groups[0].items() if k != "params"}
        assert shown == {k: v for k, v in usual.param_groups[0].items() if k != "params"}


def test_linear_decay() -> None:
    rate = linear(1e-4, 5000)
    assert rate(1e-3, 0) == 1e-3
    assert rate(1e-3, 2500) == pytest.approx(5.5e-4)
    assert rate(1e-3, 5000) == rate(1e-3, 9000) == pytest.approx(1e-4)


def test_an_update_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from descentlab.optim.specs import Adam\n"
        "from descentlab.optim.eager import step\n"
        "p = torch.ones(3, requires_grad=True); p.grad = torch.ones(3)\n"
        "o = Adam().build().make([p], 0.1); step(o)\n"
        "assert abs(p.detach() - 0.9).max() < 1e-6, p\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
