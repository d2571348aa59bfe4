"""Settings of how the training samples are dealt to workers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat

from ..core.specs import Option, Registry


class SharedPartition(Option):
    """Every worker has all training samples, in an order of its own."""

    name: Literal["shared"] = "shared"

    def build(self) -> Any:
        return None


class SamplePartition(Option):
    """The samples, shuffled, in W parts of equal size (to one sample)."""

    name: Literal["sample"] = "sample"

    def build(self) -> Any:
        from .partition import by_sample

        return by_sample


class LabelPartition(Option):
    """The labels, shuffled, dealt in turn; a worker has all samples of its labels, or as many as the poorest worker."""

    name: Literal["label"] = "label"
    truncate: bool = Field(True, description="cut every worker to the size of the smallest, each label in proportion")

    def build(self) -> Any:
        from .partition import ByLabel

        return ByLabel(self.truncate)


class DirichletPartition(Option):
    """Of every label each worker gets a share from a Dirichlet distribution; small alpha = few labels per worker."""

    name: Literal["dirichlet"] = "dirichlet"
    alpha: PositiveFloat = Field(0.5, description="concentration; large = every worker has every label")

    def build(self) -> Any:
        from .partition import Dirichlet

        return Dirichlet(self.alpha)


class QuantityPartition(Option):
    """All labels everywhere, but unequal amounts: sizes fall geometrically from worker 0 to the last."""

    name: Literal["quantity"] = "quantity"
    ratio: float = Field(8.0, ge=1.0, description="size of the largest part over that of the smallest")

    def build(self) -> Any:
        from .partition import Quantity

        return Quantity(self.ratio)


PARTITIONS = Registry(
    "partition", SharedPartition, SamplePartition, LabelPartition, DirichletPartition, QuantityPartition
)
PartitionChoice = PARTITIONS.field()
