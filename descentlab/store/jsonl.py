"""Strict JSON lines: one object per line, no bare NaN, and a last line that a kill may have cut short."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import StudyError

# JSON has no NaN and no infinity: they are written as these strings, and read back under the keys that hold values.
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
VALUE_KEYS = frozenset({"old", "new", "value", "values"})


def dumps(row: Any) -> str:
    """``row`` as one line of strict JSON; numpy numbers and arrays become numbers and lists."""
    try:
        return json.dumps(row, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError):  # it holds something that JSON has not: rarely, and looking costs more than writing
        return json.dumps(_plain(row), allow_nan=False, ensure_ascii=False)


def loads(text: str) -> Any:
    """The inverse of :func:`dumps`: ``"nan"``, ``"inf"``, ``"-inf"`` under ``VALUE_KEYS`` become floats."""
    if any(f'"{name}"' in text for name in NON_FINITE):
        return json.loads(text, object_hook=_restore)
    return json.loads(text)


def encode(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """``rows`` as the bytes of a JSON-lines file."""
    return "".join(dumps(row) + "\n" for row in rows).encode()


def decode(data: bytes, path: Path, *, appended: bool = False, repeated: str = "") -> tuple[list[dict[str, Any]], int]:
    """Rows of a JSON-lines file and the number of bytes that hold them whole.

    With ``appended`` a last line that has no newline and does not parse is dropped: the writer was killed in the
    middle of it. Any other damage raises :class:`StudyError`. ``repeated``: the last key of a row, whose value many
    rows have in common; it is read once, and these rows share one object.
    """
    rows: list[dict[str, Any]] = []
    read = _Repeated(repeated) if repeated else loads
    good = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = read(line.decode())
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError:
                if appended and number == len(lines):
                    break
                raise StudyError(
                    f"{path} is damaged at line {number}; restore the file, or start again with --overwrite"
                ) from None
            rows.append(row)
        good = min(good + len(line) + 1, len(data))
    return rows, good


class _Repeated:
    """:func:`loads` for rows that end in the same key and often in the same value."""

    def __init__(self, key: str) -> None:
        self.key, self.mark, self.known = key, f', "{key}": ', dict[str, Any]()

    def __call__(self, line: str) -> Any:
        head, mark, tail = line.partition(self.mark)
        if mark:
            try:
                row = loads(head + "}")
                if tail not in self.known:
                    (self.known[tail],) = loads(f'{{"{self.key}": {tail}').values()
            except (ValueError, AttributeError):  # the key stands elsewhere, or the line is damaged
                return loads(line)
            if isinstance(row, dict):
                return {**row, self.key: self.known[tail]}
        return loads(line)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _restore(row: dict[str, Any]) -> dict[str, Any]:
    for key in VALUE_KEYS & row.keys():
        row[key] = _number(row[key])
    return row


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
