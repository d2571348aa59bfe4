"""The loss landscape around the runs of directories: their stored weights, their model and their data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from ..config.tree import StudySpec
from ..core.errors import StudyError, UserError, nearest
from ..core.streams import Streams
from ..engine.trajectory import PREFIX
from ..observe.landscape import Directions, Surface, landscape
from ..store import RunDirectory
from .block import open_block
from .build import workload

Part = str
PARTS = ("train", "validation", "test")
REMEDY = "a directory with weights along the runs: run its study in a new one with observe.snapshots_every=10"


class Trail:
    """One run's weights: ``steps`` ``[T]``, ``weights`` ``[T, n]``; its cell and replicate."""

    def __init__(self, name: str, cell: StudySpec, replicate: int) -> None:
        self.name, self.cell, self.replicate = name, cell, replicate
        self.steps: list[int] = []
        self.weights: list[np.ndarray] = []


def of_directories(
    directories: Sequence[str | Path],
    *,
    directions: Directions = "pca",
    runs: Sequence[str] = (),
    part: Part = "train",
    samples: int = 1000,
    span: float | None = None,
    resolution: int = 31,
    seed: int = 0,
) -> Surface:
    """The plane through the last weights of the first run, on the first ``samples`` of a ``part`` of the data.

    ``directories``: run directories, or folders that hold some. ``runs``: ids to show, in order, all where empty; an id
    may be cut short. Raises :class:`UserError` where no weights were stored, a run is not there, or models differ.
    """
    if part not in PARTS:
        raise UserError("part", part, f"one of {', '.join(PARTS)}")
    found = _expanded(directories)
    trails = [trail for directory in found for trail in read(directory, prefix=len(found) > 1)]
    if not trails:
        raise UserError("DIR", ", ".join(map(str, directories)), REMEDY)
    trails = _chosen(trails, runs)
    first = trails[0]
    for trail in trails:
        if trail.weights[0].shape != first.weights[0].shape or trail.cell.model != first.cell.model:
            raise UserError("DIR", trail.name, f"runs of one model; '{first.name}' has {first.cell.model.name}")
    work = workload(first.cell)
    model = work.module(Streams(first.cell.seed), first.replicate).cpu()
    x, y = getattr(work.data, f"x_{part}")[:samples].cpu(), getattr(work.data, f"y_{part}")[:samples].cpu()
    if not len(x):
        raise UserError("part", part, f"a part with samples; '{work.data.name}' has none there")
    paths = {trail.name: np.stack(trail.weights) for trail in trails}
    made = landscape(
        model, work.loss, (x, y), paths=paths, directions=directions, span=span, resolution=resolution, seed=seed
    )
    steps = {trail.name: np.array(trail.steps) for trail in trails}
    return made._replace(paths=[path._replace(steps=steps[path.name][path.steps]) for path in made.paths])


def _expanded(directories: Sequence[str | Path]) -> list[Path]:
    """Run directories among ``directories`` and directly in them."""
    out: list[Path] = []
    for given in map(Path, directories):
        inner = sorted(p.parent for p in given.glob("*/descentlab.json"))
        out += [given] if (given / "descentlab.json").exists() or not inner else inner
    return out


def read(path: Path, *, prefix: bool = False) -> list[Trail]:
    """The stored weights of a directory's runs, in the order of the runs; ``prefix``: its name before theirs."""
    directory = RunDirectory.open(path)
    trails: dict[str, Trail] = {}
    for key in directory.block_keys():
        files = sorted((directory.block_folder(key) / "artifacts").glob(f"{PREFIX}*.npz"))
        if not files:
            continue
        block, cell = open_block(directory, key)
        replicates = {run.id: run.replicate for run in block.plan.runs}
        for file in files:
            step, names, weights = _arrays(file)
            for name, row in zip(names, weights, strict=True):
                label = f"{path.name}/{name}" if prefix else name
                trail = trails.setdefault(name, Trail(label, cell, replicates[name]))
                trail.steps.append(step)
                trail.weights.append(row)
    order = [str(run["id"]) for run in directory.read_jsonl("resolved.jsonl")]
    return [trails[name] for name in order if name in trails]


def _arrays(file: Path) -> tuple[int, list[str], np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as held:
            return int(held["step"]), held["runs"].tolist(), held["weights"]
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise StudyError(f"{file} is damaged ({type(error).__name__}); delete it") from None


def _chosen(trails: list[Trail], runs: Sequence[str]) -> list[Trail]:
    out: list[Trail] = []
    for wanted in runs:
        found = [t for t in trails if t.name == wanted] or [t for t in trails if t.name.startswith(wanted)]
        if not found:
            names = [t.name for t in trails]
            raise UserError("--runs", wanted, f"one of {', '.join(names[:20])}", hint=nearest(wanted, names))
        out += [t for t in found if t not in out]
    return out or trails


def landscape_of(source: Any, *arguments: Any, **keywords: Any) -> Surface:
    """The public ``landscape``: of a module, its loss and data (:func:`descentlab.observe.landscape.landscape`), or of
    one or several run directories (:func:`of_directories`)."""
    if isinstance(source, torch.nn.Module):
        return landscape(source, *arguments, **keywords)
    directories = [source] if isinstance(source, str | Path) else list(source)
    return of_directories(directories, *arguments, **keywords)
