"""Settings of what is measured and when."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from ..core.specs import Spec, extent


class Observe(Spec):
    """Which observables are recorded; ``evaluate_every`` counts steps, 0 = only at the end."""

    every: PositiveInt = Field(1, description="steps between rows of the per-step observables")
    evaluate_every: int = Field(10, ge=0, description="steps between evaluations on the test set")
    extra: list[str] = Field(
        default_factory=list, description="further observables: names from list observables, or module:Class"
    )
    hit_artifacts: bool = extent(
        False, description="store weights, buffers and batch of every hit, so that it can be replayed elsewhere"
    )
    snapshots_every: int = extent(
        0, ge=0, description="steps between stored weights of every run, for landscape; 0 = none"
    )
    reduce: Literal["none", "moments"] = Field(
        "none", description="moments: statistics over the runs of a cell instead of rows, and each run's last row"
    )
    weights: Literal["none", "variance", "covariance"] = Field(
        "none", description="spread of the weights over the runs of a cell, elementwise or as a matrix"
    )
    weights_every: PositiveInt = Field(100, description="steps between looks at the weights")
    coordinates: list[NonNegativeInt] = Field(
        default_factory=list, description="which of the flattened weights observe.weights looks at; empty = all"
    )

    @model_validator(mode="after")
    def _weights_are_seen_when_rows_are(self) -> Observe:
        if self.weights != "none" and self.weights_every % self.every:
            raise ValueError(f"weights_every = {self.weights_every}: expected a multiple of every = {self.every}")
        return self


# What each column of the table holds. Those of the first group are recorded every ``observe.every`` steps, on the batch
# of that step; those of the second every ``observe.evaluate_every`` steps, at the weights after the update.
PER_STEP = {
    "train_loss": "loss of the step's batch at the weights before the update, in nats",
    "train_accuracy": "accuracy on the step's batch at the weights before the update, 0 to 1",
    "lr": "learning rate used",
    "grad_norm": "Euclidean norm of the gradient that was applied",
    "update_norm": "Euclidean norm of weights after minus weights before",
    "slot_max": "largest absolute element of any optimizer slot after the update; null without slots",
    "bn_var_max": "largest running variance of any BatchNorm layer after the update; null without BatchNorm",
    "nonfinite_grads": "number of NaN or infinite elements of the gradient",
    "nonfinite_params": "number of NaN or infinite weights after the update",
    "staleness": "updates since the contributing workers read the weights, in the mean; with workers only",
    "weight_gap": "norm of the weights before the update minus those that were read, in the mean; likewise",
    "worker": "the contributing worker, -1 where there are several; likewise",
}
# Observables that ``observe.extra`` knows by name: where they are, and what they give.
EXTRA = {
    "corruption": (
        "descentlab.observe.corruption:Corruption",
        "share of each weight and gradient that is not finite or beyond 1e6, columns corrupt_weights/NAME and so on",
    ),
    "weight_norm": (
        "descentlab.observe.training:WeightNorm",
        "Euclidean norm of all weights after the update",
    ),
    "per_class_accuracy": (
        "descentlab.observe.training:PerClassAccuracy",
        "accuracy on the test samples of each class, columns test_accuracy_class_0 and so on",
    ),
    "class_report": (
        "descentlab.observe.classes:ClassReport",
        "the same with test_precision_class_0 and so on and test_support_class_0, the samples of each class",
    ),
}
EVALUATED = {
    "test_loss": "loss on the test set at the weights after the update, in nats",
    "test_accuracy": "accuracy on the test set at the weights after the update, 0 to 1",
}
