"""Observables that a study's settings name: shipped ones by name, a third party's as ``module:Class``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.errors import UserError, nearest
from ..core.protocols import Measured, Observable
from .specs import EVALUATED, EXTRA, PER_STEP

KEY = "observe.extra"
KEYS = ("run", "step", "attempt", "epoch", "samples", "virtual_s", "bytes_sent", "wall_s")


class Columns:
    """An observable whose rows ``[M, K]`` become columns ``name_0`` to ``name_K-1``, one number each.

    A column that every run has already is an error.
    """

    def __init__(self, inner: Observable) -> None:
        self.inner, self.name, self.needs = inner, inner.name, frozenset(inner.needs)

    def measure(self, m: Measured) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, values in self.inner.measure(m).items():
            if name in PER_STEP or name in EVALUATED or name in KEYS:
                raise UserError(KEY, self.name, f"columns of its own; every run has a '{name}' already")
            rows = values.unbind(1) if values.dim() == 2 else None
            out.update({name: values} if rows is None else {f"{name}_{k}": row for k, row in enumerate(rows)})
        return out


def load(names: Sequence[str]) -> list[Columns]:
    """The observables of those names, in order.

    Raises:
        UserError: for a name that cannot be imported, is given twice or is no observable.
    """
    return [_load(name, names) for name in names]


def _load(name: str, names: Sequence[str]) -> Columns:
    if names.count(name) > 1:
        raise UserError(KEY, name, "each observable once")
    target = EXTRA[name][0] if name in EXTRA else name
    module, colon, attribute = target.partition(":")
    if not colon:
        raise UserError(KEY, name, f"one of {', '.join(EXTRA)}, or module:Class", hint=nearest(name, EXTRA))
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(KEY, name, f"an importable module ({error})") from None
    except AttributeError:
        raise UserError(KEY, name, f"a name defined in module '{module}'") from None
    made = found() if isinstance(found, type) else found
    if not isinstance(made, Observable):
        raise UserError(KEY, name, "a class with name, needs and measure")
    return Columns(made)
