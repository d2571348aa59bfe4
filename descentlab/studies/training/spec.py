"""Settings of the training study: one configuration, several replicates, no perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, PositiveInt

from ...config.tree import StudyDef, StudySpec
from ...core.errors import UserError
from ...core.specs import extent


class TrainingSpec(StudySpec):
    """A cell is one configuration; replicates differ in initial weights and batches."""

    study: str = "training"
    epochs: PositiveInt = Field(5, description="passes over the training set, in the sampler's sense")
    steps: PositiveInt | None = Field(None, description="updates; given instead of epochs")
    replicates: PositiveInt = extent(10)


def plan(cells: Sequence[TrainingSpec]) -> list[tuple[int, int, str, dict[str, Any]]]:
    """One run per cell and replicate."""
    return [(index, replicate, "plain", {}) for index, cell in enumerate(cells) for replicate in range(cell.replicates)]


def check(cell: TrainingSpec) -> None:
    if cell.steps is not None and "epochs" in cell.model_fields_set:
        raise UserError("steps", cell.steps, f"steps or epochs, not both; epochs = {cell.epochs} is given")


TUNED: dict[str, dict[str, Any]] = {"sgd": {"lr": 0.5}, "adam": {"lr": 1e-2}, "adamw": {"lr": 1e-2}}

STUDY = StudyDef(
    name="training",
    question="How does this configuration train, and how much does it vary between seeds?",
    spec=TrainingSpec,
    presets={"default": {"optimizer": {"name": "adam", "lr": 1e-2}, "options": {"optimizer": TUNED}}},
    sizes={"quick": {"replicates": 3}, "default": {}, "full": {"replicates": 40}},
    plan=plan,
    check=check,
    options={"optimizer": TUNED},
    module="descentlab.studies.training.program",
    report="descentlab.studies.training.report:build",
)
