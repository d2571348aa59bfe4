"""Moments over runs, merged from the blocks of a directory (``observe.reduce=moments``, ``observe.weights``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import polars as pl

from ..core.errors import StudyError
from .directory import RunDirectory

PREFIX = "moments-"


def moments_file(arrays: Mapping[str, np.ndarray]) -> str:
    """The name a block stores these arrays under: by their first step, so that the same is written over the same."""
    first = min(int(arrays[key].min()) for key in ("step", "weights_step") if key in arrays)
    return f"{PREFIX}{first:010d}.npz"


def load_moments(path: str | Path) -> pl.DataFrame | None:
    """One row per (cell, role, step, observable): ``n`` finite values, ``nonfinite`` ones, and of the finite ones
    ``mean``, ``variance`` (divided by n - 1), ``low`` and ``high``. None where the study kept rows.

    Raises :class:`StudyError` for a damaged file.
    """
    tables = [_merged(part) for part in _parts(Path(path), "step", ("n", "nonfinite", "mean", "m2", "low", "high"))]
    if not tables:
        return None
    keys = ["cell", "role", "step", "observable"]
    frame = pl.concat(tables)
    weight = pl.col("n") / pl.col("n").sum()
    mean = (pl.when(pl.col("n") > 0).then(pl.col("mean")).otherwise(0.0) * weight).sum()
    apart = pl.when(pl.col("n") > 0).then(pl.col("n") * (pl.col("mean") - pl.col("_mean")) ** 2).otherwise(0.0)
    frame = frame.with_columns(mean.over(keys).alias("_mean"))
    out = frame.group_by(keys).agg(
        pl.col("n").sum(),
        pl.col("nonfinite").sum(),
        pl.col("_mean").first().alias("mean"),
        (pl.col("m2").sum() + apart.sum()).alias("m2"),
        pl.col("low").min(),
        pl.col("high").max(),
    )
    variance = pl.when(pl.col("n") > 1).then(pl.col("m2") / (pl.col("n") - 1)).otherwise(float("nan"))
    return out.with_columns(variance.alias("variance")).drop("m2").sort(keys)


def load_weights(path: str | Path) -> dict[tuple[int, str], dict[str, np.ndarray]]:
    """(cell, role) -> ``step`` ``[S]``, ``n`` ``[S]`` (members with finite weights), ``mean`` ``[S, C]`` and
    ``covariance`` ``[S, C]`` (variances) or ``[S, C, C]``, divided by n - 1; empty where weights were not kept."""
    out: dict[tuple[int, str], dict[int, tuple[int, np.ndarray, np.ndarray]]] = {}
    for owner, arrays in _parts(Path(path), "weights_step", ("n", "mean", "m2"), "weights_"):
        for i, group in enumerate(arrays["group"]):
            of = out.setdefault(owner[int(group)], {})
            new = int(arrays["n"][i]), arrays["mean"][i], arrays["m2"][i]
            step = int(arrays["step"][i])
            of[step] = _chan(of[step], new) if step in of else new
    return {who: _stacked(steps) for who, steps in out.items()}


Moment = tuple[int, np.ndarray, np.ndarray]  # n, mean, M2


def _chan(a: Moment, b: Moment) -> Moment:
    """Chan, Golub and LeVeque (1979): the moments of two samples together."""
    if a[0] == 0 or b[0] == 0:
        return b if a[0] == 0 else a
    n, gap = a[0] + b[0], b[1] - a[1]
    square = np.outer(gap, gap) if a[2].ndim == 2 else gap**2
    return n, a[1] + gap * (b[0] / n), a[2] + b[2] + square * (a[0] * b[0] / n)


def _stacked(steps: Mapping[int, Moment]) -> dict[str, np.ndarray]:
    order = sorted(steps)
    n = np.array([steps[s][0] for s in order])
    squares = np.stack([steps[s][2] for s in order])
    with np.errstate(divide="ignore", invalid="ignore"):
        covariance = squares / (n - 1.0).reshape(-1, *[1] * (squares.ndim - 1))
    return {
        "step": np.array(order),
        "n": n,
        "mean": np.stack([steps[s][1] for s in order]),
        "covariance": covariance,
    }


Owners = dict[int, tuple[int, str]]  # group -> (cell, role)


def _parts(path: Path, key: str, names: tuple[str, ...], prefix: str = "") -> Iterator[tuple[Owners, dict[str, Any]]]:
    """What each block kept: the cells of its groups and the arrays. A step that was computed again after a kill is in
    two files with the same numbers; the later file counts."""
    directory = RunDirectory.open(path)
    runs = {str(run["id"]): (int(run["cell"]), str(run["role"])) for run in directory.read_jsonl("resolved.jsonl")}
    for block in directory.block_keys():
        files = sorted((directory.block_folder(block) / "artifacts").glob(f"{PREFIX}*.npz"))
        held = [a for a in map(_read, files) if key in a]
        if not held:
            continue
        owner = {
            int(group): runs[run]
            for a in held
            for run, group in zip(a["runs"].tolist(), a["run_groups"], strict=True)
            if run in runs
        }
        if not owner:  # of an earlier grid
            continue
        wanted = [n for n in ("step", "group", "column", *names) if f"{prefix}{n}" in held[0]]
        starts = [int(a[key].min()) for a in held]
        cut = [*starts[1:], None]
        keep = [np.ones(len(a[key]), bool) if c is None else a[key] < c for a, c in zip(held, cut, strict=True)]
        joined = {n: np.concatenate([a[f"{prefix}{n}"][k] for a, k in zip(held, keep, strict=True)]) for n in wanted}
        known = np.isin(joined["group"], list(owner))
        yield owner, {name: array[known] for name, array in joined.items()}


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file) as held:
            return dict(held)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise StudyError(f"{path} cannot be read ({error}); run the study with --overwrite") from None


def _merged(part: tuple[Owners, dict[str, Any]]) -> pl.DataFrame:
    """One block's lines under the cells they belong to."""
    owner, arrays = part
    groups = arrays.pop("group")
    cells = np.array([owner[int(g)][0] for g in groups], dtype=np.int64)
    roles = [owner[int(g)][1] for g in groups]
    return pl.DataFrame({"cell": cells, "role": roles, "observable": arrays.pop("column"), **arrays})
