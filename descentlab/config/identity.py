"""Run ids: the same settings give the same id, in any process, on any machine, in whatever order they were given."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

ID_LENGTH = 12  # hexadecimal digits: 48 bits, a collision in 100,000 runs has odds of 2e-5


def canonical(value: Any) -> str:
    """JSON with sorted keys and one spelling per number (1.0 is 1, -0.0 is 0): equal settings give equal text."""
    return json.dumps(_one_spelling(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _one_spelling(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _one_spelling(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_one_spelling(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return {"float": repr(value)}  # a block, so that it cannot be mistaken for the word
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return value


def cell_key(cell: Any, role: str | None = None) -> str:
    """The canonical text of a cell's result-relevant settings, the study's ``semantics`` included; with ``role`` of
    those that can change the result of a run in that role."""
    settings = cell.identity() if role is None else cell.identity_of(role)
    return canonical({"settings": settings, "semantics": type(cell).semantics})


def run_id(key: str, replicate: int, role: str, labels: Mapping[str, Any]) -> str:
    """The id of one run of the cell with that :func:`cell_key`: the first 12 hexadecimal digits of a SHA-256.

    How much is run, where and how it is shown (``cases``, ``size``, ``device`` …) does not enter.
    """
    text = canonical({"cell": key, "replicate": replicate, "role": role, "labels": labels})
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]
