"""Weights along the way: what ``observe.snapshots_every`` stores, and where it is read back from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.state import State
from .program import Slot
from .reducing import flattened

PREFIX = "weights-"


def weights_file(step: int, state: State, slots: Sequence[Slot]) -> tuple[str, dict[str, np.ndarray]]:
    """(file name, arrays) after ``step`` updates: ``runs`` ``[R]``, ``weights`` ``[R, n]`` in the order of
    ``named_parameters()``. A member that carries several runs is stored once per run."""
    rows = flattened(state.params, ())
    member = np.repeat(np.arange(len(slots)), [len(slot.runs) for slot in slots])
    names = np.array([run.id for slot in slots for run in slot.runs])
    return f"{PREFIX}{step:010d}.npz", {"step": np.array(step), "runs": names, "weights": rows[member]}


def due(step: int, every: int, slots: Sequence[Slot]) -> bool:
    """Whether weights are stored after ``step`` updates: every so many, and at the end of a run."""
    return bool(every) and (step % every == 0 or any(run.stop == step for slot in slots for run in slot.runs))
