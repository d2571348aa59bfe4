"""torch.optim on stacked tensors: parity with single models, detection of classes that mix members."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.core.state import State
from descentlab.launch.notices import one_by_one
from descentlab.optim.member_check import linear_in_lr, mixes_members
from descentlab.optim.specs import OPTIMIZERS
from descentlab.optim.stacked import Rule, StackedOptimizer

M = 4
SHAPES = {"matrix": (4, 3), "vector": (3,), "scalar": ()}
# every shipped option with the class and the arguments that torch knows it by
SHIPPED: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.01}),  # torch's own default for lr has moved between versions
    "adam": (torch.optim.Adam, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {}),
    "nadam": (torch.optim.NAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adadelta": (torch.optim.Adadelta, {}),
}
RULES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    *((cls, {"lr": 0.01, **settings}) for cls, settings in SHIPPED.values()),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-3}),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 1e-2}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "momentum": 0.5}),
    (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 1e-2}),
    (torch.optim.RAdam, {"lr": 0.01}),
    (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 1e-2, "initial_accumulator_value": 0.5, "weight_decay": 1e-3}),
    (torch.optim.Adadelta, {"lr": 0.5, "rho": 0.8, "weight_decay": 1e-3}),
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
    assert largest_difference(cls, settings, [settings["lr"]] * M, steps=40) <= 1e-12
    assert largest_difference(cls, settings, [settings["lr"] * f for f in (0.1, 0.5, 1.0, 0.7)]) <= 1e-12


@pytest.mark.parametrize("cls", [Lars, torch.optim.Adafactor])
def test_a_class_that_mixes_members_is_detected_and_still_right(cls: type) -> None:
    """What stacking would do to Lars is shown by the next test."""
    settings = {"lr": 0.01}
    assert mixes_members(Rule(cls, settings))
    assert largest_difference(cls, settings, [0.01] * M) <= 1e-12
    assert largest_difference(cls, settings, [0.01, 0.02, 0.03, 0.04]) <= 1e-12


def test_who_is_stepped_one_by_one_is_said() -> None:
    """A study with such an optimizer is slower for a reason its user cannot see otherwise."""
    cells = resolve("recovery", ["optimizer=sgd,torch.optim:Adafactor,torch.optim:RAdam", "optimizer.lr=1e-3"]).cells
    (line,) = one_by_one(cells)
    assert "torch.optim:Adafactor mixes the members" in line


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


def test_every_shipped_optimizer_is_in_the_table() -> None:
    assert set(SHIPPED) == set(OPTIMIZERS.names())


@pytest.mark.parametrize("name", SHIPPED)
def test_an_option_holds_torchs_defaults_and_builds_torchs_class(name: str) -> None:
    cls, extra = SHIPPED[name]
    rule = OPTIMIZERS.parse(name).build()
    made = rule.make([torch.zeros(2, requires_grad=True)], rule.lr)
    usual = cls([torch.zeros(2, requires_grad=True)], **extra)
    assert type(made) is cls
    assert {k: v for k, v in made.param_groups[0].items() if k != "params"} == {
        k: v for k, v in usual.param_groups[0].items() if k != "params"
    }


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"name": "sgd", "nesterov": True}, "nesterov = True: expected false, or a momentum above 0"),
        ({"name": "sgd", "nesterov": True, "momentum": 0.9, "dampening": 0.1}, "with dampening 0"),
        ({"name": "adam", "betas": [0.9, 1.0]}, "betas.1"),
        ({"name": "adadelta", "rho": 1.5}, "rho"),
        ({"name": "zoo:Lion"}, "expected the zoo extra: pip install 'descentlab[zoo]'"),
    ],
)
def test_settings_no_optimizer_takes_are_refused_before_torch_sees_them(block: dict[str, Any], says: str) -> None:
    if block["name"].startswith("zoo:") and importlib.util.find_spec("pytorch_optimizer"):
        pytest.skip("the zoo extra is installed")
    with pytest.raises(ValidationError, match=re.escape(says)):
        OPTIMIZERS.parse(block)


def test_nesterov_without_momentum_is_one_line() -> None:
    with pytest.raises(UserError) as caught:
        resolve("crossed", ["optimizer={name: sgd, nesterov: true}"])
    expected = "optimizer.nesterov = True: expected false, or a momentum above 0 with dampening 0"
    assert str(caught.value) == expected


@pytest.mark.parametrize(("name", "near"), [("nadm", "nadam"), ("AdaGrad", "adagrad"), ("amsgard", "amsgrad")])
def test_an_unknown_name_is_an_error_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{near}'"):
        OPTIMIZERS.parse(name)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in with the one thing we ask of pytorch_optimizer: its classes at package level."""
    (tmp_path / "pytorch_optimizer").mkdir()
    text = "import torch\nfrom torch.optim import Optimizer\n\nclass Plain(torch.optim.SGD):\n    pass\n"
    (tmp_path / "pytorch_optimizer" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pytorch_optimizer", raising=False)
    yield
    sys.modules.pop("pytorch_optimizer", None)


@pytest.mark.usefixtures("zoo")
def test_names_from_the_zoo() -> None:
    rule = OPTIMIZERS.parse({"name": "zoo:plain", "lr": 0.5, "options": {"momentum": 0.5}}).build()
    assert (rule.cls.__name__, rule.settings) == ("Plain", {"lr": 0.5, "momentum": 0.5})
    assert largest_difference(rule.cls, dict(rule.settings), [0.5] * M, steps=20) <= 1e-12
    with pytest.raises(UserError, match=r"zoo:plein'.*did you mean 'Plain'"):
        OPTIMIZERS.parse("zoo:plein").build()
    with pytest.raises(UserError, match="zoo:Optimizer"):
        OPTIMIZERS.parse("zoo:Optimizer").build()


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"name": "math:sqrt"}, "expected a subclass of torch.optim.Optimizer"),
        ({"name": "torch.optim:Rprop", "options": {"etaz": 1}}, "optimizer.options = {'etaz': 1}"),
        ({"name": "torch.optim:Nothing"}, "expected a name defined in module 'torch.optim'"),
        ({"name": "no_such_module:X"}, "expected an importable module"),
    ],
)
def test_a_class_that_is_no_optimizer_is_one_line(block: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        OPTIMIZERS.parse(block).build()


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
