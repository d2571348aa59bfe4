"""Settings of the crossed study: do faults, staleness and compression add up, or interact?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import PositiveInt

from ...cluster.specs import Barrier, NoStalenessRule, StalenessRuleChoice, TimelineChoice
from ...comm.specs import CompressorChoice, NoCompression
from ...config.tree import StudyDef, StudySpec
from ...core.errors import UserError
from ...core.specs import extent
from ...engine.specs import EngineChoice, VirtualEngine
from ...perturb.arm_specs import ArmChoice, NoArm
from ...perturb.specs import FaultChoice, NoFault


class CrossedSpec(StudySpec):
    """Conditions combined on virtual workers: a fault on one worker, stale gradients, compressed gradients."""

    study: str = "crossed"
    workers: PositiveInt = 2
    steps: PositiveInt = 200
    replicates: PositiveInt = extent(10)
    fault: FaultChoice = NoFault()
    arm: ArmChoice = NoArm()
    engine: EngineChoice = VirtualEngine()
    timeline: TimelineChoice = Barrier()
    staleness_rule: StalenessRuleChoice = NoStalenessRule()
    compressor: CompressorChoice = NoCompression()

    def identity(self) -> dict[str, Any]:
        """As for every block; ``engine``, ``staleness_rule`` and ``arm`` are left out at their defaults, as in ids made
        before."""
        out = super().identity()
        if self.engine == VirtualEngine():
            del out["engine"]
        if self.staleness_rule == NoStalenessRule():
            del out["staleness_rule"]
        if self.arm == NoArm():
            del out["arm"]
        return out


def plan(cells: Sequence[CrossedSpec]) -> list[tuple[int, int, str, dict[str, Any]]]:
    """One run per cell and replicate; the cell without a fault is the twin of those with one."""
    return [
        (index, replicate, "twin" if cell.fault.name == "none" else "fault", {})
        for index, cell in enumerate(cells)
        for replicate in range(cell.replicates)
    ]


def check(cell: CrossedSpec) -> None:
    step = getattr(cell.fault, "step", None)
    if step is not None and step >= cell.steps:
        raise UserError("fault.step", step, f"a step below steps = {cell.steps}")


FAULT = {"name": "N16_RD", "value_mode": "log_uniform", "value_high": 1e12, "last_epoch": 0}
TUNED: dict[str, dict[str, Any]] = {"sgd": {"lr": 0.5}, "adam": {"lr": 1e-2}}

STUDY = StudyDef(
    name="crossed",
    question="Do a fault, stale gradients and compressed gradients hurt independently, or does one make another worse?",
    spec=CrossedSpec,
    presets={
        "default": {
            "grid": {
                "fault": ["none", FAULT],
                "timeline": ["barrier", {"name": "constant", "staleness": 2}],
                "compressor": ["none", {"name": "powersgd", "rank": 1}],
                "optimizer": ["sgd", "adam"],
            },
            "options": {"optimizer": TUNED},
        }
    },
    sizes={"quick": {"replicates": 3, "steps": 60}, "default": {}, "full": {"replicates": 40, "steps": 600}},
    plan=plan,
    check=check,
    options={"optimizer": TUNED},
    module="descentlab.studies.crossed.program",
    report="descentlab.studies.crossed.report:build",
)
