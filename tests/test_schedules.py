"""Learning-rate schedules against torch's, and by hand where torch has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules

from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.optim.specs import SCHEDULES

LR, STEPS = 0.3, 200
Oracle = Callable[[torch.optim.Optimizer], Any]


def ours(block: Any) -> list[float]:
    rate = SCHEDULES.parse(block).build()
    return [rate(LR, t) for t in range(STEPS)]


def torchs(make: Oracle) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    schedule = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


def linear_lr(end: float, steps: int) -> Oracle:
    return lambda o: torch_schedules.LinearLR(o, start_factor=1.0, end_factor=end / LR, total_iters=steps)


def warm(steps: int, then: Oracle) -> Oracle:
    """torch multiplies chained schedules; its linear one goes from 1 / W to 1 in W - 1 steps."""
    return lambda o: torch_schedules.ChainedScheduler(
        [torch_schedules.LinearLR(o, start_factor=1 / steps, end_factor=1.0, total_iters=steps - 1), then(o)]
    )


EQUAL: list[tuple[Any, Oracle]] = [
    ("constant", lambda o: torch_schedules.ConstantLR(o, factor=1.0)),
    ({"name": "linear", "end": 0.01, "steps": 150}, linear_lr(0.01, 150)),
    ({"name": "poly", "power": 0.7}, lambda o: torch_schedules.LambdaLR(o, lambda t: math.exp(-0.7 * math.log1p(t)))),
    ({"name": "step", "every": 30, "factor": 0.5}, lambda o: torch_schedules.StepLR(o, 30, gamma=0.5)),
    (
        {"name": "step", "drops": 3, "factor": 0.2, "steps": 150},  # quarters of 150 begin at 37.5, 75 and 112.5
        lambda o: torch_schedules.MultiStepLR(o, [38, 75, 113], gamma=0.2),
    ),
    (
        {"name": "step", "parts": [2, 1, 1], "factor": 0.2, "steps": 180},
        lambda o: torch_schedules.MultiStepLR(o, [90, 135], gamma=0.2),
    ),
    (
        {"name": "step", "parts": [0.1, 0.2, 0.7], "factor": 0.2, "steps": 100},  # .1 + .2 is .3 here
        lambda o: torch_schedules.MultiStepLR(o, [10, 30], gamma=0.2),
    ),
    (
        {"name": "multistep", "milestones": [120, 50, 50], "factor": 0.3},
        lambda o: torch_schedules.MultiStepLR(o, [50, 50, 120], gamma=0.3),
    ),
    ({"name": "exponential", "factor": 0.98}, lambda o: torch_schedules.ExponentialLR(o, gamma=0.98)),
    (
        {"name": "cosine", "steps": 199, "end": 0.01},
        lambda o: torch_schedules.CosineAnnealingLR(o, T_max=199, eta_min=0.01),
    ),
    (
        {"name": "constant", "warmup_steps": 25},
        warm(25, lambda o: torch_schedules.ConstantLR(o, factor=1.0)),
    ),
    (
        {"name": "exponential", "factor": 0.98, "warmup_steps": 25},
        warm(25, lambda o: torch_schedules.ExponentialLR(o, gamma=0.98)),
    ),
    (
        {"name": "multistep", "milestones": [10, 100], "warmup_steps": 40},
        warm(40, lambda o: torch_schedules.MultiStepLR(o, [10, 100], gamma=0.1)),
    ),
]


@pytest.mark.parametrize(("block", "oracle"), EQUAL, ids=lambda v: str(v) if isinstance(v, str | dict) else "")
def test_a_schedule_equals_torchs(block: Any, oracle: Oracle) -> None:
    assert ours(block) == pytest.approx(torchs(oracle), rel=1e-12, abs=0)


def test_every_schedule_has_an_oracle() -> None:
    used = {block if isinstance(block, str) else block["name"] for block, _ in EQUAL}
    assert used == set(SCHEDULES.names())


def test_poly_by_hand() -> None:
    assert ours("poly")[:9:4] == pytest.approx([LR, LR / math.sqrt(5), LR / 3], rel=1e-14)


def test_what_ends_stays_at_its_end() -> None:
    """torch's cosine would come back up."""
    for block in ({"name": "cosine", "steps": 50, "end": 0.02}, {"name": "linear", "steps": 50, "end": 0.02}):
        assert ours(block)[50:] == pytest.approx([0.02] * 150, rel=1e-14)
    assert ours({"name": "step", "drops": 1, "steps": 50})[50:] == [LR * 0.1] * 150


def test_a_warm_up_of_none_and_of_one_step_changes_no_bit() -> None:
    plain = ours({"name": "cosine", "steps": 77})
    assert ours({"name": "cosine", "steps": 77, "warmup_steps": 0}) == plain
    assert ours({"name": "cosine", "steps": 77, "warmup_steps": 1}) == plain
    assert ours({"name": "constant", "warmup_steps": 4})[:5] == [LR / 4, LR / 2, LR * 0.75, LR, LR]


def test_a_growing_rate_ends_in_infinity_not_in_a_traceback() -> None:
    assert SCHEDULES.parse({"name": "exponential", "factor": 1e9}).build()(0.1, 1000) == math.inf


@pytest.mark.parametrize(
    ("spelling", "block"),
    [
        ("poly_0.25", {"name": "poly", "power": 0.25}),
        ("step", {"name": "step", "drops": 2, "factor": 0.1}),
        ("step_3_0.5", {"name": "step", "drops": 3, "factor": 0.5}),
        ("step_2,1,1_0.5", {"name": "step", "parts": [2, 1, 1], "factor": 0.5}),
        ({"name": "step_3_0.5", "steps": 60}, {"name": "step", "drops": 3, "factor": 0.5, "steps": 60}),
    ],
)
def test_spellings(spelling: Any, block: dict[str, Any]) -> None:
    assert ours(spelling) == ours(block)


def test_a_spelling_has_the_run_ids_of_what_it_stands_for() -> None:
    written = [run.id for run in resolve("crossed", ["schedule=step_3_0.5", "schedule.steps=60"]).runs]
    block = "schedule={name: step, drops: 3, factor: 0.5, steps: 60}"
    assert written == [run.id for run in resolve("crossed", [block]).runs]
    quoted = resolve("crossed", ["schedule='step_2,1,1_0.5'"])
    assert quoted.cells[0].schedule.parts == (2.0, 1.0, 1.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("schedule=cosin", "did you mean 'cosine'?"),
        ("schedule=step_x_0.1", "schedule = 'step_x_0.1': expected one of constant, cosine"),
        ("schedule=step_0_0.1", "schedule.drops = 0"),
        (
            "schedule={name: step, drops: 2, every: 3}",
            "schedule.every = 3: expected only one of drops, parts",
        ),
        ("schedule={name: step, parts: [1]}", "schedule.parts"),
        ("schedule={name: multistep, milestones: [0]}", "schedule.milestones[0] = 0: expected a value greater than 0"),
        ("schedule={name: cosine, steps: 0}", "schedule.steps = 0: expected a value greater than 0"),
        ("schedule.warmup_steps=-1", "schedule.warmup_steps = -1: expected a value greater than or equal to 0"),
        ("schedule={name: exponential, factor: 0}", "schedule.factor = 0: expected a value greater than 0"),
    ],
)
def test_mistakes_are_one_line(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve("crossed", [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
