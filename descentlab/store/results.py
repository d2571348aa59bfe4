"""Reading a run directory back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ..core.errors import StudyError
from .directory import RunDirectory
from .progress import states
from .table import build_frame, collect_hits, read_table, refresh, stored_hits

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, where PyYAML was built with libyaml


@dataclass(frozen=True)
class Results:
    """Everything a run directory holds, read once.

    ``study`` is study.yaml as written, ``spec`` the settings all runs have in common (nested; what varies is a column
    of ``frame``), ``runs`` resolved.jsonl, ``status`` one row per run, ``campaign`` the planned perturbations, ``hits``
    the realised ones, ``frame`` the one table: a row per (run, step, attempt). To be read only: runs of one cell share
    their settings.
    """

    path: Path
    study: dict[str, Any]
    spec: dict[str, Any]
    runs: list[dict[str, Any]]
    status: list[dict[str, Any]]
    campaign: list[dict[str, Any]]
    hits: list[dict[str, Any]]
    provenance: dict[str, Any]
    frame: pl.DataFrame


def load(path: str | Path) -> Results:
    """Read the run directory ``path``, finished or not; rebuilds table.parquet when it is missing or out of date.

    A directory that may not be written to is read all the same, without storing the rebuilt table. Raises
    :class:`UserError` when descentlab did not make it, :class:`StudyError` naming a damaged file.
    """
    directory = RunDirectory.open(path)
    frame = read_table(directory)
    current = frame is not None
    if frame is None:
        frame = refresh(directory) if os.access(directory.path, os.W_OK) else build_frame(directory)
    runs = directory.read_jsonl("resolved.jsonl", repeated="settings")
    return Results(
        path=directory.path,
        study=_study(directory.path / "study.yaml"),
        spec=common([run.get("settings") or {} for run in runs]),
        runs=runs,
        status=[run.to_row() for run in states(directory, [str(run["id"]) for run in runs]).runs],
        campaign=directory.read_jsonl("campaign.jsonl"),
        hits=stored_hits(directory) if current else collect_hits(directory),
        provenance=directory.read_json("provenance.json"),
        frame=frame,
    )


def common(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The nested settings on which all agree."""
    same = [a is b or a == b for a, b in pairwise(settings)]  # replicates have the same
    distinct = [s for i, s in enumerate(settings) if i == 0 or not same[i - 1]]
    if not distinct:
        return {}
    first, *rest = distinct
    shared: dict[str, Any] = {}
    for key, value in first.items():
        others = [other[key] for other in rest if key in other]
        if len(others) < len(rest):
            continue
        if isinstance(value, Mapping) and all(isinstance(other, Mapping) for other in others):
            if inner := common([value, *others]):
                shared[key] = inner
        elif all(other == value for other in others):
            shared[key] = value
    return shared


def _study(path: Path) -> dict[str, Any]:
    try:
        value = yaml.load(path.read_text(), LOADER)
    except (OSError, yaml.YAMLError) as error:
        raise StudyError(f"{path} cannot be read ({type(error).__name__}); run the study again to restore it") from None
    return value if isinstance(value, dict) else {}
