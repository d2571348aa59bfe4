"""Settings of the diffusion study: a reference point, clouds of SGD runs around it, and what is measured there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from ...config.identity import canonical
from ...config.tree import StudyDef, StudySpec
from ...core.errors import UserError
from ...core.specs import Spec, extent
from ...optim.specs import Optimizer, Sgd
from ..training.spec import Splits
from .questions import QUESTIONS
from .setups import presets

Part = Literal[
    "all",
    "sgd",
    "gd",
    "curvature",
    "hessians",
    "sgd_cloud",
    "gd_control",
    "val_loss",
    "score",
    "statistics",
    "language",
]

# stage -> the stages it continues; a stage's key is made of its own settings and of the keys of these
INPUTS: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "gd": ("sgd",),
    "curvature": ("gd",),
    "hessians": ("gd",),
    "sgd_cloud": ("gd", "curvature"),
    "gd_control": ("gd", "curvature"),
    "val_loss": ("sgd_cloud",),
    "score": ("curvature", "sgd_cloud"),
    "statistics": ("curvature", "sgd_cloud"),
    "language": ("sgd", "curvature", "sgd_cloud"),
}
OF_ALL = ("val_loss", "score", "statistics", "language")  # stages that read every run of a cloud
# stage -> the settings it reads; a dotted one is a key of a block
READS: dict[str, tuple[str, ...]] = {
    "sgd": ("dataset", "splits", "model", "dtype", "seed", "batch_size", "scale", "reference.sgd"),
    "gd": ("reference.gd",),
    "curvature": (),
    "hessians": ("optimizer", "sampler", "hessians"),
    "sgd_cloud": ("optimizer", "sampler", "cloud", "observe"),
    "gd_control": ("optimizer", "control", "cloud"),
    "val_loss": (),
    "score": ("theory",),
    "statistics": (),
    "language": (),
}
# stage -> its number, raised when the same settings make something else or in another shape; 1 where not named
SEMANTICS = {"hessians": 2}
POLISHED = {"gd": 2}  # the same where there is a polish
LANGUAGE = ("nanogpt",)  # models that stage language is for


class Descent(Spec):
    """Plain SGD from the initial weights."""

    lr: PositiveFloat = 0.1
    epochs: PositiveInt = Field(2000, description="passes over the training set")
    sampler: Literal["shuffle", "replacement"] = "shuffle"
    evaluations: PositiveInt = Field(100, description="evaluations on the test set, evenly spaced")


class Polish(Spec):
    """Full-batch gradient descent from where SGD ended, and then, if asked for, a method that converges faster."""

    lr: PositiveFloat = 0.1
    steps: NonNegativeInt = Field(3000, description="full-batch updates")
    evaluations: PositiveInt = Field(50, description="evaluations on the test set, evenly spaced")
    polish: Literal["none", "lbfgs", "newton", "both"] = Field(
        "none",
        description="afterwards: L-BFGS goes on downhill; newton goes to the nearest point without gradient; both: one "
        "after the other",
    )
    polish_steps: PositiveInt = Field(200, description="iterations of it at most")
    tolerance: PositiveFloat = Field(1e-6, description="largest gradient norm that still counts as critical")
    localise: NonNegativeFloat = Field(
        0.0,
        description="strength of a pull towards where descent ended, part of the loss from the polish on: with enough "
        "of it there is a minimum next to a point that is not critical",
    )


class Reference(Spec):
    """How theta*, the point all clouds start from, is found."""

    sgd: Descent = Descent()
    gd: Polish = Polish()


class HessianRun(Spec):
    """Runs from theta* along which curvature is measured: the first of the cloud's."""

    runs: PositiveInt = extent(1, description="runs; intervals of eigenvalues are over them")
    steps: PositiveInt = 1000
    every: PositiveInt = Field(20, description="steps between Hessians")
    data: Literal["batch", "full"] = Field("batch", description="of the batch about to be used, or of all data")
    method: Literal["dense", "top_k", "density"] = Field(
        "dense", description="all eigenvalues, the largest k, or nodes and weights of a spectral density"
    )
    k: PositiveInt = Field(10, description="eigenvalues of top_k, and eigenvectors stored by dense")


class Cloud(Spec):
    """The runs from theta*."""

    steps: PositiveInt = Field(1111, description="updates of each run")
    looks: PositiveInt = Field(60, description="moments at which spread and projections are recorded")
    snapshots: list[NonNegativeInt] = Field(
        [], description="steps whose weights are kept, beside half an epoch and end"
    )
    projections: PositiveInt = Field(12, description="directions whose coordinates are kept for every run")
    series: NonNegativeInt = Field(128, description="last updates after each of which these coordinates are kept")
    store: Literal["moments", "weights"] = Field(
        "moments", description="weights: also every weight of every run and step, in a memory-mapped array"
    )


class Control(Spec):
    """Full-batch gradient descent from theta* for as many steps."""

    scaling: Literal["default", "B/N"] = Field("default", description="B/N: learning rate x batch / training samples")

    @field_validator("scaling", mode="before")
    @classmethod
    def _either_spelling(cls, value: Any) -> Any:
        return "B/N" if value == "N/B" else value


class Theory(Spec):
    """How the covariance of a cloud is predicted."""

    closure: Literal["linear", "gaussian"] = Field(
        "gaussian", description="curvature and noise at theta*, or averaged over the predicted cloud as it grows"
    )
    intervals: PositiveInt = Field(4, description="stretches of time with one average each")
    draws: PositiveInt = Field(4, description="mirrored displacements per training sample that noise is averaged over")
    hessians: PositiveInt = Field(2, description="mirrored displacements that the Hessian is averaged over")


