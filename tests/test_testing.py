"""The conformance checks on everything shipped and on the examples; each check notices what it is there for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from small import plan_of, quadratic
from torch import Tensor, nn

from descentlab.cluster.specs import Barrier, ConstantStaleness
from descentlab.config.tree import StudySpec
from descentlab.core.protocols import Measured
from descentlab.core.specs import Option
from descentlab.core.state import State
from descentlab.engine.driver import Engine
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.parts import Parts
from descentlab.engine.program import BlockPlan
from descentlab.engine.recorder import Recorder
from descentlab.engine.virtual import Virtual
from descentlab.launch.build import build_parts
from descentlab.observe.extra import load
from descentlab.observe.specs import EXTRA
from descentlab.observe.training import STANDARD, TestSet
from descentlab.optim.specs import OPTIMIZERS, Sgd
from descentlab.testing import check_engine, check_observable, check_optimizer, check_workload
from descentlab.workloads.base import Data, ModelFactory
from descentlab.workloads.specs import DATASETS, MODELS, Digits, Mlp, Quadratic, QuadraticModel, SmallCnn

THIRD_PARTY = Path(__file__).parent.parent / "examples" / "third_party"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"third_party_{name}", THIRD_PARTY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_shipped_optimizers(name: str) -> None:
    rule = OPTIMIZERS.lookup(name)().build()
    check_optimizer(rule.cls, rule.settings)


def test_the_example_optimizer() -> None:
    check_optimizer(example("my_optimizer").SignDescent, {"lr": 1e-3})


class _Sgd(torch.optim.Optimizer):
    """A base for optimizers with one mistake each."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.rate, self.calls = lr, 0


class FixedRate(_Sgd):
    """Keeps the rate it was built with."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data.sub_(0.1 * p.grad)


class OutsideState(_Sgd):
    """Counts its calls where no checkpoint looks."""

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for p in self.param_groups[0]["params"]:
            p.data.sub_(self.param_groups[0]["lr"] / self.calls * p.grad)


class Lazy(_Sgd):
    """Does nothing."""

    def step(self, closure: Any = None) -> None:
        pass


@pytest.mark.parametrize(
    ("cls", "text"), [(FixedRate, "move at lr = 0"), (OutsideState, "taken up after"), (Lazy, "did not move")]
)
def test_check_optimizer_notices(cls: type, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        check_optimizer(cls, {"lr": 0.1})
    with pytest.raises(AssertionError, match="need an 'lr'"):
        check_optimizer(cls, {})
    with pytest.raises(AssertionError, match=r"no torch.optim.Optimizer"):
        check_optimizer(nn.Linear, {"lr": 0.1})  # type: ignore[arg-type]


WORKLOADS: list[tuple[Option, Option]] = [
    (Digits(), Mlp(pool=0, hidden=[5])),
    (Digits(), Mlp(pool=4, dropout=0.2)),
    (Digits(), SmallCnn(channels=[2, 3, 4], pool=1)),
    (Quadratic(n=32), QuadraticModel()),
    (DATASETS.lookup("gaussian_mixture")(), MODELS.lookup("linear")()),
    (DATASETS.lookup("mnist1d_like")(), Mlp(pool=0, hidden=[5])),
]


@pytest.mark.parametrize(("dataset", "model"), WORKLOADS, ids=lambda option: option.name)
def test_shipped_workloads(dataset: Option, model: Option) -> None:
    check_workload(dataset, model)


class Broken(nn.Module):
    """A classifier with one mistake."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.layer, self.mistake = nn.Linear(64, 10), mistake
        if mistake == "random":
            self.layer.weight.data.copy_(torch.from_numpy(np.random.default_rng().normal(size=(10, 64))))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x.flatten(1))
        if self.mistake == "gradient":
            out = out + (out - out.detach())
        if self.mistake == "vmap" and torch._C._functorch.is_batchedtensor(x):
            out = 2 * out
        return out


