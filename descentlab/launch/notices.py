"""What a user would not guess from the settings, said before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def notices(cells: Iterable[Any]) -> list[str]:
    """Lines for the user about ``cells``."""
    cells = list(cells)
    return one_by_one(cells) + measured_time(cells)


def measured_time(cells: Iterable[Any]) -> list[str]:
    """A line where a computing time is set for workers that take the time they take."""
    set_s = {
        cell.cost.compute_s
        for cell in cells
        if hasattr(cell, "cost") and getattr(cell.engine, "name", cell.engine) == "process" and cell.cost.compute_s
    }
    return [
        f"cost.compute_s = {seconds:g} is for the virtual clock; real processes compute as long as they need"
        for seconds in sorted(set_s)
    ]


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
