"""Settings of what is measured and when."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from ..core.specs import Spec


class Observe(Spec):
    """Which observables are recorded; ``evaluate_every`` counts steps, 0 = only at the end."""

    every: PositiveInt = Field(1, description="steps between rows of the per-step observables")
    evaluate_every: int = Field(10, ge=0, description="steps between evaluations on the test set")
