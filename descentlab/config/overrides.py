"""The grammar of the command line: ``key.path=value``.

``optimizer.lr=1e-3`` edits, ``optimizer.lr=1e-3,1e-2`` widens the grid, ``model.hidden=[16,8]`` is one list,
``optimizer={name: adam, lr: 1e-3}`` one block, ``optimizer.lr=logspace(1e-4,1e-1,4)`` four values (also
``linspace(…)`` and ``random(low,high,n,seed=0)``). Values are YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.errors import UserError, raise_all
from .grid import COMPUTED, computed
from .yaml12 import load

_CALL = re.compile(rf"^\s*({'|'.join(COMPUTED)})\s*\((.*)\)\s*$", re.DOTALL)
_KEY = re.compile(r"^[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*$")


@dataclass(frozen=True)
class Override:
    """One ``key=value`` argument: its key path and its value, or several values when it widens the grid."""

    key: str
    values: tuple[Any, ...]
    text: str  # the right-hand side as typed

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(self.key.split("."))

    @property
    def widens(self) -> bool:
        return len(self.values) > 1


def split_top(text: str) -> list[str]:
    """``text`` cut at the commas that lie outside brackets, braces and quotes; always at least one part."""
    parts, start, depth, quote = [], 0, 0, ""
    fresh = True  # a quote opens a quoted text only where a value may begin: "it's" holds an apostrophe
    for i, char in enumerate(text):
        if quote:
            escaped = quote == '"' and (i - len(text[:i].rstrip("\\"))) % 2 == 1
            if char == quote and not escaped:
                quote = ""  # '' inside single quotes closes and opens again: the same cuts
                fresh = char == "'"
                continue
        elif char in "'\"" and fresh:
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth = max(0, depth - 1)
        elif char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
        fresh = char in ",[{:" or (fresh and char.isspace())
    parts.append(text[start:])
    return parts


def parse_override(argument: str) -> Override:
    """One ``key=value`` argument.

    Raises:
        UserError: without ``=``, with a malformed key, an empty value or invalid YAML.
    """
    key, equals, text = argument.partition("=")
    key = key.strip()
    if not equals:
        raise UserError("argument", argument, "key.path=value, such as optimizer.lr=1e-3")
    if not _KEY.match(key):
        raise UserError("argument", argument, "a key path of words joined by dots before '='")
    call = _CALL.match(text)
    if call:
        return Override(key, _computed(call[1], call[2], key), text.strip())
    parts = split_top(text)
    if any(not part.strip() for part in parts):
        raise UserError(key, text, "a value" + (" between commas" if len(parts) > 1 else "; write null for none"))
    return Override(key, tuple(load(part.strip(), key) for part in parts), text.strip())


def _computed(kind: str, text: str, key: str) -> tuple[Any, ...]:
    """The values of ``kind(text)``: arguments by position, then by name."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for part in split_top(text) if text.strip() else []:
        name, equals, value = part.partition("=")
        if equals and name.strip() not in named:
            named[name.strip()] = load(value.strip(), key)
        elif equals or named:
            raise UserError(key, f"{kind}({text})", "arguments by position, then each name once")
        else:
            positional.append(load(part.strip(), key))
    return computed(kind, positional, named, key, key)


def parse_overrides(arguments: Iterable[str]) -> list[Override]:
    """All arguments in the order given; every mistake among them is reported, a repeated key included."""
    out: dict[str, Override] = {}
    errors: list[UserError] = []
    for argument in arguments:
        try:
            override = parse_override(argument)
        except UserError as error:
            errors.append(error)
            continue
        if override.key in out:
            both = f"{out[override.key].text} and {override.text}"
            grid = f"{override.key}={out[override.key].text},{override.text}"
            errors.append(UserError(override.key, both, f"one value per key; for a grid write {grid}"))
        else:
            out[override.key] = override
    raise_all(errors)
    return list(out.values())
