"""A finished or unfinished directory of the diffusion study, read for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ...analysis.results import ResultsLike, value_text
from ...core.errors import StudyError, UserError
from ...store import RunDirectory
from .spec import OF_ALL, READS, DiffusionSpec, before

Arrays = Mapping[str, np.ndarray]
NAMING = ("dataset", "model", "dtype", "batch_size", "seed", "reference", "theory")  # what else tells clouds apart
BESIDE = ("gd_control", "hessians")  # stages that start where a cloud does and need none
SPECTRA = ("eigenvalues", "nodes")  # of hessians.npz, [runs, steps, ...]
FILES = {
    "sgd": "theta.npz",
    "gd": "theta.npz",
    "curvature": "curvature.npz",
    "hessians": "hessians.npz",
    "sgd_cloud": "cloud.npz",
    "gd_control": "path.npz",
    "val_loss": "losses.npz",
    "score": "score.npz",
    "statistics": "statistics.npz",
    "language": "language.npz",
}


@dataclass
class Stages:
    """The blocks of the current runs by stage; what a block holds is read when asked for."""

    path: Path
    blocks: Sequence[Mapping[str, Any]]
    _read: dict[str, Arrays] = field(default_factory=dict)

    @classmethod
    def of(cls, results: ResultsLike) -> Stages:
        path = Path(results.path)
        current = {str(run["id"]) for run in results.runs}
        directory = RunDirectory.open(path)
        found = [b for b in directory.read_json("plan.json").get("blocks", []) if not current.isdisjoint(b["runs"])]
        return cls(path, [b for b in found if (directory.block_folder(b["key"]) / "done.json").is_file()])

    def named(self, stage: str) -> list[Mapping[str, Any]]:
        """The finished blocks of a stage."""
        return [b for b in self.blocks if b["stage"] == stage]

    def arrays(self, block: Mapping[str, Any]) -> Arrays:
        """What a block has made."""
        key = str(block["key"])
        if key not in self._read:
            file = self.path / "blocks" / key / "artifacts" / FILES[str(block["stage"])]
            try:
                with np.load(file) as held:
                    self._read[key] = dict(held)
            except (OSError, ValueError) as error:
                raise StudyError(f"{file} cannot be read ({error}); delete its block to compute it again") from None
            if block["stage"] == "hessians" and any(v.ndim == 2 for k, v in self._read[key].items() if k in SPECTRA):
                raise StudyError(f"{file} was written by an earlier version, for one run; run the study again")
        return self._read[key]

    def before(self, block: Mapping[str, Any], stage: str) -> list[Mapping[str, Any]]:
        """The blocks of ``stage`` that ``block`` continues, directly or not."""
        needed = {key for keys in block["needs"].values() for key in keys}
        own = [b for b in self.blocks if b["key"] in needed]
        found = [b for b in own if b["stage"] == stage]
        return found or next((deeper for b in own if (deeper := self.before(b, stage))), [])


@dataclass(frozen=True)
class Cloud:
    """One cloud: its name in summary.json, its settings, and the blocks it is in."""

    name: str
    settings: Mapping[str, Any]
    score: Mapping[str, Any] | None
    losses: Mapping[str, Any] | None
    members: Sequence[Mapping[str, Any]]
    control: Mapping[str, Any] | None
    hessians: Sequence[Mapping[str, Any]]
    statistics: Mapping[str, Any] | None = None
    language: Mapping[str, Any] | None = None

    @property
    def lr(self) -> float:
        return float(self.settings["optimizer"]["lr"])

    @property
    def sampler(self) -> str:
        return str(self.settings["sampler"]["name"])

    @cached_property
    def label(self) -> str:
        """For legends: ``lr 0.01, shuffle``."""
        return self.name.removeprefix("lr=").replace("/", ", ").join(["lr ", ""])


def clouds_of(results: ResultsLike, stages: Stages) -> list[Cloud]:
    """Every cloud of the study, by learning rate and loader: ``lr=0.01`` with replacement, ``lr=0.01/shuffle``. A cell
    that differs from another in its theory alone has no runs of its own but its score: it is a cloud of the other's
    runs."""
    cells: dict[int, Mapping[str, Any]] = {}
    owned: dict[int, set[str]] = {}
    scored: dict[int, set[str]] = {}
    for run in results.runs:
        cell = int(run["cell"])
        cells.setdefault(cell, run["settings"])
        for role, where in (("sgd_cloud", owned), ("score", scored)):
            if run["role"] == role:
                where.setdefault(cell, set()).add(str(run["id"]))
    members = {
        cell: [b for b in stages.named("sgd_cloud") if not own.isdisjoint(b["runs"])] for cell, own in owned.items()
    }
    for cell in scored.keys() - owned.keys():
        needed = {k for b in stages.named("score") if scored[cell] & set(b["runs"]) for k in b["needs"]["sgd_cloud"]}
        if needed:
            members[cell] = [b for b in stages.named("sgd_cloud") if b["key"] in needed]
    names = _names({cell: cells[cell] for cell in members})
    beside = {stage: [(b, _identity(b["settings"], stage)) for b in stages.named(stage)] for stage in BESIDE}
    found = []
    for cell, blocks in sorted(members.items(), key=lambda item: _order(cells[item[0]])):
        settings, keys = cells[cell], {b["key"] for b in blocks}
        after = {stage: _after(stages.named(stage), keys, settings, stage) for stage in OF_ALL}
        read = {stage: _identity(settings, stage) for stage in BESIDE}
        alike = {stage: [b for b, own in beside[stage] if own == read[stage]] for stage in BESIDE}
        control = next(iter(alike["gd_control"]), None)
        own_blocks = (after["score"], after["val_loss"], blocks, control, alike["hessians"])
        found.append(Cloud(names[cell], settings, *own_blocks, after["statistics"], after["language"]))
    return found


def _after(
    blocks: Sequence[Mapping[str, Any]], keys: set[str], settings: Mapping[str, Any], stage: str
) -> Mapping[str, Any] | None:
    """The block of a stage that was made of the cloud ``keys`` with the cell's own settings."""
    made = [b for b in blocks if keys & set(b["needs"]["sgd_cloud"])]
    return next((b for b in made if all(b["settings"][k] == settings[k] for k in READS[stage])), None)


