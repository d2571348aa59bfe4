"""Settings of the asynchrony study: workers that wait for each other or not, with data of their own or shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from ...cluster.specs import (
    Asynchronous,
    Cost,
    DelayChoice,
    GaussianDelayLaw,
    NoStalenessRule,
    StalenessRuleChoice,
    TimelineChoice,
)
from ...comm.specs import CompressorChoice, NoCompression
from ...config.tree import StudyDef, StudySpec
from ...core.errors import UserError
from ...core.specs import extent
from ...engine.specs import EngineChoice, VirtualEngine
from ...optim.specs import Optimizer, Sgd
from ...workloads.partition_specs import PartitionChoice, SharedPartition
from ..training.spec import Part, Splits
from .names import conditions
from .presets import PRESETS, SIZES, TUNED

BUDGETS = ("steps", "samples", "epochs", "time_s")


class AsynchronySpec(StudySpec):
    """W workers and a server on a virtual clock, or as real processes."""

    study: str = "asynchrony"
    engine: EngineChoice = VirtualEngine()
    workers: PositiveInt = Field(5, description="workers beside the server; 1 = the single-process baseline")
    timeline: TimelineChoice = Asynchronous()
    delay: DelayChoice = GaussianDelayLaw()
    cost: Cost = Cost()
    partition: PartitionChoice = SharedPartition()
    staleness_rule: StalenessRuleChoice = NoStalenessRule()
    compressor: CompressorChoice = NoCompression()
    worker_momentum: float = Field(0.0, ge=0.0, lt=1.0, description="momentum of every worker's own velocity; 0 = none")
    local_steps: PositiveInt = Field(1, description="updates a worker makes of its own copy before it sends")
    local_lr: PositiveFloat | None = Field(None, description="their learning rate, with local_steps above 1")
    steps: PositiveInt = Field(600, description="server updates of a run")
    samples: PositiveInt | None = Field(None, description="samples all workers see together; given instead of steps")
    epochs: PositiveFloat | None = Field(None, description="the same in passes over the training set")
    time_s: PositiveFloat | None = Field(None, description="virtual seconds; given instead of steps")
    replicates: PositiveInt = extent(10)
    optimizer: Optimizer = Sgd(lr=0.05, momentum=0.9)
    batch_size: PositiveInt = 32
    splits: Splits = Splits()
    evaluate_on: list[Part] = Field(["train", "validation", "test"], description="sets to evaluate on, test among them")

    def identity(self) -> dict[str, Any]:
        """As for every block; ``engine`` is left out at its default."""
        out = super().identity()
        if self.engine == VirtualEngine():
            del out["engine"]
        return out

    @property
    def seeds(self) -> range:
        """Replicates of a cell."""
        return range(self.replicates)


def plan(cells: Sequence[AsynchronySpec]) -> list[tuple[int, int, str, dict[str, Any]]]:
    """One run per cell and replicate; the label ``condition`` says in short what the cell is."""
    names = conditions([cell.model_dump(mode="json") for cell in cells])
    return [
        (index, replicate, "plain", {"condition": names[index]})
        for index, cell in enumerate(cells)
        for replicate in cell.seeds
    ]


def check(cell: AsynchronySpec) -> None:
    """Settings that contradict each other; UserError."""
    given = [key for key in BUDGETS if key in cell.model_fields_set and getattr(cell, key) is not None]
    if len(given) > 1:
        expected = f"only one of {', '.join(BUDGETS)}; {given[0]} is given"
        raise UserError(given[1], getattr(cell, given[1]), expected)
    _check_timeline(cell)
    if cell.engine.name == "process":
        _check_process(cell)
    if cell.partition.name != "shared" and cell.sampler.name != "shuffle":
        raise UserError("partition", cell.partition.name, f"shared beside sampler = {cell.sampler.name}")
    if cell.local_steps > 1 and cell.local_lr is None:
        raise UserError("local_lr", None, f"a learning rate for local_steps = {cell.local_steps}")
    if cell.local_steps == 1 and cell.local_lr is not None:
        raise UserError("local_lr", cell.local_lr, "null beside local_steps = 1")
    if "test" not in cell.evaluate_on:
        raise UserError("evaluate_on", cell.evaluate_on, "a list with test, which reports are about")


def _check_timeline(cell: AsynchronySpec) -> None:
    timeline = cell.timeline
    if timeline.name == "round_robin":
        raise UserError("timeline", "round_robin", "asynchronous, which takes turns where all delays are equal")
    for key in ("delay", "delay_s"):
        if key in timeline.model_fields_set:
            raise UserError(f"timeline.{key}", getattr(timeline, key), "delay, which holds for every timeline here")
    backup, splits = getattr(timeline, "backup", 0), getattr(timeline, "splits", 1)
    if backup >= cell.workers:
        raise UserError("timeline.backup", backup, f"fewer than workers = {cell.workers}")
    if splits > cell.workers:
        raise UserError("timeline.splits", splits, f"at most workers = {cell.workers}")


def _check_process(cell: AsynchronySpec) -> None:
    """What only a virtual clock has."""
    links = [key for key in ("latency_s", "bytes_per_s", "shared_link", "message_bytes") if getattr(cell.cost, key)]
    if links:
        raise UserError(f"cost.{links[0]}", getattr(cell.cost, links[0]), "nothing: real processes have a real link")
    if cell.time_s is not None:
        raise UserError("time_s", cell.time_s, "steps, samples or epochs: how long real processes take is found out")
    if cell.worker_momentum:
        raise UserError("worker_momentum", cell.worker_momentum, "0: a worker process keeps no velocity")


STUDY = StudyDef(
    name="asynchrony",
    question="What do delays, the partition of the data and momentum do to training on workers that do not wait?",
    spec=AsynchronySpec,
    presets=PRESETS,
    sizes=SIZES,
    plan=plan,
    check=check,
    options={"optimizer": TUNED},
    module="descentlab.studies.asynchrony.program",
    report="descentlab.studies.asynchrony.report:build",
)
