"""Grids: products, values that vary together, sub-grids, and values that are computed.

A grid is a block of axes (key path -> values), multiplied. Inside it, ``zip`` holds axes that vary together and
``list`` holds sub-grids, one after the other; ``zip_NAME`` and ``list_NAME`` are further ones. A list of blocks is a
list of sub-grids. docs/grids.md has examples.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import UserError, nearest

LIMIT = 10_000
Path = tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """The values of one key path; axes with the same non-empty ``group`` vary together."""

    key: str
    values: tuple[Any, ...]
    group: str = ""


# Sizes and points ---------------------------------------------------------------------------------------------------


def product(
    axes: Mapping[Path, Sequence[Any]], limit: int | None = LIMIT, groups: Mapping[Path, str] | None = None
) -> list[dict[Path, Any]]:
    """Every combination of the axes' values, the first axis changing slowest; without axes one empty combination.

    Axes of one group (key path -> group) vary together and stand where the first of them does.

    Raises:
        UserError: when there are more than ``limit`` of them (None: any number); none is made then.
    """
    together = _together(axes, groups or {})
    count = math.prod(len(axes[paths[0]]) for paths in together)
    if limit is not None and count > limit:
        sizes = " x ".join(f"{len(axes[paths[0]])} {'+'.join('.'.join(p) for p in paths)}" for paths in together)
        raise too_many(count, limit, f"it is {sizes}")
    rows = [zip(*(axes[path] for path in paths), strict=True) for paths in together]
    order = [path for paths in together for path in paths]
    points = itertools.product(*rows)
    return [dict(zip(order, itertools.chain.from_iterable(point), strict=True)) for point in points]


def too_many(count: int, limit: int, what: str) -> UserError:
    return UserError("grid", count, f"at most {limit} cells", hint=f"{what}; run takes -y for more")


def _together(axes: Mapping[Path, Sequence[Any]], groups: Mapping[Path, str]) -> list[list[Path]]:
    out: dict[Hashable, list[Path]] = {}
    for path in axes:
        out.setdefault(groups.get(path) or path, []).append(path)
    return list(out.values())


# Reading ------------------------------------------------------------------------------------------------------------

_GROUP = re.compile(r"^(zip|list)(_\w+)?$")
_VALUES = "a list of at least one value, or one of linspace, logspace, random"


def alternatives(grid: Any, where: str = "grid", *, inside: bool = False) -> list[list[Axis]]:
    """The sub-grids a ``grid:`` stands for, each a list of axes to multiply; one of them when there are no lists.

    Raises:
        UserError: for what is no grid, naming the place in it.
    """
    if isinstance(grid, (list, tuple)):
        if not grid:
            raise UserError(where, grid, "at least one sub-grid: an empty list has no runs")
        return [axes for i, sub in enumerate(grid) for axes in alternatives(sub, f"{where}[{i}]", inside=True)]
    if not isinstance(grid, Mapping):
        raise UserError(where, grid, "a block of key path: [values], or a list of such blocks")
    choices = [_choices(str(key), value, f"{where}.{key}", inside) for key, value in grid.items()]
    count = math.prod(len(choice) for choice in choices)
    if count > LIMIT:
        raise UserError(where, count, f"at most {LIMIT} sub-grids")
    out = [list(itertools.chain.from_iterable(combination)) for combination in itertools.product(*choices)]
    for axes in out:
        _refuse_twice(axes, where)
    return out


def _choices(key: str, value: Any, where: str, inside: bool) -> list[list[Axis]]:
    match = _GROUP.match(key)
    if match is None:
        return [[Axis(key, _values(value, where, key, inside))]]
    if match[1] == "list":
        if not isinstance(value, (list, tuple)) or not value:
            raise UserError(where, value, "a list of sub-grids")
        return alternatives(value, where, inside=True)
    if not isinstance(value, Mapping) or not value:
        raise UserError(where, value, "a block of key path: [values] that vary together")
    axes = [Axis(str(k), _values(v, f"{where}.{k}", str(k), False), where) for k, v in value.items()]
    lengths = {axis.key: len(axis.values) for axis in axes}
    if len(set(lengths.values())) > 1:
        raise UserError(where, lengths, "the same number of values for each key")
    return [axes]


def _refuse_twice(axes: Sequence[Axis], where: str) -> None:
    seen: set[str] = set()
    for axis in axes:
        if axis.key in seen:
            raise UserError(f"{where}.{axis.key}", list(axis.values), "one axis per key; it is given in a sub-grid too")
        seen.add(axis.key)


def _values(value: Any, where: str, key: str, inside: bool) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple)) and value:
        return tuple(value)
    if isinstance(value, Mapping) and len(value) == 1:
        (kind, arguments), *_ = value.items()
        if kind in COMPUTED:
            named = arguments if isinstance(arguments, Mapping) else {}
            plain = [] if isinstance(arguments, Mapping) else arguments
            return computed(str(kind), plain if isinstance(plain, (list, tuple)) else [plain], named, where, key)
    if inside and (not isinstance(value, (list, tuple, Mapping)) or (isinstance(value, Mapping) and "name" in value)):
        return (value,)
    near = nearest(str(next(iter(value), "")), COMPUTED) if isinstance(value, Mapping) else ""
    raise UserError(where, value, _VALUES, hint=near)


# Computed values ----------------------------------------------------------------------------------------------------

_PARAMETERS = {
    "linspace": ("low", "high", "n"),
    "logspace": ("low", "high", "n"),
    "random": ("low", "high", "n", "seed", "log", "integer"),
}
_FALLBACK: dict[str, Any] = {"seed": 0, "log": False, "integer": False}


def computed(
    kind: str, positional: Sequence[Any], named: Mapping[str, Any], where: str, key: str
) -> tuple[float | int, ...]:
    """The values of ``linspace``, ``logspace`` or ``random``; ``key`` is the key path they are for.

    Raises:
        UserError: for a missing, unknown or impossible argument.
    """
    names = _PARAMETERS[kind]
    usage = f"{kind}({', '.join(f'{n}={str(_FALLBACK[n]).lower()}' if n in _FALLBACK else n for n in names)})"
    given = {**dict(zip(names, positional, strict=False)), **named}
    shown = {**{str(i): v for i, v in enumerate(positional)}, **named} if named else list(positional)
    wrong = UserError(where, shown, usage)
    if len(positional) > len(names) or set(given) - set(names) or set(names[: len(positional)]) & set(named):
        raise wrong
    settings = {**_FALLBACK, **given}
    if any(name not in settings for name in names):
        raise wrong
    low, high, n = settings["low"], settings["high"], settings["n"]
    if not (_is_number(low) and _is_number(high) and type(n) is int and n >= 1):
        raise UserError(where, shown, f"{usage} with numbers low and high and a whole number n of at least 1")
    if not (isinstance(settings["log"], bool) and isinstance(settings["integer"], bool)):
        raise UserError(where, shown, f"{usage} with true or false for log and integer")
    if type(settings["seed"]) is not int or settings["seed"] < 0:
        raise UserError(where, shown, f"{usage} with a whole number for seed")
    if kind == "random" and low >= high:
        raise UserError(where, shown, f"{usage} with low below high")
    if settings["integer"] and not (float(low).is_integer() and float(high).is_integer()):
        raise UserError(where, shown, f"{usage} with whole numbers low and high")
    if (kind == "logspace" or settings["log"]) and not (low > 0 and high > 0):
        raise UserError(where, shown, f"{usage} with low and high above 0")
    return COMPUTED[kind](settings, key)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _spaced(settings: Mapping[str, Any], key: str) -> tuple[float | int, ...]:
    """``n`` values from low to high at equal distances; both ends are exact."""
    low, high, n = settings["low"], settings["high"], settings["n"]
    inner = [_digits(low + (high - low) * i / (n - 1), 12) for i in range(1, n - 1)]
    return (low, *inner, high) if n > 1 else (low,)


def _log_spaced(settings: Mapping[str, Any], key: str) -> tuple[float | int, ...]:
    """``n`` values from low to high at equal ratios; both ends are exact, 1e-3 between 1e-4 and 1e-2 is 1e-3."""
    low, high, n = settings["low"], settings["high"], settings["n"]
    inner = [_digits(math.exp(math.log(low) + math.log(high / low) * i / (n - 1)), 12) for i in range(1, n - 1)]
    return (low, *inner, high) if n > 1 else (low,)


def _random(settings: Mapping[str, Any], key: str) -> tuple[float | int, ...]:
    """``n`` draws, uniform in value or in its logarithm; a function of the seed and the key path alone.

    Rounded to six digits, so that a value can be typed again; whole numbers include both ends.
    """
    low, high = settings["low"], settings["high"]
    low, high = (int(low), int(high)) if settings["integer"] else (low, high)
    generator = random.Random(f"{settings['seed']}/{key}")
    out: list[float | int] = []
    for _ in range(settings["n"]):
        u = generator.random()
        if settings["integer"]:
            top = high + 1
            raw = low * (top / low) ** u if settings["log"] else low + (top - low) * u
            out.append(min(math.floor(raw), top - 1))
        else:
            raw = low * (high / low) ** u if settings["log"] else low + (high - low) * u
            out.append(min(max(_digits(raw, 6), low), high))
    return tuple(out)


def _digits(value: float, count: int) -> float:
    return float(f"{value:.{count}g}")


COMPUTED: dict[str, Callable[[Mapping[str, Any], str], tuple[float | int, ...]]] = {
    "linspace": _spaced,
    "logspace": _log_spaced,
    "random": _random,
}


# Writing ------------------------------------------------------------------------------------------------------------


def written(axes: Mapping[Path, Sequence[Any]], groups: Mapping[Path, str]) -> dict[str, Any]:
    """The ``grid:`` block that stands for these axes."""
    out: dict[str, Any] = {}
    zips = 0
    for paths in _together(axes, groups):
        block = {".".join(path): list(axes[path]) for path in paths}
        if len(paths) == 1:
            out.update(block)
        else:
            zips += 1
            out["zip" if zips == 1 else f"zip_{zips}"] = block
    return out


def shared(bases: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[Path, Any]]]:
    """What nested settings have in common, and what is left of each, by key path."""
    common: dict[str, Any] = {}
    rest: list[dict[Path, Any]] = [{} for _ in bases]
    for key in dict.fromkeys(key for base in bases for key in base):
        found = [base[key] for base in bases if key in base]
        if len(found) == len(bases) and all(value == found[0] for value in found):
            common[key] = found[0]
        elif len(found) == len(bases) and _same_block(found):
            block, below = shared(found)
            common.update({key: block} if block else {})
            for own, deeper in zip(rest, below, strict=True):
                own.update({(key, *path): value for path, value in deeper.items()})
        else:
            for own, base in zip(rest, bases, strict=True):
                if key in base:
                    own[(key,)] = base[key]
    return common, rest


def _same_block(values: Sequence[Any]) -> bool:
    """Whether all values are blocks of the same option, or of none."""
    return all(isinstance(v, Mapping) for v in values) and len({v.get("name") for v in values}) == 1
