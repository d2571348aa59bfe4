"""``summary.json``: flat, name -> value, n, low, high, method; strict JSON (a non-finite number becomes null)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .model import SummaryItem


def _strict(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary_json(summary: Mapping[str, SummaryItem]) -> str:
    """The text of summary.json, sorted by name."""
    plain = {name: {key: _strict(value) for key, value in asdict(item).items()} for name, item in summary.items()}
    return json.dumps(plain, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
