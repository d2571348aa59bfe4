"""Settings of optimizers and learning-rate schedules. Hyper-parameters carry torch's names and defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ..core.specs import External, Option, Registry

Unit = Field(ge=0, lt=1)


class TorchOption(Option):
    """An optimizer of ``torch.optim``; every field but ``name`` is passed to its constructor."""

    lr: PositiveFloat = 1e-3

    def build(self) -> Any:
        from .stacked import torch_rule

        return torch_rule(self.name, self.model_dump(exclude={"name"}))


class Sgd(TorchOption):
    """SGD, with heavy-ball or Nesterov momentum."""

    name: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 1e-2
    momentum: float = Field(0.0, ge=0, lt=1)
    dampening: float = Field(0.0, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.0
    nesterov: bool = False


class Adam(TorchOption):
    """Adam (arXiv 1412.6980)."""

    name: Literal["adam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    amsgrad: bool = False


class AdamW(TorchOption):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-2
    amsgrad: bool = False


class RmsProp(TorchOption):
    """RMSprop (Hinton's lecture 6e)."""

    name: Literal["rmsprop"] = "rmsprop"
    lr: PositiveFloat = 1e-2
    alpha: float = Field(0.99, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    momentum: float = Field(0.0, ge=0, lt=1)
    centered: bool = False


class ExternalOptimizer(External):
    """A ``torch.optim.Optimizer`` subclass given as ``module:Class``; ``options`` are its further arguments."""

    lr: PositiveFloat = 1e-3

    def build(self) -> Any:
        from .stacked import Rule

        return Rule(self.load(), {"lr": self.lr, **self.options})


class Constant(Option):
    """The learning rate stays as given."""

    name: Literal["constant"] = "constant"

    def build(self) -> Any:
        from .schedules import constant

        return constant


class Linear(Option):
    """Linear from the optimizer's ``lr`` to ``end`` over ``steps`` optimizer steps, then ``end``."""

    name: Literal["linear"] = "linear"
    end: float = Field(0.0, ge=0)
    steps: PositiveInt = 1000

    def build(self) -> Any:
        from .schedules import linear

        return linear(self.end, self.steps)


OPTIMIZERS = Registry("optimizer", Sgd, Adam, AdamW, RmsProp, external=ExternalOptimizer)
SCHEDULES = Registry("schedule", Constant, Linear)
Optimizer = OPTIMIZERS.field()
LrSchedule = SCHEDULES.field()
