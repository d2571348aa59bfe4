"""What a study with a link adds to a block's parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..cluster.namespaces import check_possible
from ..core.errors import UserError
from ..engine.parts import Parts
from ..observe.sending import Sending

ADAPTIVE = ("accordion", "calibration", "budget")  # policies that decide from what one run has seen


def with_link(cell: Any, parts: Parts) -> Parts:
    """The parts of a cell that has a link; those of any other as they are."""
    if not hasattr(cell, "link"):
        return parts
    parts.link = cell.link.build()
    parts.compute_s = cell.compute_ms / 1e3
    parts.observables = [*parts.observables, Sending()]
    return parts


def members_of(cell: Any) -> int:
    """Models trained together at most, 0 = the stated rule; 1 where each has ranks, or processes, of its own."""
    policy = getattr(getattr(cell, "compressor", None), "policy", None)
    alone = policy is not None and policy.name in ADAPTIVE
    return 1 if alone or getattr(cell, "distributed", False) else cell.members_per_block


def check_sending(cell: Any, params: Mapping[str, tuple[int, ...]]) -> None:
    """UserError for a real link that this process may not make, and for a rank above that of every matrix of the model.
    ``params``: shapes, by name."""
    if getattr(getattr(cell, "link", None), "name", "") == "real":
        check_possible(cell.workers)
    compressor = getattr(cell, "compressor", None)
    if compressor is None or compressor.name != "powersgd":
        return
    own = [min(shape[0], _product(shape[1:])) for shape in params.values() if len(shape) > 1]
    largest = max(own, default=0)
    if not largest:
        raise UserError("compressor", "powersgd", "a model with a parameter of two or more axes")
    keys = {"rank": [compressor.rank]} | dict(_ranks("policy", compressor.policy.model_dump()))
    for key, ranks in keys.items():
        if max(ranks) > largest:
            raise UserError(f"compressor.{key}", max(ranks), f"at most {largest}, that of the largest matrix")


def _ranks(where: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Every setting that is a rank, or ranks, by its key."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _ranks(f"{where}.{key}", value)
        elif key in ("ranks", "candidates", "low", "high", "max_rank") and value is not None:
            yield f"{where}.{key}", value if isinstance(value, list) else [value]


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out
