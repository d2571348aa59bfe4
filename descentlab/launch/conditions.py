"""Builds what goes wrong between workers and what travels, and checks that a third party's class can do its part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..comm.dense import Dense
from ..core.errors import UserError
from ..core.protocols import Compressor, RankPolicy, StalenessRule
from ..core.specs import External

METHODS: dict[str, tuple[str, ...]] = {
    "timeline": ("ticks",),
    "timeline.delay": ("seconds",),
    "staleness_rule": ("adjust",),
    "compressor": ("start", "exchange", "resize"),
    "compressor.policy": ("rank",),
}


@dataclass(frozen=True)
class Conditions:
    """What a cell's settings say about workers; without such settings, nothing goes wrong."""

    compressor: Compressor
    staleness_rule: StalenessRule | None
    rank_policy: RankPolicy | None


def conditions(cell: Any) -> Conditions:
    """Built from a cell of any study.

    Raises:
        UserError: a ``module:Class`` that cannot be made with its options, or lacks a method it has to have.
    """
    made = {path: _made(cell, path) for path in METHODS}
    return Conditions(made["compressor"] or Dense(), made["staleness_rule"], made["compressor.policy"])


def _made(cell: Any, path: str) -> Any:
    option = cell
    for key in path.split("."):
        option = getattr(option, key, None)
    if option is None:
        return None
    if not isinstance(option, External):
        return option.build()
    wanted = " and ".join(METHODS[path])
    try:
        made = option.build()
    except TypeError as error:
        raise UserError(f"{path}.options", option.options, f"arguments of {option.name} ({error})") from None
    if not all(callable(getattr(made, name, None)) for name in METHODS[path]):
        raise UserError(path, option.name, f"a class with {wanted}")
    return made
