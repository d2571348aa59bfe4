"""Settings of the compression study: what sending less costs and saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from ...cluster.link_specs import LinkChoice, SimulatedLinkSpec
from ...comm.specs import CompressorChoice, NoCompression
from ...config.tree import StudyDef, StudySpec
from ...core.errors import UserError
from ...core.specs import extent
from ...optim.specs import LrSchedule, MultiStep, Optimizer, Sgd
from ...workloads.specs import Mlp, Model

ADAPTIVE = {
    "name": "powersgd",
    "min_compression_rate": 2,
    "policy": {"name": "accordion", "low": 1, "high": 8, "interval": 2, "warm_epochs": 4, "lr_cooldown": 2},
}
QUICK = {**ADAPTIVE, "policy": {**ADAPTIVE["policy"], "interval": 1, "warm_epochs": 1, "lr_cooldown": 1}}  # type: ignore[dict-item]


class CompressionSpec(StudySpec):
    """W workers that average compressed gradients at every update, over a link."""

    study: str = "compression"
    engine: Literal["auto", "lockstep", "process"] = Field(
        "auto", description="workers in one process, or processes under torchrun; auto: processes on a real link"
    )
    workers: PositiveInt = Field(2, description="workers that share every update")
    steps: PositiveInt = Field(600, description="updates of a run")
    epochs: PositiveInt | None = Field(None, description="passes over the training set; given instead of steps")
    replicates: PositiveInt = extent(5)
    compressor: CompressorChoice = NoCompression()
    link: LinkChoice = SimulatedLinkSpec()
    compute_ms: NonNegativeFloat = Field(
        10.0, description="of a worker's gradient and update on the simulated clock, in milliseconds"
    )
    bucket_mb: float = Field(25.0, gt=0, description="size of DDP's buckets, of real processes")
    restarts: int = extent(3, ge=0, description="times torchrun starts lost processes again")
    model: Model = Mlp(pool=0, hidden=[128, 128])
    optimizer: Optimizer = Sgd(lr=0.05, momentum=0.9)
    schedule: LrSchedule = MultiStep(milestones=[300, 450], factor=0.1)

    @property
    def distributed(self) -> bool:
        """Whether processes train, not virtual workers."""
        return self.engine == "process" or (self.engine == "auto" and self.link.name == "real")

    def length(self, steps_per_epoch: int) -> int:
        """Updates of a run, if so many batches of one worker are a pass over the training set."""
        if self.epochs is None:
            return self.steps
        return -(-self.epochs * steps_per_epoch // self.workers)


def plan(cells: Sequence[CompressionSpec]) -> list[tuple[int, int, str, dict[str, Any]]]:
    """One run per cell and replicate; the label ``method`` says in short how the cell compresses."""
    names = method_names(cells)
    return [
        (index, replicate, "plain", {"method": names[index]})
        for index, cell in enumerate(cells)
        for replicate in range(cell.replicates)
    ]


def method_names(cells: Sequence[CompressionSpec]) -> list[str]:
    """``none``, ``rank_4``, ``adaptive``, ``topk_0.01`` …, with whatever else tells two cells apart."""
    names = [method_name(cell.compressor.model_dump(mode="json")) for cell in cells]
    flat = [_flat(cell.model_dump(mode="json")) for cell in cells]
    out = []
    for name, own in zip(names, flat, strict=True):
        rivals = [other for other, n in zip(flat, names, strict=True) if n == name]
        keys = [key for key in own if any(other.get(key) != own[key] for other in rivals)]
        out.append(",".join([name, *(f"{key.removeprefix('compressor.')}={own[key]}" for key in keys)]))
    return out


def method_name(compressor: Mapping[str, Any]) -> str:
    """A compressor's settings in a word."""
    name = str(compressor["name"])
    if name == "topk":
        return f"topk_{compressor['fraction']:g}"
    if name == "torch_powersgd":
        return f"torch_rank_{compressor['rank']}"
    if name != "powersgd":
        return name
    policy = compressor["policy"]
    words = {"accordion": "adaptive", "calibration": "calibrated"}
    if policy["name"] == "fixed":
        return f"rank_{compressor['rank']}"
    return words.get(policy["name"], policy["name"]) + ("_per_layer" if policy.get("per_layer") else "")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return out


def check(cell: CompressionSpec) -> None:
    """Settings that contradict each other; UserError."""
    if cell.engine == "lockstep" and cell.link.name == "real":
        raise UserError("link", "real", "simulated or none beside engine = lockstep, which has no processes")
    if cell.engine == "process" and cell.link.name == "simulated":
        raise UserError("link", "simulated", "none or real beside engine = process, whose messages no clock delays")
    if cell.distributed and cell.device not in ("auto", "cpu") and cell.link.name == "real":
        raise UserError("device", cell.device, "cpu on a real link between processes of this machine")
    if cell.compressor.name == "torch_powersgd" and not cell.distributed:
        raise UserError("compressor", "torch_powersgd", "engine = process, which has DDP; powersgd does the same here")
    if cell.epochs is not None and "steps" in cell.model_fields_set:
        raise UserError("epochs", cell.epochs, f"steps or epochs, not both; steps = {cell.steps} is given")


RANKS = [{"name": "powersgd", "rank": rank, "min_compression_rate": 2} for rank in (1, 2, 4, 8)]

STUDY = StudyDef(
    name="compression",
    question="When does sending less pay, and what does it cost in accuracy?",
    spec=CompressionSpec,
    presets={"default": {"grid": {"compressor": ["none", *RANKS, ADAPTIVE]}}},
    sizes={
        "quick": {
            "replicates": 2,
            "dataset": "digits",
            "batch_size": 32,
            "steps": 90,
            "schedule": {"name": "multistep", "milestones": [60], "factor": 0.1},
            "observe": {"evaluate_every": 30},
            "grid": {"compressor": ["none", RANKS[0], RANKS[3], QUICK]},
        },
        "default": {"observe": {"evaluate_every": 30}},
        "full": {"replicates": 20, "observe": {"evaluate_every": 30}},
    },
    plan=plan,
    check=check,
    options={"compressor": {"powersgd": {"min_compression_rate": 2}}},
    module="descentlab.studies.compression.program",
    report="descentlab.studies.compression.report:build",
)