@pytest.mark.parametrize(
    ("mistake", "text"),
    [("random", "two different models"), ("gradient", "finite differences"), ("vmap", "vectorised route")],
)
def test_check_workload_notices_a_model(mistake: str, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        check_workload(Digits(), _Given(value=ModelFactory(lambda data: Broken(mistake))))


def test_check_workload_notices_a_sample_in_two_parts() -> None:
    data = Digits().build()
    parts = {k: getattr(data, k) for k in data.__dataclass_fields__}
    shared = Data(**{**parts, "x_test": data.x_train[:5], "y_test": data.y_train[:5]})
    with pytest.raises(AssertionError, match="also in the train part"):
        check_workload(_Given(value=shared), Mlp())


class _Given(Option):
    """An option that builds what it holds."""

    name: str = "given"
    value: Any

    def build(self) -> Any:
        return self.value


@pytest.mark.parametrize("cls", [*STANDARD, TestSet], ids=lambda cls: cls.__name__)
def test_shipped_observables(cls: Callable[[], Any]) -> None:
    check_observable(cls(), shipped=True)


@pytest.mark.parametrize("name", EXTRA)
def test_shipped_extra_observables(name: str) -> None:
    check_observable(load([name])[0])


def test_the_example_observable() -> None:
    check_observable(example("my_observable").Sparsity())


class Faulty:
    """An observable with one mistake."""

    name, needs = "faulty", frozenset({"grad"})

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def measure(self, m: Measured) -> dict[str, Tensor]:
        g = m.grads["layer.bias"]
        if self.mistake == "writes":
            g.zero_()
        if self.mistake == "mixes":
            return {"x": g.sum(1) - g.mean()}
        if self.mistake == "name":
            return {"train_loss": g.sum(1)}
        if self.mistake == "shape":
            return {"x": g.sum()}
        if self.mistake == "columns":
            return {f"x{len(g)}": g.sum(1)}
        return {"x": g.sum(1)}


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        ("writes", "changes what it is shown"),
        ("mixes", "depends on the members beside it"),
        ("name", "belongs to descentlab"),
        ("shape", "one entry per member"),
        ("columns", "columns depend on how many"),
    ],
)
def test_check_observable_notices(mistake: str, text: str) -> None:
    check_observable(Faulty("none"))
    with pytest.raises(AssertionError, match=text):
        check_observable(Faulty(mistake))


def virtual(timeline: Any, plan: BlockPlan, parts: Parts, state: State | None, step: int, recorder: Recorder) -> Engine:
    return Virtual(plan, parts, state, step, recorder, timeline=timeline)  # type: ignore[arg-type]


CELL: StudySpec = quadratic(optimizer=Sgd(lr=0.1, momentum=0.9))


def test_shipped_engines() -> None:
    plan, parts = plan_of(CELL, 6), partial(build_parts, CELL, "vmap")  # type: ignore[arg-type]
    check_engine(Lockstep, plan, parts, synchronous=True)
    check_engine(partial(virtual, Barrier().build()), plan, parts, synchronous=True)
    check_engine(partial(virtual, ConstantStaleness(staleness=2).build()), plan, parts)


class Forgetful(Lockstep):
    """Scales its gradients by a number that no state holds."""

    calls = 0

    def after_update(self) -> None:
        self.calls += 1
        for p in self.state.params.values():
            p.mul_(1 + 0.01 * self.calls)


class Skips(Lockstep):
    """Does not record the first update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        record = self.measuring.record
        self.measuring.record = lambda step, *rest: record(step, *rest) if step else None  # type: ignore[method-assign]


def test_check_engine_notices() -> None:
    plan, parts = plan_of(CELL, 6), partial(build_parts, CELL, "vmap")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="taken up after update 1"):
        check_engine(Forgetful, plan, parts)
    with pytest.raises(AssertionError, match="rows for updates"):
        check_engine(Skips, plan, parts)
    with pytest.raises(AssertionError, match="differ from lockstep"):
        check_engine(partial(virtual, ConstantStaleness(staleness=2).build()), plan, parts, synchronous=True)
