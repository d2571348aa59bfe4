"""Builds what goes wrong between workers and what travels, and checks that a third party's class can do its part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..cluster.pace import Pace
from ..comm.dense import Dense
from ..comm.worker_momentum import WorkerMomentum
from ..core.errors import UserError
from ..core.protocols import Compressor, RankPolicy, StalenessRule, Timeline
from ..core.specs import External

METHODS: dict[str, tuple[str, ...]] = {
    "timeline": ("ticks",),
    "timeline.delay": ("seconds",),
    "delay": ("seconds",),
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
    compressor = made["compressor"] or Dense()
    if getattr(cell, "worker_momentum", 0.0):
        compressor = WorkerMomentum(compressor, cell.worker_momentum)
    return Conditions(compressor, made["staleness_rule"], made["compressor.policy"])


def timeline_of(cell: Any, weights_bytes: int) -> Timeline:
    """The timeline of a cell; in a study with a delay and costs of its own, at that pace.

    ``weights_bytes``: the size of a message where the settings name none.
    """
    if not hasattr(cell, "cost") or isinstance(cell.timeline, External):
        return _made(cell, "timeline")
    cost = cell.cost
    size = cost.message_bytes or weights_bytes
    pace = Pace(_made(cell, "delay"), cost.compute_s, cost.latency_s, cost.bytes_per_s, cost.shared_link, size)
    return cell.timeline.paced(pace, cell.workers)


def check_classes(cell: Any) -> None:
    """Whether a third party's classes can be imported, and optimizer, schedule and fault be made: said once, before
    any block is trained."""
    for path in type(cell).model_fields:
        option = getattr(cell, path)
        if isinstance(option, External):
            _named(option.load, path)
            if path in ("optimizer", "schedule", "fault"):
                _made(cell, path)


def _named(make: Callable[[], Any], path: str) -> Any:
    """What ``make`` gives; where a class cannot be imported, the error has the key path of the setting."""
    try:
        return make()
    except UserError as error:
        if error.key != "name":
            raise
        raise UserError(path, error.value, error.expected, hint=error.hint) from None


def _made(cell: Any, path: str) -> Any:
    option = cell
    for key in path.split("."):
        option = getattr(option, key, None)
    if option is None:
        return None
    if not isinstance(option, External):
        return option.build()
    methods = METHODS.get(path, ())
    try:
        made = _named(option.build, path)
    except TypeError as error:
        raise UserError(f"{path}.options", option.options, f"arguments of {option.name} ({error})") from None
    if not all(callable(getattr(made, name, None)) for name in methods):
        raise UserError(path, option.name, f"a class with {' and '.join(methods)}")
    return made
