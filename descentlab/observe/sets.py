"""Evaluations beyond the last weights on the test set: further sets, and averaged weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..core.protocols import Measured, Work
from ..core.state import State


class OnSet:
    """Loss (nats) and accuracy on one set, columns ``NAME_loss`` and ``NAME_accuracy`` with an ``ending``.

    ``at``: which weights, as a function of the state; None = the last ones.
    """

    needs = frozenset({"eval"})

    def __init__(
        self,
        name: str,
        data: tuple[Tensor, Tensor],
        evaluator: Work,
        *,
        at: Callable[[State], State] | None = None,
        ending: str = "",
    ) -> None:
        self.name, self.ending = f"on_{name}{ending}", ending
        self._part, self._data, self._evaluator, self._at = name, data, evaluator, at

    def measure(self, m: Measured) -> dict[str, Tensor]:
        view = m.state if self._at is None else self._at(m.state)
        loss, accuracy = self._evaluator.evaluate(view, *self._data)
        return {f"{self._part}_loss{self.ending}": loss, f"{self._part}_accuracy{self.ending}": accuracy}
