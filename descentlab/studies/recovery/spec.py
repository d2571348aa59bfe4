"""Settings of the recovery study: which optimizer recovers from the same hardware fault?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt

from ...config.tree import StudyDef, StudySpec
from ...core.errors import UserError
from ...core.specs import extent
from ...optim.specs import Baseline, ExternalOptimizer, NoBaseline
from ...optim.tuning_specs import NoTune, TuneChoice
from ...perturb.arm_specs import ArmChoice, NoArm
from ...perturb.specs import FaultChoice, N16Rd
from ...workloads.specs import Model, SmallCnn

EACH = "each"  # fault.layer: every layer in turn


class RecoverySpec(StudySpec):
    """Every case plans one fault; every optimizer meets it, beside a twin that does not."""

    study: str = "recovery"
    model: Model = SmallCnn()
    fault: FaultChoice = N16Rd(value_mode="log_uniform", value_high=1e12)
    arm: ArmChoice = NoArm()
    protocol: Literal["scratch", "baseline", "shadow"] = Field(
        "scratch", description="who trains up to the fault: each optimizer itself, or a baseline that others continue"
    )
    baseline: Baseline = NoBaseline()
    carry_state: bool = Field(
        True, description="protocol = baseline: slots are handed over where both optimizers have them"
    )
    tune: TuneChoice = extent(NoTune(), description="learning rates chosen before the comparison; ids have the chosen")
    cases: PositiveInt = extent(10, description="planned faults; case i is replicate i")
    recovery_steps: PositiveInt = 100
    share_prefix: bool = extent(True, description="train the fault-free prefix once for a run and its twin")

    def identity(self) -> dict[str, Any]:
        """As for every block; ``arm`` and ``baseline`` are left out at their defaults, as in the ids of runs made
        before they existed."""
        out = super().identity()
        if self.arm == NoArm():
            del out["arm"]
        if self.baseline == NoBaseline():
            del out["baseline"]
        return out

    def check_given(self) -> None:
        super().check_given()
        if self.protocol == "scratch" and self.baseline.name != "none":
            raise UserError("baseline", self.baseline.name, "no baseline beside protocol = scratch")
        if self.protocol != "baseline" and "carry_state" in self.model_fields_set:
            expected = f"protocol = baseline; with protocol = {self.protocol} nothing is handed over"
            raise UserError("carry_state", self.carry_state, expected)


def plan(cells: Sequence[RecoverySpec]) -> list[tuple[int, int, str, dict[str, Any]]]:
    """Case by case: the twin and the faulted run of every cell."""
    return [
        (index, case, role, {"case": case})
        for index, cell in enumerate(cells)
        for case in range(cell.cases)
        for role in ("twin", "fault")
    ]


def expand(cell: RecoverySpec) -> list[RecoverySpec]:
    """A cell for each layer the fault can hit, where ``fault.layer`` is ``each``."""
    if getattr(cell.fault, "layer", None) != EACH:
        return [cell]
    from .program_layers import layers_of  # imports torch: the layers are those of the model

    faults = [cell.fault.model_copy(update={"layer": layer}) for layer in layers_of(cell)]
    return [cell.model_copy(update={"fault": fault}) for fault in faults]


def check(cell: RecoverySpec) -> None:
    if cell.fault.name == "none":
        raise UserError("fault", "none", "a fault: every run is compared with its fault-free twin already")
    if cell.protocol == "scratch":
        return
    if cell.baseline.name == "none":
        expected = f"an optimizer that trains up to the fault beside protocol = {cell.protocol}"
        raise UserError("baseline", "none", expected, hint="for instance baseline=adam")
    if cell.arm.name != "none":
        expected = f"none beside protocol = {cell.protocol}: its bounds are those of one optimizer's memory"
        raise UserError("arm", cell.arm.name, expected)
    if cell.protocol == "shadow" and isinstance(cell.optimizer, ExternalOptimizer):
        expected = (
            "an optimizer of descentlab list optimizers beside protocol = shadow: a third party's memory may follow "
        )
        raise UserError("optimizer", cell.optimizer.name, f"{expected}the weights it moves, and a shadow moves none")


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
    "adagrad": {"lr": 1e-3, "initial_accumulator_value": 0.1, "eps": 1e-7},
    "adadelta": {"lr": 1e-3, "rho": 0.95, "eps": 1e-7},
    "nadam": {"lr": 1e-3, **ADAPTIVE},
}
GRID = {"optimizer": ["sgd", "adam", "rmsprop", "adamw"]}
OBSERVE = {"hit_artifacts": True}

STUDY = StudyDef(
    name="recovery",
    question="After the same hardware fault hits one training step, which optimizer recovers best?",
    spec=RecoverySpec,
    presets={
        "default": {"grid": GRID, "options": {"optimizer": TUNED, "baseline": TUNED}, "observe": OBSERVE},
        "published": {
            "grid": GRID,
            "options": {"optimizer": PUBLISHED, "baseline": PUBLISHED},
            "observe": OBSERVE,
            "schedule": {"name": "linear", "end": 1e-4, "steps": 5000},
            "fault": {"name": "N16_RD", "value_mode": "log_uniform", "value_high": 1.2e8},
        },
        # one gradient 1,000 times as large: theory.slots says how long Adam stands still, SGD is displaced and goes on
        "spike": {
            "grid": {"optimizer": ["adam", "sgd"]},
            "options": {"optimizer": {"adam": {"lr": 1e-3}, "sgd": {"lr": 1e-2}}},
            "model": "mlp",
            "fault": {"name": "event", "target": "gradient", "op": "mul", "magnitude": 1e3, "step": 500},
            "cases": 3,
            "recovery_steps": 9500,
            "observe": {"every": 5, "evaluate_every": 500},
        },
    },
    sizes={
        "quick": {"cases": 3, "recovery_steps": 10, "observe": {"evaluate_every": 5}, "fault": {"last_epoch": 0}},
        "small": {"cases": 5},
        "default": {},
        "medium": {"cases": 20},
        "full": {"cases": 40},
        "large": {"cases": 100},
    },
    plan=plan,
    check=check,
    expand=expand,
    options={"optimizer": TUNED, "baseline": TUNED},
    module="descentlab.studies.recovery.program",
    report="descentlab.studies.recovery.report:build",
)
