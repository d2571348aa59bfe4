"""Whether a study is computed with compiled code: decided once, written to plan.json, obeyed or refused by a resume.

Compiled and torch's own steps differ by rounding, which training makes grow; so a study must not change from one to the
other half-way, on whatever machine it is continued.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..config.tree import StudySpec
from ..core.errors import StudyError
from ..core.member_stats import compiled_stats
from ..core.native import compiled_code
from ..engine.batched_cnn import cnn_kernel
from ..engine.native import kernel
from ..optim.compiled import library_for
from .pool import KEPT

KEY = "compiled"


def missing(dtype: str) -> str | None:
    """Why this machine has no compiled code for ``dtype``, in one line; None where it has."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [make(getattr(torch, dtype)) for make in (kernel, cnn_kernel, compiled_stats, library_for)]
    if None not in found:
        return None
    said = str(caught[0].message).splitlines() if caught else ["no C compiler"]
    return said[0].partition(": ")[2] or said[0]


def decide(known: Mapping[str, Any], cells: Sequence[StudySpec]) -> tuple[bool, list[str]]:
    """(what plan.json is to say, notices for the user): what ``known`` says, else what this machine can do.

    Raises:
        StudyError: for a study begun with compiled code that this machine cannot build.
    """
    if known.get(KEY) is False:
        return False, []
    reasons = [reason for dtype in sorted({cell.dtype for cell in cells}) if (reason := missing(dtype)) is not None]
    if not reasons:
        return True, []
    if known.get(KEY):
        raise _refused(reasons[0])
    return False, [f"no compiled code on this machine, so small networks train slower: {reasons[0]}"]


def _refused(reason: str) -> StudyError:
    return StudyError(
        f"this study was begun with compiled code, which this machine cannot build ({reason}); results would differ "
        f"by rounding; {KEPT}; continue where there is a C compiler, or start again with --overwrite"
    )


@contextmanager
def as_planned(plan: Mapping[str, Any], dtype: str) -> Iterator[None]:
    """Compute as plan.json says.

    Raises:
        StudyError: where this machine cannot.
    """
    use = bool(plan.get(KEY, True))
    if plan.get(KEY) and (reason := missing(dtype)) is not None:
        raise _refused(reason)
    with compiled_code(use):
        yield