class DiffusionSpec(StudySpec):
    """A cell is one cloud: an optimizer with its learning rate and a loader, around one reference point."""

    study: str = "diffusion"
    stage: Part = extent("all", description="only this stage and what it needs")
    runs: PositiveInt = extent(1000, description="runs of each cloud")
    scale: PositiveFloat = Field(1.0, le=1, description="share of samples, epochs, steps and runs: 0.01 to try a setup")
    dtype: Literal["float32", "float64"] = "float64"
    splits: Splits = Splits()
    optimizer: Optimizer = Sgd()
    reference: Reference = Reference()
    hessians: HessianRun = HessianRun()
    cloud: Cloud = Cloud()
    control: Control = Control()
    theory: Theory = Theory()

    def identity_of(self, role: str) -> dict[str, Any]:
        """What a stage and the stages before it read."""
        whole, out = self.identity(), {"study": self.study}
        for stage in (*before(role), role):
            for key in READS[stage]:
                block, _, inner = key.partition(".")
                value = whole.get(block, {}).get(inner, {}) if inner else whole.get(block)
                if value not in (None, {}):
                    out[key] = value
        numbers = self.numbers()
        raised = {stage: numbers[stage] for stage in (*before(role), role) if stage in numbers}
        return {**out, "semantics": raised} if raised else out

    def numbers(self) -> dict[str, int]:
        """Stage -> its ``semantics``, where that is not 1."""
        return SEMANTICS | (POLISHED if self.reference.gd.polish != "none" else {})

    def count(self, n: int, least: int = 1) -> int:
        """``n`` at this cell's scale."""
        return n if self.scale == 1 else max(least, round(n * self.scale))

    def members(self) -> int:
        """Runs of the cloud at this scale."""
        return self.count(self.runs, 4)


def before(stage: str) -> list[str]:
    """All stages that ``stage`` continues, inputs first."""
    found: list[str] = []
    for name in INPUTS[stage]:
        found += [n for n in (*before(name), name) if n not in found]
    return found


def wanted(cell: DiffusionSpec) -> list[str]:
    """The stages to run, inputs first."""
    if cell.stage != "all":
        return [*before(cell.stage), cell.stage]
    return [stage for stage in INPUTS if stage != "language" or cell.model.name in LANGUAGE]


def plan(cells: Sequence[DiffusionSpec]) -> list[tuple[int, int, str, dict[str, Any]]]:
    """One run per stage, and of a cloud one per member; what several cells share is there once. Replicate 0 is the
    reference; members count from 1, and the runs of stage ``hessians`` see the batches of the first members."""
    found: list[tuple[int, int, str, dict[str, Any]]] = []
    seen: set[tuple[str, str, int]] = set()
    for index, cell in enumerate(cells):
        n = cell.members()
        for stage in wanted(cell):
            of_all = stage in OF_ALL
            key = (stage, canonical(cell.identity_of(stage)), n if of_all else 0)
            if key in seen:
                continue
            seen.add(key)
            labels = {"members": n} if of_all else {}
            several = {"sgd_cloud": n, "hessians": cell.hessians.runs}.get(stage)
            replicates = range(1, several + 1) if several else range(1)
            found += [(index, replicate, stage, dict(labels)) for replicate in replicates]
    return found


def check(cell: DiffusionSpec) -> None:
    """Settings that contradict each other; UserError."""
    if cell.sampler.name == "full":
        raise UserError("sampler", "full", "shuffle or replacement; gradient descent is the stage gd_control")
    if cell.stage == "language" and cell.model.name not in LANGUAGE:
        raise UserError("stage", "language", f"another stage for model = {cell.model.name}, or model=nanogpt")
    if cell.schedule.name != "constant":
        raise UserError("schedule", cell.schedule.name, "constant: predictions are for one learning rate")
    own = cell.reference.gd
    if own.localise and own.polish == "none":
        expected = "0 beside reference.gd.polish = none; lbfgs, newton or both go to a critical point of loss and pull"
        raise UserError("reference.gd.localise", own.localise, expected)
    if cell.observe.weights != "none" or cell.observe.extra:
        key = "observe.extra" if cell.observe.extra else "observe.weights"
        raise UserError(key, getattr(cell.observe, key[8:]), "nothing: this study records the weights itself")
    last = cell.count(cell.cloud.steps, 4)
    if cell.cloud.snapshots and max(cell.cloud.snapshots) > last:
        raise UserError("cloud.snapshots", max(cell.cloud.snapshots), f"steps up to cloud.steps = {last}")


DEFAULT: dict[str, Any] = {
    "grid": {"optimizer.lr": [0.01, 0.05], "sampler": ["replacement", "shuffle"]},
    "observe": {"reduce": "moments", "every": 10},
    "hessians": {"runs": 4},
}
QUICK: dict[str, Any] = {
    "grid": {"optimizer.lr": [0.05], "sampler": ["replacement", "shuffle"]},
    "runs": 200,
    "splits": {"train": "train[:640]", "test": "test[:200]"},
    "reference": {"sgd": {"epochs": 40}, "gd": {"steps": 200}},
    "hessians": {"steps": 40, "runs": 1},
    "cloud": {"steps": 105, "looks": 20},
    "theory": {"closure": "linear"},
}

STUDY = StudyDef(
    name="diffusion",
    question="Which cloud do SGD runs from one point form, and does theory predict its spread in every direction?",
    spec=DiffusionSpec,
    presets={"default": DEFAULT, **QUESTIONS, **presets()},
    sizes={"quick": QUICK, "default": {}, "full": {"runs": 10_000}},
    plan=plan,
    check=check,
    options={"optimizer": {"sgd": {"lr": 0.01}}},
    module="descentlab.studies.diffusion.program",
    report="descentlab.studies.diffusion.report:build",
)
