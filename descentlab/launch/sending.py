"""What a study with a link adds to a block's parts."""

from __future__ import annotations

from typing import Any

from ..core.errors import UserError
from ..engine.parts import Parts
from ..observe.sending import Sending


def with_link(cell: Any, parts: Parts) -> Parts:
    """The parts of a cell that has a link; those of any other as they are."""
    if not hasattr(cell, "link"):
        return parts
    parts.link = cell.link.build()
    parts.compute_s = cell.compute_ms / 1e3
    parts.observables = [*parts.observables, Sending()]
    return parts


def check_ranks(cell: Any, params: dict[str, tuple[int, ...]]) -> None:
    """UserError for a rank above that of every matrix of the model. ``params``: shapes, by name."""
    compressor = getattr(cell, "compressor", None)
    if compressor is None or compressor.name != "powersgd":
        return
    own = [min(shape[0], _product(shape[1:])) for shape in params.values() if len(shape) > 1]
    largest = max(own, default=0)
    if not largest:
        raise UserError("compressor", "powersgd", "a model with a parameter of two or more axes")
    policy = compressor.policy
    keys = {"rank": [compressor.rank]} | {
        f"policy.{key}": value if isinstance(value, list) else [value]
        for key, value in policy.model_dump().items()
        if key in ("ranks", "candidates", "high", "max_rank")
    }
    for key, ranks in keys.items():
        if max(ranks) > largest:
            raise UserError(f"compressor.{key}", max(ranks), f"at most {largest}, that of the largest matrix")


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out