def _order(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return settings["optimizer"]["lr"], settings["sampler"]["name"] != "replacement"


def _identity(settings: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """What a stage and those before it read of the settings; what an earlier version did not have is at its default.
    Settings that this version does not know are compared as they stand."""
    try:
        return DiffusionSpec.model_validate(settings).identity_of(stage)
    except (ValidationError, UserError):
        read = [key for name in (*before(stage), stage) for key in READS[name]]
        held = {key.partition(".")[0]: settings.get(key.partition(".")[0]) for key in read}
        return {**held, **({"hessians": {**settings["hessians"], "runs": 0}} if stage == "hessians" else {})}


def pull_of(block: Mapping[str, Any]) -> float:
    """Strength of the pull that a block's gradients and Hessians have (``reference.gd.localise``)."""
    return float(block["settings"]["reference"]["gd"].get("localise", 0.0))


def merged_hessians(blocks: Sequence[Arrays]) -> Arrays:
    """The arrays of all runs, from blocks that hold some each."""
    first = blocks[0]
    return {k: v if k == "steps" else np.concatenate([b[k] for b in blocks]) for k, v in first.items()}


def _names(cells: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """``lr=0.01``, with the loader where it is not replacement, and with what else differs between cells that would
    have one name (``lr=0.01/model=mlp/seed=1``); the cell's number where that is not enough."""
    names = {}
    for cell, settings in cells.items():
        loader = settings["sampler"]["name"]
        names[cell] = f"lr={value_text(float(settings['optimizer']['lr']))}" + (
            "" if loader == "replacement" else f"/{loader}"
        )
    if len(set(names.values())) < len(names):
        for key in NAMING:
            texts = {cell: _text(settings[key], key) for cell, settings in cells.items()}
            if len(set(texts.values())) > 1:
                shown = "localise" if key == "reference" else key
                names = {cell: f"{name}/{shown}={texts[cell]}" for cell, name in names.items()}
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {cell: f"{name}/cell={cell}" if name in twice else name for cell, name in names.items()}


def _text(value: Any, key: str) -> str:
    if key == "reference":
        return value_text(float(value["gd"].get("localise", 0.0)))
    shown = "closure" if key == "theory" else "name"
    return str(value[shown]) if isinstance(value, Mapping) and shown in value else str(value)
