"""The settings every study shares, and what a study declares about itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from ..core.errors import UserError
from ..core.specs import Spec, extent
from ..observe.specs import Observe
from ..optim.specs import Adam, Constant, LrSchedule, Optimizer
from ..workloads.specs import Dataset, Mlp, Mnist5k, Model, Sampler, Shuffle


class StudySpec(Spec):
    """One cell of a study's grid: everything that is fixed but the replicate."""

    study: str
    seed: NonNegativeInt = 0
    size: Literal["quick", "small", "default", "medium", "full", "large"] = extent("default")
    device: str = extent(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description="one of auto, cpu, cuda, cuda:N, mps"
    )
    processes: NonNegativeInt = extent(0, description="worker processes; 0 = one per core")
    members_per_block: NonNegativeInt = extent(0, description="models trained together at most; 0 = the stated rule")
    checkpoint_s: PositiveFloat = extent(20.0, description="seconds of work a kill can cost at most")
    notify: str = extent("", description="a shell command, or an http(s) URL, told when the study has ended")
    deterministic: bool = Field(False, description="refuse operations whose result can differ between executions")
    dtype: Literal["float32", "float64"] = "float32"
    dataset: Dataset = Mnist5k()
    model: Model = Mlp()
    optimizer: Optimizer = Adam()
    schedule: LrSchedule = Constant()
    batch_size: PositiveInt = 64
    sampler: Sampler = Shuffle()
    observe: Observe = Observe()

    def identity(self) -> dict[str, Any]:
        """As for every block; ``sampler`` is left out at its default, as in the ids of runs made before it existed."""
        out = super().identity()
        if self.sampler == Shuffle():
            del out["sampler"]
        return out

    def identity_of(self, role: str) -> dict[str, Any]:
        """The settings that can change the result of a run in this role: all of them, unless a study of several stages
        says which stage reads what."""
        return self.identity()

    def check_given(self) -> None:
        """Refuse settings that were given although another one makes them meaningless; UserError."""
        if self.sampler.name == "full" and "batch_size" in self.model_fields_set:
            raise UserError(
                "batch_size", self.batch_size, "no batch_size beside sampler = full, which takes all samples"
            )
        if getattr(self.schedule, "steps", 0) is None and not hasattr(self, "length"):
            raise UserError("schedule.steps", None, "a number; only the training study fills in its own length")
        rooms = [room for room in ("fault", "arm") if getattr(getattr(self, room, None), "name", "none") != "none"]
        if self.observe.reduce != "none" and rooms:
            expected = f"none beside {rooms[0]} = {getattr(self, rooms[0]).name}: its effect is measured run by run"
            raise UserError("observe.reduce", self.observe.reduce, expected)


@dataclass(frozen=True)
class Run:
    """One configuration, one replicate, one role: the unit of identity, storage and resume."""

    id: str
    cell: int  # index into the resolved study's cells
    replicate: int
    role: str  # "fault" | "twin" | "plain"
    labels: dict[str, Any] = field(default_factory=dict)  # further config columns of the table


@dataclass(frozen=True)
class StudyDef:
    """What a study declares: settings, presets, sizes, per-option defaults and default grid; all plain data.

    ``presets[p]`` and ``sizes[s]`` are nested settings (they may hold a ``grid``: key path -> list of values).
    ``options["optimizer"]["adam"]`` are the defaults that ``optimizer=adam`` means *in this study*; a preset may
    carry its own ``options`` under the same key. ``module`` names the module with ``engine``, ``horizon`` and
    ``stages``; it is imported only when something runs.
    """

    name: str
    question: str
    spec: type[StudySpec]
    presets: dict[str, dict[str, Any]]
    sizes: dict[str, dict[str, Any]]
    # cells -> (cell index, replicate, role, labels) of each run
    plan: Callable[[Sequence[Any]], list[tuple[int, int, str, dict[str, Any]]]]
    check: Callable[[Any], None] = lambda cell: None  # cross-field checks of one cell; raises UserError
    expand: Callable[[Any], list[Any]] = lambda cell: [cell]  # the cells that one point of the grid stands for
    options: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    module: str = ""
    report: str = ""  # "package.module:function" taking store.Results, returning report.Report
