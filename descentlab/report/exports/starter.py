"""The experiment starter's files: ``job.yaml``, and a folder per run with ``stats.csv``, ``config.yaml``, ``spec.yaml``
and ``done``.

``stats.csv`` has a row per evaluation. train/loss and train/accuracy are means over the updates since the row before;
train/time is the wall time of the block since then, which runs of one ensemble share. ``config.yaml`` has the starter's
keys where a setting corresponds, and all settings under ``descentlab``; ``spec.yaml`` is a study file of the run's
settings, ``job.yaml`` that of all runs. A run that diverged or failed has no ``done``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...analysis.results import ResultsLike
from .series import Series, flat, series, varying

LONGEST = 255  # characters of a file name
_KEYS = {  # the starter's key -> ours, dotted
    "base_lr": "optimizer.lr",
    "optim_alg": "optimizer",
    "momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "ada_eps": "optimizer.eps",
    "lr_schedule": "schedule",
    "warmup_steps": "schedule.warmup_steps",
    "batch_size": "batch_size",
    "dataset": "dataset",
    "model": "model",
    "device": "device",
    "seed_training": "seed",
}


def export(results: ResultsLike, out: Path) -> None:
    """Write the tree into the empty directory ``out``."""
    settings = {run["id"]: run.get("settings") or {} for run in results.runs}
    keys = varying(results.runs)
    study = yaml.safe_load((Path(results.path) / "study.yaml").read_text())
    own = _varying(study, results.runs)
    for path in sorted(Path(results.path).glob("study*.yaml")):  # study.1.yaml … are those of earlier grids
        (out / path.name.replace("study", "job", 1)).write_bytes(path.read_bytes())
    for number, run in enumerate(series(results)):
        folder = out / folder_name(number, str(results.spec.get("study", "study")), run, keys)
        folder.mkdir()
        (folder / "stats.csv").write_text(_stats(run), encoding="utf-8")
        (folder / "config.yaml").write_text(_config(run, settings[run.id]), encoding="utf-8")
        (folder / "spec.yaml").write_text(_document(study, settings[run.id], own), encoding="utf-8")
        if run.status == "done":
            (folder / "done").touch()


def abbreviation(key: str) -> str:
    """The first three letters of every part of a key: ``bat_siz``, ``opt_lr``."""
    return "_".join(part[:3] for part in key.replace(".", "_").split("_"))


def folder_name(number: int, study: str, run: Series, keys: Sequence[str]) -> str:
    """``012_training+bat_siz=8+opt_lr=0.25+rep=3``; keys whose abbreviations collide are written out, and a name longer
    than a file system takes is cut and ends in a digest of what it would have been."""
    short = [abbreviation(key) for key in keys]
    labels = [key if short.count(s) > 1 else s for key, s in zip(keys, short, strict=True)]
    parts = [f"{label}={run.settings[key]}" for label, key in zip(labels, keys, strict=True) if key in run.settings]
    parts += [f"rep={run.settings['replicate']}"]
    if run.settings.get("role") not in ("", "plain"):
        parts.append(str(run.settings["role"]))
    name = "+".join([f"{number:03d}_{study}", *parts]).replace(" ", "").replace("/", "-")
    if len(name.encode()) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name.encode()[: LONGEST - 13].decode(errors="ignore") + "+" + digest


def _stats(run: Series) -> str:
    """An unnamed index, the training columns, and loss and accuracy of every evaluation set for the last weights."""
    sets = [s for s in ("validation", "test") if any(f"{s}_loss" in metrics for _, _, metrics in run.rows)]
    head = ["train/loss", "train/accuracy", "train/time", "train/seen_examples", "train/learning_rate"]
    head += [f"{s}/last/{what}" for s in sets for what in ("loss", "accuracy")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *head])
    index, before, since = 0, 0.0, []
    for _, wall, metrics in run.rows:
        since.append(metrics)
        if sets and not any(f"{s}_loss" in metrics for s in sets):
            continue
        row = [_mean(since, "train_loss"), _mean(since, "train_accuracy"), wall - before]
        row += [metrics.get("samples"), metrics.get("lr")]
        row += [metrics.get(f"{s}_{what}") for s in sets for what in ("loss", "accuracy")]
        writer.writerow([index, *("" if value is None else value for value in row)])
        index, before, since = index + 1, wall, []
    return text.getvalue()


def _mean(rows: Sequence[Mapping[str, float]], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else None


def _document(study: Mapping[str, Any], settings: Mapping[str, Any], varying: Collection[str]) -> str:
    """The study's file for one cell, of which the run is a replicate: with that cell's blocks in place of the grid."""
    document = {key: value for key, value in study.items() if key != "grid"}
    return yaml.safe_dump({**document, **{key: settings[key] for key in settings if key in varying}}, sort_keys=False)


def _varying(study: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> set[str]:
    """First names of the keys that the grid is over, or that differ between runs."""
    blocks: dict[str, list[Any]] = {}
    for run in runs:
        for key, value in (run.get("settings") or {}).items():
            held = blocks.setdefault(key, [])
            if value not in held:
                held.append(value)
    found = {key for key, values in blocks.items() if len(values) > 1}
    return found | {key for name in _names(study.get("grid")) for key in re.findall(r"\w+", name) if key in blocks}


def _names(grid: Any) -> list[str]:
    """Every key of a grid, in sub-grids too."""
    if isinstance(grid, Mapping):
        return [*map(str, grid), *(name for value in grid.values() for name in _names(value))]
    return [name for value in grid for name in _names(value)] if isinstance(grid, list) else []


def _config(run: Series, settings: Mapping[str, Any]) -> str:
    own = flat(settings)
    known = {key: own[ours] for key, ours in _KEYS.items() if ours in own}
    document = {**known, "replicate": run.settings["replicate"], "status": run.status, "descentlab": dict(settings)}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
