"""Grids of the starter's job files: products, expressions, ``LIST`` keys; and the reverse, from points to sub-grids."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import UserError
from .expression import Unreadable, evaluate
from .grid import LIMIT
from .identity import canonical

Point = dict[str, Any]  # one value for each key
_WORD = re.compile(r"^[\w./:+-]+$")


def expand(parameters: Mapping[str, Any], where: str = "parameters") -> tuple[list[Point], list[Point]]:
    """(points, those that came more than once), in the order of the file, the first key changing slowest.

    Each value is a list, a single value, or a text that is an expression for either. The value of a key that begins
    with ``LIST`` is a list of such blocks; their points follow each other and are one axis of the product.

    Raises:
        UserError: for what is neither, for a key given twice, and for more than 10,000 points.
    """
    if not isinstance(parameters, Mapping):
        raise UserError(where, parameters, "a block of key: values")
    repeated: list[Point] = []
    axes = []
    for key, value in parameters.items():
        name = f"{where}.{key}"
        if str(key).startswith("LIST"):
            axes.append(_union(value, name, repeated))
        else:
            axes.append([{str(key): v} for v in values(value, name)])
    count = math.prod(len(axis) for axis in axes)
    if count > LIMIT:
        raise UserError(where, count, f"at most {LIMIT} configurations")
    points = [_joined(parts, where) for parts in itertools.product(*axes)]
    return _distinct(points, repeated), repeated


def _union(value: Any, where: str, repeated: list[Point]) -> list[Point]:
    if not isinstance(value, list) or not value:
        raise UserError(where, value, "a list of blocks")
    found: list[Point] = []
    for i, block in enumerate(value):
        points, twice = expand(block, f"{where}[{i}]")
        found += points
        repeated += twice
    return _distinct(found, repeated)


def values(value: Any, where: str) -> list[Any]:
    """The values of one key; a plain word such as ``linear`` or ``tiny/lenet`` stands for itself."""
    if isinstance(value, str):
        try:
            value = evaluate(value)
        except Unreadable as reason:
            if not _WORD.match(value):
                raise UserError(where, value, f"a list, a value or an expression ({reason})") from None
    if not isinstance(value, list):
        return [value]
    if not value:
        raise UserError(where, value, "at least one value")
    return value


def _joined(parts: Sequence[Point], where: str) -> Point:
    out: Point = {}
    for part in parts:
        for key, value in part.items():
            if key in out:
                raise UserError(f"{where}.{key}", value, "one place for each key; it is given in a LIST too")
            out[key] = value
    return out


def _distinct(points: Sequence[Point], repeated: list[Point]) -> list[Point]:
    seen: dict[str, Point] = {}
    for point in points:
        text = canonical(point)
        if text in seen:
            repeated.append(point)
        seen.setdefault(text, point)
    return list(seen.values())


def sub_grids(points: Sequence[Point]) -> list[dict[str, list[Any]]]:
    """Blocks of key: values whose products, one after the other, are exactly the ``points`` (which are distinct).

    Points that differ in one key only are merged, key after key; what is left cannot be written as fewer products by
    merging further. Values keep the order in which they first came.
    """
    blocks = [{key: [value] for key, value in point.items()} for point in points]
    keys = list(dict.fromkeys(key for point in points for key in point))
    for key in keys:
        merged: dict[str, dict[str, list[Any]]] = {}
        for block in blocks:
            rest = canonical({k: v for k, v in block.items() if k != key} | {"": key in block})
            if rest in merged and key in block:
                merged[rest][key] += block[key]
            else:
                merged[rest] = block
        blocks = list(merged.values())
    return blocks


def written(blocks: Sequence[Mapping[str, list[Any]]]) -> dict[str, Any]:
    """The ``grid:`` for these sub-grids: what all have alike outside, the rest in ``list``."""
    keys = list(dict.fromkeys(key for block in blocks for key in block))
    alike = [k for k in keys if all(k in b and canonical(b[k]) == canonical(blocks[0][k]) for b in blocks)]
    grid: dict[str, Any] = {key: blocks[0][key] for key in alike}
    rest = [{key: block[key] for key in keys if key in block and key not in alike} for block in blocks]
    if any(rest):
        grid["list"] = rest
    return grid
