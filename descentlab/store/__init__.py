"""Run directories: written so that a kill loses nothing, and read back. Importing this imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .block import BlockWriter as BlockWriter
    from .directory import RunDirectory as RunDirectory
    from .progress import Status as Status
    from .progress import status as status
    from .results import Results as Results
    from .results import load as load
    from .table import VOLATILE as VOLATILE
    from .table import equal_tables as equal_tables
    from .table import leftovers as leftovers
    from .table import refresh as refresh

_HOME = {
    "BlockWriter": "block",
    "RunDirectory": "directory",
    "Results": "results",
    "Status": "progress",
    "VOLATILE": "table",
    "equal_tables": "table",
    "leftovers": "table",
    "load": "results",
    "refresh": "table",
    "status": "progress",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
