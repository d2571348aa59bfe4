"""JSON that every reader accepts: a number that is not finite becomes null, and a field says which it was."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

NON_FINITE_KEY = "non_finite"  # {path of the null: "nan", "inf" or "-inf"}; absent where everything is finite


def strict(document: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with every NaN and infinity as null, and ``non_finite`` naming each by its path and kind.

    Paths are written like ``optimizer_results.sgd.history.loss[3]``.
    """
    found: dict[str, str] = {}
    plain = {str(key): _plain(value, str(key), found) for key, value in document.items()}
    return {**plain, NON_FINITE_KEY: found} if found else plain


def _plain(value: Any, path: str, found: dict[str, str]) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        found[path] = "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{path}.{key}", found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]", found) for i, item in enumerate(value)]
    return value


def dumps(document: Any) -> str:
    """Indented text of a document or a list of documents, each through :func:`strict`."""
    plain = [strict(one) for one in document] if isinstance(document, list) else strict(document)
    return json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
