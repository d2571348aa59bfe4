"""How a dataset that is published in two parts becomes three that never overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...core.errors import UserError
from ..base import Data
from .sources import Source


@dataclass(frozen=True)
class Sizes:
    """Numbers of samples; None = all there are."""

    train: int | None
    validation: int
    test: int | None


def cut(name: str, parts: Sequence[tuple[Tensor, Tensor]], sizes: Sizes) -> tuple[list[Tensor], list[Tensor]]:
    """``parts``: (inputs, targets) as published for training and for testing. [train, validation, test] of each.

    Training takes the first samples of the published training part, validation its last, testing the first of the
    published test part.

    Raises:
        UserError: when more is asked for than there is.
    """
    (x, y), (x_test, y_test) = parts
    left = held_out(name, len(x), sizes.validation)
    train = left if sizes.train is None else sizes.train
    test = len(x_test) if sizes.test is None else sizes.test
    if train > left:
        raise UserError(
            "dataset.train", train, f"at most {left} of '{name}': {len(x)} less {sizes.validation} held out"
        )
    if test > len(x_test):
        raise UserError("dataset.test", test, f"at most the {len(x_test)} test samples of '{name}'")
    return [x[:train], x[left:], x_test[:test]], [y[:train], y[left:], y_test[:test]]


def held_out(name: str, n: int, validation: int) -> int:
    """How many of ``n`` training samples are left to train on; UserError for none."""
    if n - validation < 1:
        raise UserError("dataset.validation", validation, f"fewer than the {n} training samples of '{name}'")
    return n - validation


def assemble(source: Source, x: Sequence[Tensor], y: Sequence[Tensor], classes: int) -> Data:
    """The dataset of the three parts of ``x`` and ``y`` as :func:`cut` gives them."""
    return Data(
        source.name, x[0], y[0], x[1], y[1], x[2], y[2],
        classes=classes, source=source.source, licence=source.licence,
    )  # fmt: skip
