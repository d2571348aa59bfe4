"""A finished or unfinished directory of the diffusion study, read for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...analysis.results import ResultsLike, value_text
from ...core.errors import StudyError
from ...store import RunDirectory

Arrays = Mapping[str, np.ndarray]
FILES = {
    "sgd": "theta.npz",
    "gd": "theta.npz",
    "curvature": "curvature.npz",
    "hessians": "hessians.npz",
    "sgd_cloud": "cloud.npz",
    "gd_control": "path.npz",
    "val_loss": "losses.npz",
    "score": "score.npz",
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
    hessians: Mapping[str, Any] | None

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
    """Every cloud of the study, by learning rate and loader: ``lr=0.01`` with replacement, ``lr=0.01/shuffle``."""
    cells: dict[int, Mapping[str, Any]] = {}
    for run in results.runs:
        cells.setdefault(int(run["cell"]), run["settings"])
    members: dict[int, set[str]] = {}
    for run in results.runs:
        if run["role"] == "sgd_cloud":
            members.setdefault(int(run["cell"]), set()).add(str(run["id"]))
    names = _names({cell: cells[cell] for cell in members})
    found = []
    for cell, own in sorted(members.items(), key=lambda item: _order(cells[item[0]])):
        blocks = [b for b in stages.named("sgd_cloud") if not own.isdisjoint(b["runs"])]
        keys = {b["key"] for b in blocks}
        after = {
            stage: next((b for b in stages.named(stage) if keys & set(b["needs"]["sgd_cloud"])), None)
            for stage in ("score", "val_loss")
        }
        alike = {stage: _alike(stages.named(stage), cells[cell], stage) for stage in ("gd_control", "hessians")}
        settings = cells[cell]
        one = Cloud(names[cell], settings, after["score"], after["val_loss"], blocks, *alike.values())
        found.append(one)
    return found


def _order(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return settings["optimizer"]["lr"], settings["sampler"]["name"] != "replacement"


def _alike(blocks: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], stage: str) -> Mapping[str, Any] | None:
    """The block of a stage that agrees with a cloud's settings: of the control in the optimizer, of the run along
    which Hessians were measured in the loader as well."""
    keys = ("optimizer",) if stage == "gd_control" else ("optimizer", "sampler")
    same = [b for b in blocks if all(b["settings"][key] == settings[key] for key in keys)]
    return same[0] if same else None


def _names(cells: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """``lr=0.01``, with the loader where it is not replacement, and the cell's number where that is not enough."""
    names = {}
    for cell, settings in cells.items():
        loader = settings["sampler"]["name"]
        names[cell] = f"lr={value_text(float(settings['optimizer']['lr']))}" + (
            "" if loader == "replacement" else f"/{loader}"
        )
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {cell: f"{name}/cell={cell}" if name in twice else name for cell, name in names.items()}
