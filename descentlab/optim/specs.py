"""Settings of optimizers and learning-rate schedules. Hyper-parameters carry torch's names and defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..core.errors import UserError
from ..core.specs import External, Option, Registry

Fraction = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Fraction, Fraction]
ZOO = "zoo"  # zoo:NAME is a class of the pytorch_optimizer package


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

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Sgd:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov = True: expected false, or a momentum above 0 with dampening 0")
        return self


class Adam(TorchOption):
    """Adam (arXiv 1412.6980)."""

    name: Literal["adam"] = "adam"
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    amsgrad: bool = False


class AmsGrad(TorchOption):
    """AMSGrad (arXiv 1904.09237): Adam that divides by the largest second moment so far."""

    name: Literal["amsgrad"] = "amsgrad"
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0

    def build(self) -> Any:
        from .stacked import torch_rule

        return torch_rule("adam", {**self.model_dump(exclude={"name"}), "amsgrad": True})


class AdamW(TorchOption):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-2
    amsgrad: bool = False


class NAdam(TorchOption):
    """Adam with Nesterov momentum (Dozat, ICLR workshop 2016)."""

    name: Literal["nadam"] = "nadam"
    lr: PositiveFloat = 2e-3
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    momentum_decay: NonNegativeFloat = 4e-3
    decoupled_weight_decay: bool = False


class RmsProp(TorchOption):
    """RMSprop (Hinton's lecture 6e)."""

    name: Literal["rmsprop"] = "rmsprop"
    lr: PositiveFloat = 1e-2
    alpha: float = Field(0.99, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    momentum: float = Field(0.0, ge=0, lt=1)
    centered: bool = False


class AdaGrad(TorchOption):
    """Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011)."""

    name: Literal["adagrad"] = "adagrad"
    lr: PositiveFloat = 1e-2
    lr_decay: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0
    initial_accumulator_value: NonNegativeFloat = 0.0
    eps: PositiveFloat = 1e-10


class AdaDelta(TorchOption):
    """Adadelta (arXiv 1212.5701)."""

    name: Literal["adadelta"] = "adadelta"
    lr: PositiveFloat = 1.0
    rho: float = Field(0.9, ge=0, lt=1)
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.0


class ExternalOptimizer(External):
    """A ``torch.optim.Optimizer`` subclass given as ``module:Class``; ``options`` are its further arguments.

    ``zoo:NAME`` is a class of the ``pytorch_optimizer`` package (the ``zoo`` extra), found whatever its case.
    """

    lr: PositiveFloat = 1e-3

    @model_validator(mode="after")
    def _zoo_is_installed(self) -> ExternalOptimizer:
        if self.name.partition(":")[0] == ZOO and find_spec("pytorch_optimizer") is None:
            raise ValueError(f"name = '{self.name}': expected the zoo extra: pip install 'descentlab[zoo]'")
        return self

    def load(self) -> Any:
        package, _, name = self.name.partition(":")
        if package != ZOO:
            return super().load()
        from .zoo import find

        return find(name)

    def build(self) -> Any:
        from .stacked import external_rule

        return external_rule(self.name, self.load(), {"lr": self.lr, **self.options})


class NoBaseline(Option):
    """No other optimizer trains first."""

    name: Literal["none"] = "none"


WHOLE = "optimizer steps it is spread over; null = the whole run, in the training study"


def _known(steps: int | None) -> int:
    """The length of a schedule, which must be known when it is built."""
    if steps is None:
        raise UserError("schedule.steps", None, "a number of steps; only the training study fills in its own length")
    return steps


class Schedule(Option):
    """A learning rate as a function of the optimizer steps made so far: t = 0 at the first update.

    ``warmup_steps`` = W multiplies every rate by min(1, (t + 1) / W).
    """

    warmup_steps: NonNegativeInt = 0

    def rate(self) -> Any:
        """The schedule without its warm-up."""
        raise TypeError(f"{type(self).__name__} has no rate()")  # a programmer's mistake, not a user's

    def build(self) -> Any:
        from .schedules import warmed

        return warmed(self.rate(), self.warmup_steps)

    def over(self, steps: int) -> Schedule:
        """The same over a whole run of so many steps, where it leaves its length open."""
        return self.model_copy(update={"steps": steps}) if getattr(self, "steps", 0) is None else self


class Constant(Schedule):
    """The learning rate stays as given."""

    name: Literal["constant"] = "constant"

    def rate(self) -> Any:
        from .schedules import constant

        return constant


class Linear(Schedule):
    """Linear from the optimizer's ``lr`` to ``end`` over ``steps`` optimizer steps, then ``end``."""

    name: Literal["linear"] = "linear"
    end: float = Field(0.0, ge=0)
    steps: PositiveInt | None = Field(1000, description=WHOLE)

    def rate(self) -> Any:
        from .schedules import linear

        return linear(self.end, _known(self.steps))


class Poly(Schedule):
    """lr (1 + t)^-power; also spelled ``poly_POWER``."""

    name: Literal["poly"] = "poly"
    power: NonNegativeFloat = 0.5

    def rate(self) -> Any:
        from .schedules import poly

        return poly(self.power)


class Step(Schedule):
    """Times ``factor`` at each drop; ``drops``, ``parts`` or ``every`` says when.

    ``drops`` = N cuts ``steps`` into N + 1 equal parts (also spelled ``step_N_FACTOR``; N = 2 when nothing is said),
    ``parts`` = [a, b, c] into parts in that proportion (also ``step_A,B,C_FACTOR``); ``every`` drops every that many
    steps, without end.
    """

    name: Literal["step"] = "step"
    factor: PositiveFloat = 0.1
    steps: PositiveInt | None = Field(1000, description=WHOLE)
    drops: PositiveInt | None = None
    parts: tuple[PositiveFloat, ...] | None = Field(None, min_length=2)
    every: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_spelling(self) -> Step:
        given = [key for key in ("drops", "parts", "every") if getattr(self, key) is not None]
        if len(given) > 1:
            value = getattr(self, given[1])
            raise ValueError(f"{given[1]} = {value}: expected only one of drops, parts and every; {given[0]} is given")
        return self

    def rate(self) -> Any:
        from .schedules import every, multistep, parts_milestones

        if self.every is not None:
            return every(self.every, self.factor)
        parts = self.parts if self.parts is not None else (1,) * ((self.drops or 2) + 1)
        return multistep(parts_milestones(parts, _known(self.steps)), self.factor)


class MultiStep(Schedule):
    """Times ``factor`` at each of the optimizer steps ``milestones``."""

    name: Literal["multistep"] = "multistep"
    milestones: tuple[PositiveInt, ...] = (500, 750)
    factor: PositiveFloat = 0.1

    def rate(self) -> Any:
        from .schedules import multistep

        return multistep(sorted(self.milestones), self.factor)


class Exponential(Schedule):
    """lr factor^t."""

    name: Literal["exponential"] = "exponential"
    factor: PositiveFloat = 0.999

    def rate(self) -> Any:
        from .schedules import exponential

        return exponential(self.factor)


class Cosine(Schedule):
    """Half a cosine from the optimizer's ``lr`` to ``end`` over ``steps`` optimizer steps, then ``end``."""

    name: Literal["cosine"] = "cosine"
    end: float = Field(0.0, ge=0)
    steps: PositiveInt | None = Field(1000, description=WHOLE)

    def rate(self) -> Any:
        from .schedules import cosine

        return cosine(self.end, _known(self.steps))


_NUMBER = r"(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)"
# (pattern, the settings its groups are)
_SPELLINGS = (
    (re.compile(rf"^poly_({_NUMBER})$"), ("power",)),
    (re.compile(rf"^step_(\d+)_({_NUMBER})$"), ("drops", "factor")),
    (re.compile(rf"^step_({_NUMBER}(?:,{_NUMBER})+)_({_NUMBER})$"), ("parts", "factor")),
)


class Spelled(Registry):
    """Options that may be written as a name with numbers in it: ``poly_0.5`` for ``{name: poly, power: 0.5}``.

    ``spellings``: patterns, and the settings their groups are (``parts`` is a list).
    """

    spellings: Sequence[tuple[re.Pattern[str], tuple[str, ...]]] = ()

    def spelled(self, name: str) -> dict[str, Any] | None:
        """The block that a name with numbers in it stands for; None for any other name."""
        for pattern, keys in self.spellings:
            match = pattern.match(name)
            if match:
                given = dict(zip(keys, match.groups(), strict=True))
                parsed = {k: [float(p) for p in v.split(",")] if k == "parts" else float(v) for k, v in given.items()}
                return {"name": name.partition("_")[0], **parsed}
        return None

    def lookup(self, name: str) -> type[Option]:
        block = self.spelled(name)
        return super().lookup(block["name"] if block else name)

    def parse(self, value: Any) -> Option:
        block = {"name": value} if isinstance(value, str) else value
        if isinstance(block, Mapping) and isinstance(block.get("name"), str):
            spelled = self.spelled(block["name"])
            if spelled:
                return super().parse({**spelled, **{k: v for k, v in block.items() if k != "name"}})
        return super().parse(value)


class Schedules(Spelled):
    """The schedules; ``poly_0.5``, ``step_3_0.1`` and ``step_2,1,1_0.1`` are read as a name with settings."""

    spellings = _SPELLINGS


ONLY = "test_loss and test_accuracy are those of the average, the last weights are not evaluated"


class NoAverage(Option):
    """No averaged weights."""

    name: Literal["none"] = "none"

    def build(self) -> Any:
        return None


class PolyAverage(Option):
    """Polynomial decay (arXiv 1212.1824): the t-th weights count (eta + 1) / (eta + t); eta = 0 is the plain mean.

    Also spelled ``poly_ETA``.
    """

    name: Literal["poly"] = "poly"
    eta: NonNegativeFloat = 0.0
    only: bool = Field(False, description=ONLY)

    def build(self) -> Any:
        from .averaging import Average, poly

        return Average(poly(self.eta))


class EmaAverage(Option):
    """Exponential: decay times the old average plus 1 - decay times the new weights, from the initial weights on.

    Also spelled ``ema_DECAY``.
    """

    name: Literal["ema"] = "ema"
    decay: Fraction = 0.999
    only: bool = Field(False, description=ONLY)

    def build(self) -> Any:
        from .averaging import Average, ema

        return Average(ema(self.decay))


class Averages(Spelled):
    """The averages of weights; ``poly_8`` and ``ema_0.999`` are read as a name with its number."""

    spellings = ((re.compile(rf"^poly_({_NUMBER})$"), ("eta",)), (re.compile(rf"^ema_({_NUMBER})$"), ("decay",)))


OPTIMIZERS = Registry(
    "optimizer", Sgd, Adam, AmsGrad, AdamW, NAdam, RmsProp, AdaGrad, AdaDelta, external=ExternalOptimizer
)
BASELINES = Registry("baseline", NoBaseline, *OPTIMIZERS.options.values(), external=ExternalOptimizer)
SCHEDULES = Schedules("schedule", Constant, Linear, Poly, Step, MultiStep, Exponential, Cosine)
Optimizer = OPTIMIZERS.field()
Baseline = BASELINES.field()
LrSchedule = SCHEDULES.field()
AVERAGES = Averages("averaging", NoAverage, PolyAverage, EmaAverage)
Averaging = AVERAGES.field()
