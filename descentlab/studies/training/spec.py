"""Settings of the training study: one configuration, several replicates, no perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ...config.tree import StudyDef, StudySpec
from ...core.errors import UserError
from ...core.slices import check_splits
from ...core.specs import Spec, extent
from ...optim.specs import Averaging, NoAverage

Part = Literal["train", "validation", "test"]
FOLD_METRIC = "validation_loss"  # what a comparison over folds goes by


class Splits(Spec):
    """What each part is made of: slices of the published parts, such as ``train[:90%]`` or ``train[90%:]+test``."""

    train: str = "train"
    validation: str = "validation"
    test: str = "test"

    @model_validator(mode="after")
    def _are_slices(self) -> Splits:
        for key, value in self.model_dump().items():
            try:
                check_splits([value])
            except ValueError as error:
                raise ValueError(f"{key} = {error}") from None
        return self


class TrainingSpec(StudySpec):
    """A cell is one configuration; replicates differ in initial weights and batches."""

    study: str = "training"
    engine: Literal["lockstep", "process"] = Field(
        "lockstep", description="workers in one process, or a process each under torchrun (DDP)"
    )
    workers: PositiveInt = Field(1, description="that share every update, each with batches of its own")
    restarts: int = extent(3, ge=0, description="times torchrun starts lost processes again")
    epochs: PositiveInt = Field(5, description="passes over the training set, in the sampler's sense")
    steps: PositiveInt | None = Field(None, description="updates; given instead of epochs")
    samples: PositiveInt | None = Field(None, description="samples seen; given instead of epochs")
    replicates: PositiveInt = extent(10)
    splits: Splits = Splits()
    folds: int | None = Field(
        None, ge=2, description="parts of the training set, each validated on by a run of its own"
    )
    fold: NonNegativeInt | None = Field(None, description="the one of the folds to validate on; null = each in turn")
    steps_per_epoch: PositiveInt | None = Field(None, description="updates that count as an epoch; null = a data pass")
    samples_per_epoch: PositiveInt | None = Field(None, description="samples that count as an epoch, likewise")
    evaluate_epochs: PositiveInt | None = Field(
        None, description="epochs between evaluations, in place of observe.evaluate_every"
    )
    evaluate_on: list[Part] = Field(["test"], description="sets to evaluate on, test among them")
    accumulation: PositiveInt = Field(1, description="micro-batches one batch is cut into; divides batch_size")
    clip_norm: PositiveFloat | None = Field(None, description="longest gradient, longer ones are scaled; null = any")
    bias_decay: NonNegativeFloat | None = Field(
        None, description="weight decay of parameters with bias in their name; null = that of all others"
    )
    averaging: Averaging = NoAverage()
    amp: Literal["none", "bfloat16"] = Field("none", description="autocast of the forward pass in training steps")
    compile: Literal["none", "inductor", "eager"] = Field("none", description="torch.compile backend of the same")
    head_init: Literal["model", "zero"] = Field("model", description="weights of the last layer: the model's own, or 0")
    seed_model: NonNegativeInt | None = Field(None, description="seed of the initial weights; null = seed")
    loss: Literal["auto", "square"] = Field(
        "auto", description="cross-entropy for classes and half the squared distance else, or that for both"
    )
    max_loss: PositiveFloat | None = Field(
        None, description="a run with a loss above it, or NaN, ends as diverged; null = runs go on"
    )
    patience: PositiveInt | None = Field(None, description="evaluations without improvement of watch that end a run")
    best_checkpoint: bool = Field(False, description="keep the weights of the best evaluation of watch")
    watch: str = Field("test_accuracy", description="the column patience and best_checkpoint go by")
    direction: Literal["auto", "max", "min"] = Field("auto", description="which values of watch are better")

    def identity(self) -> dict[str, Any]:
        """As for every study; blocks added later are left out at their defaults, as in the ids of earlier runs."""
        out = super().identity()
        for key, default in (("splits", Splits()), ("averaging", NoAverage())):
            if getattr(self, key) == default:
                del out[key]
        return out

    @property
    def distributed(self) -> bool:
        """Whether processes train, not virtual workers."""
        return self.engine == "process"

    def updates(self, epochs: int, batches: int) -> int:
        """Updates of so many epochs of so many batches: every worker takes one batch of an update."""
        return -(-epochs * batches // self.workers)

    def length(self, batches: int) -> int:
        """Updates of a whole run, whose epochs have so many batches."""
        if self.samples is not None:
            return self.samples // (self.batch_size * self.workers)
        return self.steps or self.updates(self.epochs, batches)

    def better(self) -> Literal["max", "min"]:
        """Which values of ``watch`` are better: by its name, unless said."""
        if self.direction != "auto":
            return self.direction
        return "max" if "accuracy" in self.watch else "min"


def plan(cells: Sequence[TrainingSpec]) -> list[tuple[int, int, str, dict[str, Any]]]:
    """One run per cell and replicate."""
    return [(index, replicate, "plain", {}) for index, cell in enumerate(cells) for replicate in range(cell.replicates)]


def check(cell: TrainingSpec) -> None:
    """Settings that contradict each other; UserError."""
    given = [key for key in ("epochs", "steps", "samples") if key in cell.model_fields_set and getattr(cell, key)]
    if len(given) > 1:
        expected = f"steps or epochs, not both; {given[0]} = {getattr(cell, given[0])} is given"
        raise UserError(given[1], getattr(cell, given[1]), expected)
    each = f" for each of {cell.workers} workers" if cell.workers > 1 else ""
    for key in ("samples", "samples_per_epoch"):
        if getattr(cell, key) is not None and getattr(cell, key) < cell.batch_size * cell.workers:
            raise UserError(key, getattr(cell, key), f"at least one batch of {cell.batch_size}{each}")
    if cell.steps_per_epoch and cell.samples_per_epoch:
        raise UserError("samples_per_epoch", cell.samples_per_epoch, "only one of it and steps_per_epoch")
    if cell.batch_size % cell.accumulation:
        raise UserError("accumulation", cell.accumulation, f"a divisor of batch_size = {cell.batch_size}")
    if cell.amp != "none" and cell.dtype != "float32":
        raise UserError("amp", cell.amp, f"none beside dtype = {cell.dtype}, which autocast leaves alone")
    _check_folds(cell)
    if "test" not in cell.evaluate_on:
        raise UserError("evaluate_on", cell.evaluate_on, "a list with test, which reports are about")
    if cell.bias_decay is not None and not hasattr(cell.optimizer, "weight_decay"):
        raise UserError("bias_decay", cell.bias_decay, f"null beside {cell.optimizer.name}, a third party's class")
    _check_watching(cell)
    _check_processes(cell)


# what one process sees of its own batch, or decides for itself
ALONE = ("accumulation", "amp", "compile", "max_loss", "patience", "best_checkpoint")
ALONE_OBSERVE = ("reduce", "weights", "snapshots_every")


def _check_processes(cell: TrainingSpec) -> None:
    if not cell.distributed:
        return
    held = [(key, cell, key) for key in ALONE] + [(f"observe.{key}", cell.observe, key) for key in ALONE_OBSERVE]
    for path, spec, key in held:
        value, off = getattr(spec, key), type(spec).model_fields[key].default
        if value != off:
            shown = "null" if off is None else str(off).lower()
            raise UserError(path, value, f"{shown} beside engine = process; with engine = lockstep workers have it")


def _check_folds(cell: TrainingSpec) -> None:
    if cell.fold is not None and cell.fold >= (cell.folds or 0):
        raise UserError("fold", cell.fold, f"a number below folds = {cell.folds}" if cell.folds else "folds beside it")
    if cell.folds and cell.splits != Splits():
        raise UserError("folds", cell.folds, "no splits beside it: a fold is the validation set")


def expand(cell: TrainingSpec) -> list[TrainingSpec]:
    """A cell per fold, which evaluates on it; the cell itself without folds."""
    if cell.folds is None:
        return [cell]
    folds = range(cell.folds) if cell.fold is None else [cell.fold]
    evaluate_on = list(dict.fromkeys([*cell.evaluate_on, "validation"]))
    return [cell.model_copy(update={"fold": fold, "evaluate_on": evaluate_on}) for fold in folds]


def _check_watching(cell: TrainingSpec) -> None:
    if not (cell.patience or cell.best_checkpoint):
        return
    names = _evaluated(cell)
    if cell.watch not in names and not cell.observe.extra:
        raise UserError("watch", cell.watch, f"one of {', '.join(names)}")
    if cell.direction == "auto" and not any(word in cell.watch for word in ("accuracy", "loss")):
        raise UserError("direction", "auto", f"max or min: '{cell.watch}' does not say which values are better")
    if cell.observe.reduce != "none":
        raise UserError("observe.reduce", cell.observe.reduce, "none beside patience and best_checkpoint")


def _evaluated(cell: TrainingSpec) -> list[str]:
    """Columns an evaluation gives, and those of the step's batch."""
    only = bool(getattr(cell.averaging, "only", False))
    endings = [""] if cell.averaging.name == "none" or only else ["", "_average"]
    own = [f"{part}_set" if part == "train" else part for part in cell.evaluate_on]
    names = [f"{part}_{what}{end}" for part in own for what in ("loss", "accuracy") for end in endings]
    return [*names, "train_loss", "train_accuracy"]


TUNED: dict[str, dict[str, Any]] = {"sgd": {"lr": 0.5}, "adam": {"lr": 1e-2}, "adamw": {"lr": 1e-2}}

STUDY = StudyDef(
    name="training",
    question="How does this configuration train, and how much does it vary between seeds?",
    spec=TrainingSpec,
    presets={"default": {"optimizer": {"name": "adam", "lr": 1e-2}, "options": {"optimizer": TUNED}}},
    sizes={"quick": {"replicates": 3}, "default": {}, "full": {"replicates": 40}},
    plan=plan,
    check=check,
    expand=expand,
    options={"optimizer": TUNED},
    module="descentlab.studies.training.program",
    report="descentlab.studies.training.report:build",
)
