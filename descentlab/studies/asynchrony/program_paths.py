"""What the report draws of stored files: trajectories on the loss landscape, and the timelines of real processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.errors import UserError
from ...engine.journal import read_ticks
from ...engine.trajectory import PREFIX
from ...observe.landscape import Surface, landscape
from ...store import RunDirectory
from ...workloads.base import Workload
from .program import _data
from .spec import AsynchronySpec

SAMPLES, RESOLUTION = 256, 17  # of the plane; descentlab landscape makes finer ones
MOST_WEIGHTS = 200_000  # of a model whose plane takes seconds


def trails(folder: Path, names: Mapping[str, str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Stored weights of the runs ``names`` (id -> name): name -> (steps ``[T]``, weights ``[T, n]``)."""
    directory = RunDirectory.open(folder)
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for key in directory.block_keys():
        for file in sorted((directory.block_folder(key) / "artifacts").glob(f"{PREFIX}*.npz")):
            with np.load(file, allow_pickle=False) as held:
                runs = held["runs"].tolist()
                for run in set(runs) & names.keys():
                    found.setdefault(run, []).append((int(held["step"]), held["weights"][runs.index(run)]))
    return {
        name: (np.array([step for step, _ in found[run]]), np.stack([weights for _, weights in found[run]]))
        for run, name in names.items()
        if run in found
    }


def surface(settings: Mapping[str, Any], paths: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Surface:
    """The training loss on the plane of the two principal components of ``paths``.

    Raises:
        UserError: for a model of more than :data:`MOST_WEIGHTS` weights.
    """
    weights = next(iter(paths.values()))[1].shape[1]
    if weights > MOST_WEIGHTS:
        raise UserError("model", settings["model"]["name"], f"at most {MOST_WEIGHTS} weights; it has {weights}")
    cell = AsynchronySpec.model_validate(settings)
    square = getattr(cell, "loss", "auto") == "square"
    work = Workload.of(_data(cell), cell.model.build(), dtype=torch.float64, device=torch.device("cpu"), square=square)
    data = work.data.x_train[:SAMPLES], work.data.y_train[:SAMPLES]
    rows = {name: held for name, (_, held) in paths.items()}
    made = landscape(work.make(), work.loss, data, paths=rows, resolution=RESOLUTION)
    return made._replace(paths=[path._replace(steps=paths[path.name][0][path.steps]) for path in made.paths])


def recorded(folder: Path, run: str, steps: int) -> list[tuple[float, tuple[int, ...], float]]:
    """(time, workers, mean staleness) of the first updates of a run on real processes, from its log."""
    directory = RunDirectory.open(folder)
    for block in directory.read_json("plan.json")["blocks"]:
        if run in block["runs"]:
            ticks = read_ticks(directory.block_folder(block["key"]) / "timeline.jsonl")[:steps]
            return [(tick.time_s, tick.workers, float(np.mean(tick.staleness(t)))) for t, tick in enumerate(ticks)]
    return []
