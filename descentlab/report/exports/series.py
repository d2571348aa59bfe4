"""A finished study as loggers see it: one named run with its settings, and metrics over steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from ...analysis.results import MEASURES, ResultsLike, last_attempts

_NO_METRICS = {"step", "attempt", "wall_s", "timestamp", "alarm", "action"}


@dataclass(frozen=True)
class Series:
    """One run: its ``name`` (unique, readable), ``settings`` (flat, dotted), ``status`` and rows (step, wall seconds,
    metric -> value; what was not measured at a step is absent)."""

    id: str
    name: str
    group: str
    status: str
    settings: Mapping[str, Any]
    rows: Sequence[tuple[int, float, dict[str, float]]]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``optimizer.lr``; an option's name stands under its own key (``optimizer``)."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            out |= {f"{prefix}{key}" if k == "name" else k: v for k, v in flat(value, f"{prefix}{key}.").items()}
        else:
            out["name" if key == "name" and prefix else f"{prefix}{key}"] = value
    return out


def varying(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings on which the runs differ, in their order."""
    settings = [flat(run.get("settings") or {}) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


def names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """``adam,lr=0.01,replicate=0,fault``: what varies, the replicate, the role; the id where that is not unique."""
    keys = varying(runs)
    out = []
    for run in runs:
        settings = flat(run.get("settings") or {})
        parts = [f"{key.rsplit('.', 1)[-1]}={settings[key]}" for key in keys if key in settings]
        role = [str(run["role"])] if run.get("role") not in (None, "plain") else []
        out.append(",".join([*parts, f"replicate={run['replicate']}", *role]))
    return [f"{name},{run['id']}" if out.count(name) > 1 else name for name, run in zip(out, runs, strict=True)]


def series(results: ResultsLike) -> Iterator[Series]:
    """Every run of the study that has rows, in the study's order."""
    frame = last_attempts(results.frame)
    measures = [
        name
        for name, kind in frame.schema.items()
        if kind.is_numeric() and name not in _NO_METRICS and (name in MEASURES or _extra(name))
    ]
    status = {row["run"]: str(row["status"]) for row in results.status}
    parts = {key[0]: part for key, part in frame.group_by("run")}
    for run, name in zip(results.runs, names(results.runs), strict=True):
        part = parts.get(run["id"])
        if part is not None:
            yield Series(
                run["id"],
                name,
                f"cell {run['cell']}",
                status.get(run["id"], "queued"),
                {**flat(run.get("settings") or {}), "replicate": run["replicate"], "role": run.get("role", "")},
                _rows(part.sort("step"), measures),
            )


def _extra(name: str) -> bool:
    """Columns of observables that are no setting and no label (a setting's column has a dot or is an option's name)."""
    return name.startswith(("test_", "validation_", "train_"))


def _rows(part: pl.DataFrame, measures: Sequence[str]) -> list[tuple[int, float, dict[str, float]]]:
    walls = part["wall_s"].to_list() if "wall_s" in part.columns else [0.0] * len(part)
    rows = part.select(measures).to_dicts()
    return [
        (int(step), float(wall or 0.0), {k: float(v) for k, v in row.items() if v is not None})
        for step, wall, row in zip(part["step"].to_list(), walls, rows, strict=True)
    ]
