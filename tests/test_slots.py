"""Slot persistence against torch.optim itself on one scalar in float64, and the numbers published for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from descentlab.theory import slots

RATIOS = (1e5, 1e9, 1e15)
G = 0.5
ADAM = {"betas": (0.9, 0.999)}


def simulate(make: Callable[..., torch.optim.Optimizer], before: int, after: int, lr: float = 1e-3) -> np.ndarray:
    """Sizes of the updates from the spike on, ``[after + 1, 3]``: one weight per ratio, all elementwise rules."""
    weight = torch.zeros(len(RATIOS), dtype=torch.float64)
    optimizer = make([weight], lr=lr)
    spike, normal = G * torch.tensor(RATIOS, dtype=torch.float64), torch.full((3,), G, dtype=torch.float64)
    sizes = []
    for step in range(before + 1 + after):
        weight.zero_()  # so that a small update is not lost beside a large weight
        weight.grad = (spike if step == before else normal).clone()
        optimizer.step()
        if step >= before:
            sizes.append(-weight.numpy().copy())
    return np.array(sizes)


CASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[..., np.ndarray], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, lambda k, g, s, before, **o: slots.sgd_update(k, g, s, **o), {}),
    "momentum": (torch.optim.SGD, slots.momentum_update, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, slots.adam_update, ADAM),
    "adam, short memory": (torch.optim.Adam, slots.adam_update, {"betas": (0.8, 0.99), "eps": 1e-6}),
    "amsgrad": (lambda p, **o: torch.optim.Adam(p, amsgrad=True, **o), slots.amsgrad_update, ADAM),
    "rmsprop": (torch.optim.RMSprop, slots.rmsprop_update, {"alpha": 0.9}),
    "adagrad": (torch.optim.Adagrad, slots.adagrad_update, {}),
}


@pytest.mark.parametrize("before", [0, 7, 300])
@pytest.mark.parametrize("name", CASES)
def test_every_update_equals_torchs(name: str, before: int) -> None:
    """Early and late spikes: fails when a bias correction, a power or a weight 1 - beta is left out."""
    make, predict, settings = CASES[name]
    measured = simulate(lambda p, **o: make(p, **o, **settings), before, 400)
    k = np.arange(401)
    for column, ratio in enumerate(RATIOS):
        predicted = predict(k, G, G * ratio, lr=1e-3, before=before, **settings)
        assert measured[:, column] == pytest.approx(predicted, rel=1e-7, abs=0)


def abnormal_after(sizes: np.ndarray, normal: float) -> list[int]:
    """The last step whose update is off by more than 10 %, per ratio, as counted from a simulation."""
    return [int(np.flatnonzero(np.abs(column / normal - 1) > 0.1)[-1]) for column in sizes.T]


def test_steps_until_normal_are_those_of_torch_and_of_the_published_table() -> None:
    """Momentum 109/196/327, RMSprop 210/385/647: counted in a simulation, computed, and published."""
    momentum = simulate(lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o), 300, 400, lr=1.0)
    rmsprop = simulate(lambda p, **o: torch.optim.RMSprop(p, alpha=0.9, **o), 300, 700, lr=1.0)
    assert abnormal_after(momentum, G / 0.1) == [109, 196, 327]
    assert abnormal_after(rmsprop, 1.0) == [210, 385, 647]
    assert [slots.steps_until_normal("momentum", r) for r in RATIOS] == [109, 196, 327]
    assert [slots.steps_until_normal("rmsprop", r, alpha=0.9) for r in RATIOS] == [210, 385, 647]
    assert [slots.steps_until_normal("sgd", r) for r in RATIOS] == [0, 0, 0]


def test_adam_stays_frozen_as_long_as_predicted() -> None:
    """beta2 0.99 simulated to the end; at 0.999 the published 17.6k, 36k and 63.6k."""
    sizes = simulate(lambda p, **o: torch.optim.Adam(p, betas=(0.9, 0.99), **o), 2000, 6700, lr=1.0)
    assert abnormal_after(sizes, 1.0) == [slots.steps_until_normal("adam", r, beta2=0.99) for r in RATIOS]
    steps = [slots.steps_until_normal("adam", r) for r in RATIOS]
    assert steps == pytest.approx([17_600, 36_000, 63_600], rel=4e-3)
    late = [slots.adam_update(np.array([s, s + 1]), 1.0, r, eps=0) for s, r in zip(steps, RATIOS, strict=True)]
    assert all(before < 0.9 <= after for before, after in late)  # the step counts are those of the equation


def test_adam_s_faulty_update_is_bounded_and_grows_with_age() -> None:
    """Published: 1.6 lr early in training to 3.16 lr late, whatever the size; 16 to 32 lr over 30 steps."""
    sizes = {before: float(slots.adam_update(0, 1.0, 1e9, before=before)) for before in (0, 300, 10**5)}
    assert sizes[0] == pytest.approx(1.0) and sizes[300] == pytest.approx(1.6, abs=0.05)
    assert sizes[10**5] == pytest.approx(3.16, abs=0.01)
    assert 16 < slots.adam_update(np.arange(30), 1.0, 1e9).sum() < 32
    assert slots.momentum_update(np.arange(400), 0.0, 1e9).sum() == pytest.approx(1e10)


def test_amsgrad_and_adagrad_do_not_come_back() -> None:
    assert all(math.isinf(slots.steps_until_normal("amsgrad", r)) for r in RATIOS)
    assert slots.steps_until_normal("amsgrad", 2.0) == 0
    assert slots.steps_until_normal("adagrad", 1e5) > 4e10  # finite in theory, never in practice
    ratio, k = 21.0, int(slots.steps_until_normal("adagrad", 21.0))
    spiked = slots.adagrad_update(np.array([k, k + 1]), 1.0, ratio)
    twin = slots.adagrad_update(np.array([k, k + 1]), 1.0, 1.0)
    assert (spiked / twin)[0] < 0.9 <= (spiked / twin)[1]


def test_batchnorm_variance_is_torchs() -> None:
    """One element of 1e6 among 4,096 (published: V^2 / N per hit), then unit variance; 3.5e11 takes about 250 steps."""
    layer = torch.nn.BatchNorm1d(1, momentum=0.1).double()
    batch = torch.randn(4096, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    clean, normal = batch.clone(), float(batch.var())
    batch[17] = 1e6
    layer.running_var.fill_(normal)
    layer(batch)
    measured = [float(layer.running_var)]
    for _ in range(30):
        layer(clean)
        measured.append(float(layer.running_var))
    assert measured == pytest.approx(slots.batchnorm_variance(np.arange(31), normal, 1e12 / 4096), rel=1e-4)
    assert slots.variance_steps(3.5e11) == pytest.approx(250, rel=0.1) and slots.variance_steps(math.inf) == math.inf
    k = int(slots.variance_steps(1e4))
    assert 0.9**k * (1e4 - 1) > 0.1 >= 0.9 ** (k + 1) * (1e4 - 1)


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"name": "sgd", "momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9)),
        ({"name": "adam", "betas": [0.9, 0.99]}, lambda p: torch.optim.Adam(p, lr=0.0, betas=(0.9, 0.99))),
        ({"name": "rmsprop", "alpha": 0.9}, lambda p: torch.optim.RMSprop(p, lr=0.0, alpha=0.9)),
        ({"name": "adagrad"}, lambda p: torch.optim.Adagrad(p, lr=0.0)),
    ],
)
@pytest.mark.parametrize("spike", [20.0, 1e4])
def test_the_slot_curve_is_the_optimizer_s_slot(settings: dict[str, Any], make: Any, spike: float) -> None:
    """Gradient 0 but for the spike, in one element; another element holds the slots' normal value. Both regimes of
    Adam: below G = 100 its first moment is the larger slot, then the second moment outlives it."""
    weight = torch.zeros(1, dtype=torch.float64)
    optimizer = make([weight])
    normal, seen = 0.05, []
    for step in range(200):
        weight.grad = torch.full((1,), spike if step == 0 else 0.0, dtype=torch.float64)
        optimizer.step()
        held = [float(v) for k, v in optimizer.state[weight].items() if k != "step"]
        seen.append(max(held))
    curve = slots.slot_curve(settings, seen[0] + normal, normal, np.arange(200))
    assert curve is not None and curve == pytest.approx(1 + np.array(seen) / normal, rel=1e-9)
    steps = slots.slot_steps(settings, 1 + seen[0] / normal, normal)
    over = np.flatnonzero(1 + np.array(seen) / normal > 1.1)[-1]
    assert steps is not None and (steps == over or (steps > 199 and over == 199))


def test_nothing_is_predicted_where_nothing_is_known() -> None:
    assert slots.slot_curve({"name": "sgd", "momentum": 0.0}, 5.0, 1.0, np.arange(3)) is None
    assert slots.slot_steps({"name": "adadelta"}, 5.0, 1.0) is None
    assert slots.slot_steps({"name": "adam"}, 1.0, 1.0) == 0
    assert slots.slot_steps({"name": "adam"}, math.inf, 1.0) == math.inf
    with pytest.raises(ValueError, match="expected sgd"):
        slots.steps_until_normal("adadelta", 10.0)
