"""Which optimizers cannot step a whole ensemble at once, said before it costs time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def one_by_one(cells: Iterable[Any]) -> list[str]:
    """A line per optimizer that mixes what it is given together (LARS, Muon), so that members step one by one.

    Same result as any run alone, at the price of one optimizer call per member and update.
    """
    from ..optim.stacked import StackedOptimizer

    names: dict[str, Any] = {}
    for cell in cells:
        option = getattr(cell, "optimizer", None)
        if option is not None:
            names.setdefault(option.name, option)
    return [
        f"optimizer {name} mixes the members of an ensemble, so each member is stepped on its own (exact, but slower)"
        for name, option in names.items()
        if StackedOptimizer(option.build()).separate
    ]
