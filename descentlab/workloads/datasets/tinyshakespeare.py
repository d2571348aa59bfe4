"""Next-character prediction on Shakespeare: overlapping windows of a text that is first cut into three stretches."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch
from torch import Tensor

from ...core.errors import UserError
from ..base import Data
from .files import paths
from .sources import TINYSHAKESPEARE

Alphabet = Literal["letters", "all"]


def encode(text: str, alphabet: Alphabet, symbols: int) -> tuple[str, Tensor]:
    """(vocabulary, ids int64 ``[len(text)]``); a symbol's id is its place in the sorted vocabulary.

    ``letters``: lower case, everything but a to y becomes a space (26 symbols). ``all``: characters as they are. When
    there are more than ``symbols`` of them, the most frequent stay and the others become the space, or where there is
    none, the most frequent one; of equally frequent ones the first in the alphabet stays.
    """
    if alphabet == "letters":
        text = "".join(c if "a" <= c <= "y" else " " for c in text.lower())
    counts = Counter(text)
    if len(counts) > symbols:
        ranked = sorted(counts, key=lambda c: (-counts[c], c))
        kept = set(ranked[:symbols])
        other = " " if " " in kept else ranked[0]
        text = "".join(c if c in kept else other for c in text)
    vocabulary = "".join(sorted(set(text)))
    ids = {c: i for i, c in enumerate(vocabulary)}
    return vocabulary, torch.tensor([ids[c] for c in text], dtype=torch.int64)


def windows(ids: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Every window of ``block`` ids and, of the same shape, the ids that follow each; views, no copies."""
    return ids[:-1].unfold(0, block, 1), ids[1:].unfold(0, block, 1)


def load(characters: int | None, alphabet: Alphabet, symbols: int, block: int, test_windows: int | None = None) -> Data:
    """Inputs and targets int64 ``[n, block]``: of the first ``characters`` the first 80 % are for training, the next
    10 % for validation, the rest for testing. No character is in two parts, neither as an input nor as a target.
    Of the test windows ``test_windows`` stay (None: all), evenly spaced from the first to the last.
    """
    (path,) = paths(TINYSHAKESPEARE)
    text = path.read_text(encoding="utf-8")
    if characters is not None and characters > len(text):
        raise UserError("dataset.characters", characters, f"at most {len(text)}")
    vocabulary, ids = encode(text[:characters], alphabet, symbols)
    first, second = len(ids) * 8 // 10, len(ids) * 9 // 10
    shortest = min(first, second - first, len(ids) - second)
    if shortest <= block:
        raise UserError("dataset.block", block, f"less than {shortest}, the characters of the shortest part")
    train, validation, test = (windows(part, block) for part in (ids[:first], ids[first:second], ids[second:]))
    if test_windows is not None:
        if test_windows > len(test[0]):
            raise UserError("dataset.test", test_windows, f"at most the {len(test[0])} test windows")
        spaced = torch.linspace(0, len(test[0]) - 1, test_windows, dtype=torch.float64).round().long()
        test = (test[0][spaced], test[1][spaced])
    return Data(
        "tinyshakespeare", *train, *validation, *test,
        classes=len(vocabulary),
        source=TINYSHAKESPEARE.source,
        licence=TINYSHAKESPEARE.licence,
        vocabulary=vocabulary,
    )  # fmt: skip
