"""Public conformance checks for what others add: each raises AssertionError with a line that says what is wrong."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .determinism import check_deterministic as check_deterministic
    from .engines import check_engine as check_engine
    from .observables import check_observable as check_observable
    from .optimizers import check_optimizer as check_optimizer
    from .workloads import check_workload as check_workload

_HOME = {
    "check_deterministic": "determinism",
    "check_engine": "engines",
    "check_observable": "observables",
    "check_optimizer": "optimizers",
    "check_workload": "workloads",
}
__all__ = ["check_deterministic", "check_engine", "check_observable", "check_optimizer", "check_workload"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
