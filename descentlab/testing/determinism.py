"""Does the same study give the same bits again?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..config.resolve import resolve
from ..launch import api
from ..store.results import load
from ..store.table import equal_tables

LAUNCHERS = ("local", "pool")  # in this process, then in worker processes


def check_deterministic(study: str | Path, *settings: str) -> str:
    """Run a study twice, in this process and in worker processes, and compare every row, planned fault and hit.

    Settings as in :func:`descentlab.run`; choose few and short runs: ``check_deterministic("recovery", "size=quick")``.
    Returns the SHA-256 of the order of the first samples, which two machines can compare. Raises AssertionError that
    names the first difference, :class:`~descentlab.core.errors.UserError` for a mistake in the settings.
    """
    found: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, launcher in enumerate(LAUNCHERS):
            out = Path(folder) / str(number)
            api.run(resolve(study, settings, limit=None), out, yes=True, launcher=launcher)
            found.append(load(out))
        first, second = found
        differences = equal_tables(first.frame, second.frame)
        assert not differences, f"two runs of the same settings differ: {differences[0]}"
        for name in ("campaign", "hits", "status"):
            left, right = getattr(first, name), getattr(second, name)
            assert _texts(left) == _texts(right), f"two runs of the same settings have other {name}"
        orders = [results.provenance.get("data_order") for results in found]
        assert orders[0] == orders[1], "two runs of the same settings read their samples in another order"
        return str(orders[0])


def _texts(rows: Any) -> list[str]:
    return sorted(repr({k: v for k, v in dict(row).items() if k not in ("block", "message")}) for row in rows)
