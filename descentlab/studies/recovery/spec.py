"""Settings of the recovery study: which optimizer recovers from the same hardware fault?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import PositiveInt

from ...config.tree import StudyDef, StudySpec
from ...core.errors import UserError
from ...core.specs import extent
from ...perturb.specs import FaultChoice, VectorForwardFault
from ...workloads.specs import Model, SmallCnn


class RecoverySpec(StudySpec):
    """Every case plans one fault; every optimizer meets it, beside a twin that does not."""

    study: str = "recovery"
    model: Model = SmallCnn()
    fault: FaultChoice = VectorForwardFault(value_high=1e12)
    cases: PositiveInt = extent(10, description="planned faults; case i is replicate i")
    recovery_steps: PositiveInt = 100
    share_prefix: bool = extent(True, description="train the fault-free prefix once for a run and its twin")


def plan(cells: Sequence[RecoverySpec]) -> list[tuple[int, int, str, dict[str, Any]]]:
    """Case by case: the twin and the faulted run of every cell."""
    return [
        (index, case, role, {"case": case})
        for index, cell in enumerate(cells)
        for case in range(cell.cases)
        for role in ("twin", "fault")
    ]


def check(cell: RecoverySpec) -> None:
    if cell.fault.name == "none":
        raise UserError("fault", "none", "a fault: every run is compared with its fault-free twin already")


ADAPTIVE = {"betas": (0.9, 0.999), "eps": 1e-7}
TUNED: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "adam": {"lr": 1e-2},
    "rmsprop": {"lr": 3e-3, "alpha": 0.9},
    "adamw": {"lr": 1e-2},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 1e-3, "momentum": 0.9},
    "adam": {"lr": 1e-3, **ADAPTIVE},
    "rmsprop": {"lr": 1e-3, "alpha": 0.9, "eps": 1e-7},
    "adamw": {"lr": 1e-3, **ADAPTIVE, "weight_decay": 4e-3},
}
GRID = {"optimizer": ["sgd", "adam", "rmsprop", "adamw"]}
OBSERVE = {"hit_artifacts": True}

STUDY = StudyDef(
    name="recovery",
    question="After the same hardware fault hits one training step, which optimizer recovers best?",
    spec=RecoverySpec,
    presets={
        "default": {"grid": GRID, "options": {"optimizer": TUNED}, "observe": OBSERVE},
        "published": {
            "grid": GRID,
            "options": {"optimizer": PUBLISHED},
            "observe": OBSERVE,
            "schedule": {"name": "linear", "end": 1e-4, "steps": 5000},
            "fault": {"name": "N16_RD", "value_high": 1.2e8},
        },
    },
    sizes={
        "quick": {"cases": 3, "recovery_steps": 10, "observe": {"evaluate_every": 5}, "fault": {"last_epoch": 0}},
        "default": {},
        "full": {"cases": 40},
    },
    plan=plan,
    check=check,
    options={"optimizer": TUNED},
    module="descentlab.studies.recovery.program",
    report="descentlab.studies.recovery.report:build",
)
