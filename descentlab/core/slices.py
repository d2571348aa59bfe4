"""Slices of the parts of a dataset, as text: ``train[:90%]``, ``train[100:200]+test``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PARTS = ("train", "validation", "test")
_BOUND = r"(-?\d+(?:\.\d+)?%|-?\d+)?"
_PIECE = re.compile(rf"^(train|validation|test)(?:\[{_BOUND}:{_BOUND}\])?$")
EXPECTED = "a part such as train, train[:90%], train[100:] or parts joined by +"


@dataclass(frozen=True)
class Piece:
    """Samples ``first`` to ``last`` (not included) of one published part."""

    part: str
    first: int
    last: int


def check_splits(texts: Iterable[str]) -> None:
    """ValueError for a text that is no slice."""
    for text in texts:
        for piece in str(text).split("+"):
            match = _PIECE.match(piece.strip())
            if match is None:
                raise ValueError(f"'{text}': expected {EXPECTED}")
            over = [b for b in match.groups()[1:] if b and b.endswith("%") and abs(float(b[:-1])) > 100]
            if over:
                raise ValueError(f"'{text}': expected at most 100%")


def pieces(text: str, sizes: Mapping[str, int]) -> list[Piece]:
    """The pieces a text stands for, in its order. A percentage is rounded to the nearest sample, half to even; negative
    bounds count from the end, bounds beyond the end mean the end.

    Raises:
        ValueError: for a text that is no slice.
    """
    check_splits([text])
    found = []
    for word in text.split("+"):
        match = _PIECE.match(word.strip())
        assert match is not None
        part, low, high = match.groups()
        n = sizes[part]
        first, last = _place(low, n, 0), _place(high, n, n)
        found.append(Piece(part, first, max(first, last)))
    return found


def _place(bound: str | None, n: int, default: int) -> int:
    if not bound:
        return default
    place = round(n * float(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
    return min(max(place + n if place < 0 else place, 0), n)


def overlap(a: Iterable[Piece], b: Iterable[Piece]) -> bool:
    """Whether any sample is in both."""
    b = list(b)
    return any(x.part == y.part and max(x.first, y.first) < min(x.last, y.last) for x in a for y in b)
