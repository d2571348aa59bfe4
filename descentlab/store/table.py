"""The one frame of a run directory: one row per (run, step, attempt), observables, and the settings that vary."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl

from ..core.errors import StudyError
from .atomic import write_bytes
from .directory import RunDirectory
from .parts import NO_ROWS, BlockData, cover_text, read_block, read_cover

TABLE, HITS = "table.parquet", "hits.jsonl"
KEYS = list(NO_ROWS)
# Columns that may differ between two executions of the same study; comparisons drop them.
VOLATILE = ("wall_s", "timestamp", "cpu_percent", "rss_mb")
CONFIG = ("cell", "replicate", "role", "optimizer")
TABLE_VERSION = "3"  # raised when the table made from the same blocks changes


def build_frame(directory: RunDirectory) -> pl.DataFrame:
    """The frame of all runs in resolved.jsonl that have rows yet, sorted by run, step, attempt.

    Only rows that a checkpoint or a finished block vouches for are in it. Numbers are Int64 and Float64; NaN and
    infinity stay, null means "not measured on this row". Raises :class:`StudyError` naming a damaged file.
    """
    runs = directory.read_jsonl("resolved.jsonl", repeated="settings")
    return _frame(directory, runs, *_blocks(directory, {str(run["id"]) for run in runs}))


def _frame(
    directory: RunDirectory, runs: list[dict[str, Any]], blocks: list[BlockData], owner: Mapping[str, str]
) -> pl.DataFrame:
    frames = [_in_order(_own_rows(block, owner))[0] for block in blocks]  # while a block's columns fit in the cache
    rows = pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame(schema=NO_ROWS)
    rows, duplicates = _in_order(rows)
    rows = _widen(rows)
    if duplicates:
        raise StudyError(f"{directory.path}: {duplicates} rows share their run, step and attempt with another row")
    config = config_columns(runs, directory.read_jsonl("campaign.jsonl"), taken=set(rows.columns) - {"run"})
    return rows.join(config, on="run", how="left", maintain_order="left")


def _in_order(rows: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Sorted by run, step and attempt, and how many rows share theirs with another one."""
    if not rows.height:
        return rows, 0
    names = rows["run"].unique().sort()
    key, size = rows["run"].cast(pl.Enum(names)).to_physical().cast(pl.Int64), len(names)
    for name in ("step", "attempt"):  # all three as one number, which is sorted ten times as fast
        low, high = int(rows[name].min()), int(rows[name].max())  # type: ignore[arg-type]
        key, size = key * (high - low + 1) + (rows[name].cast(pl.Int64) - low), size * (high - low + 1)
    if size >= 2**63:
        return rows.sort(KEYS), rows.height - rows.select(KEYS).unique().height
    order = key.arg_sort()
    return rows[order], int((key.gather(order).diff() == 0).sum())


def refresh(directory: RunDirectory) -> pl.DataFrame:
    """Build the frame and write what is derived from the blocks: table.parquet, hits.jsonl and runs.jsonl."""
    from .progress import states

    stamp = fingerprint(directory)
    runs = directory.read_jsonl("resolved.jsonl", repeated="settings")
    ids = [str(run["id"]) for run in runs]
    blocks, owner = _blocks(directory, set(ids))
    frame = _frame(directory, runs, blocks, owner)
    write_bytes(directory.path / HITS, b"".join(line + b"\n" for _, line in _hits(blocks, owner)))
    directory.replace_jsonl("runs.jsonl", [run.to_row() for run in states(directory, ids).runs])
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="snappy", metadata={"descentlab": stamp})
    write_bytes(directory.path / TABLE, buffer.getvalue())
    return frame


def collect_hits(directory: RunDirectory) -> list[dict[str, Any]]:
    """Realised perturbations of the current runs, by case, optimizer, run and step."""
    current = {str(run["id"]) for run in directory.read_jsonl("resolved.jsonl")}
    return [hit for hit, _ in _hits(*_blocks(directory, current))]


def _hits(blocks: list[BlockData], owner: Mapping[str, str]) -> list[tuple[dict[str, Any], bytes]]:
    """With the line each is written as."""
    kept = [
        (hit, line)
        for block in blocks
        for hit, line in zip(block.hits, block.lines, strict=True)
        if owner.get(str(hit.get("run"))) == block.key
    ]
    return sorted(kept, key=lambda pair: _place(pair[0]))


def _place(hit: Mapping[str, Any]) -> tuple[Any, ...]:
    return hit.get("case", -1), str(hit.get("optimizer")), str(hit["run"]), hit.get("step", -1)


def stored_hits(directory: RunDirectory) -> list[dict[str, Any]]:
    """hits.jsonl, which :func:`refresh` wrote beside a table that is up to date; made again where it is not whole."""
    if (directory.path / HITS).is_file():
        with suppress(StudyError):
            return directory.read_jsonl(HITS)
    return collect_hits(directory)


def leftovers(path: str | Path) -> list[str]:
    """Runs that have rows but are no longer in resolved.jsonl, sorted: they stay on the disk and out of the table."""
    directory = RunDirectory.open(path)
    current = {str(run["id"]) for run in directory.read_jsonl("resolved.jsonl")}
    found: set[str] = set()
    for key in directory.block_keys():
        folder = directory.block_folder(key)
        cover = read_cover(folder)
        if cover is not None and cover.status:  # what has ended names its runs
            found |= {str(run["run"]) for run in cover.status}
        elif (block := read_block(folder)) is not None:
            found |= set(block.frame["run"].unique())
    return sorted(found - current)


def fingerprint(directory: RunDirectory) -> str:
    """Hash of everything the table is made from; by content, so a copied directory keeps its table."""
    digest = hashlib.sha256(TABLE_VERSION.encode())
    for name in ("resolved.jsonl", "campaign.jsonl"):
        path = directory.path / name
        digest.update(b"%s %s" % (name.encode(), path.read_bytes() if path.is_file() else b""))
    for key in directory.block_keys():
        if (cover := cover_text(directory.block_folder(key))) is not None:
            digest.update(b"%s %s" % (key.encode(), cover))
    return digest.hexdigest()


def read_table(directory: RunDirectory) -> pl.DataFrame | None:
    """The stored table, or None when it is missing, damaged or older than the blocks."""
    path = directory.path / TABLE
    try:
        if pl.read_parquet_metadata(path).get("descentlab") != fingerprint(directory):
            return None
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError):
        return None


def _read_blocks(directory: RunDirectory) -> list[BlockData]:
    found = (read_block(directory.block_folder(key)) for key in directory.block_keys())
    return [block for block in found if block is not None]


def _blocks(directory: RunDirectory, current: set[str]) -> tuple[list[BlockData], dict[str, str]]:
    """All blocks, and for every current run the one block it is taken from.

    A run is in two blocks only after the packing was changed: a finished block wins, then the one with more rows.
    """
    blocks = _read_blocks(directory)
    held = [set(block.frame["run"].unique()) & current for block in blocks]
    owner = {run: block.key for block, runs in zip(blocks, held, strict=True) for run in runs}
    if len(owner) == sum(map(len, held)):
        return blocks, owner
    best: dict[str, tuple[bool, int, str]] = {}
    for block in blocks:
        for run, rows in block.frame.group_by("run").len().iter_rows():
            if run in current:
                best[run] = max(best.get(run, (False, 0, "")), (block.cover.done, rows, block.key))
    return blocks, {run: key for run, (_, _, key) in best.items()}


def _own_rows(block: BlockData, owner: Mapping[str, str]) -> pl.DataFrame:
    runs = block.frame["run"].unique()
    own = [run for run in runs if owner.get(run) == block.key]
    return block.frame if len(own) == len(runs) else block.frame.filter(pl.col("run").is_in(own))


def _widen(frame: pl.DataFrame) -> pl.DataFrame:
    """Integers to Int64 and floats to Float64 (exact), so that the schema does not depend on a writer's dtypes."""
    selectors = pl.selectors
    return frame.with_columns(
        selectors.integer().cast(pl.Int64),
        selectors.float().cast(pl.Float64),
        selectors.by_dtype(pl.Null).cast(pl.Float64),
    )


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; the ``name`` of a block stands under the block's key (``optimizer`` = "adam")."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if "name" in value:
                flat[path] = value["name"]
            flat.update(flatten({k: v for k, v in value.items() if k != "name"}, f"{path}."))
        else:
            flat[path] = value
    return flat


def config_columns(
    runs: Sequence[Mapping[str, Any]], campaign: Iterable[Mapping[str, Any]], taken: set[str]
) -> pl.DataFrame:
    """One row per run: cell, replicate, role, optimizer, every setting that varies, labels, and the planned hit.

    The hit (``hit_step``, ``layer``, ``value``) is the one planned for the run, see :func:`planned_for`; a twin carries
    the hit it was spared. A setting whose name is ``taken`` by an observable becomes ``settings.<name>``.
    """
    flat = _flattened(runs)
    once = list({id(settings): settings for settings in flat}.values())
    names = dict.fromkeys(name for settings in once for name in settings)
    varying = [n for n in names if n not in CONFIG and len({json.dumps(s.get(n)) for s in once}) > 1]
    planned = planned_for(runs, campaign)
    columns: dict[str, list[Any]] = {"run": [str(run["id"]) for run in runs]}
    for name in ("cell", "replicate", "role"):
        columns[name] = [run.get(name) for run in runs]
    columns["optimizer"] = [s.get("optimizer") for s in flat]
    for name in varying:
        column = f"settings.{name}" if name in taken or name in columns else name
        columns[column] = _one_type([s.get(name) for s in flat])
    for name in dict.fromkeys(name for run in runs for name in run.get("labels") or {}):
        columns.setdefault(name, _one_type([(run.get("labels") or {}).get(name) for run in runs]))
    if planned:
        hits = [planned.get(str(run["id"]), {}) for run in runs]
        columns.setdefault("hit_step", [hit.get("step") for hit in hits])
        columns.setdefault("layer", _one_type([hit.get("layer") for hit in hits]))
        columns.setdefault("value", _one_type([(hit.get("rule") or {}).get("value") for hit in hits]))
    types = {"run": pl.String, "cell": pl.Int64, "replicate": pl.Int64, "role": pl.String, "optimizer": pl.String}
    return _widen(pl.DataFrame(columns, schema_overrides=types, strict=False))


def _flattened(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings of every run, flat; runs of one cell that have the same share one dictionary."""
    known: dict[Any, tuple[Any, dict[str, Any]]] = {}
    found = []
    for run in runs:
        own = run.get("settings") or {}
        of_cell = known.get(run.get("cell"))
        if of_cell is None or of_cell[0] != own:
            of_cell = known[run.get("cell")] = own, flatten(own)
        found.append(of_cell[1])
    return found


def planned_for(
    runs: Iterable[Mapping[str, Any]], campaign: Iterable[Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Run id -> the first line of campaign.jsonl planned for it; a run nothing was planned for is not in it.

    A line is a run's when its case (its replicate, where the study has no cases) is the run's and its ``cells`` hold
    the run's cell: in a grid over faults every cell has its own plan for the same case. A line without ``cells``, as
    written by hand, is for every cell. A cell that plans nothing (a study's fault-free arm) takes the first line of
    its case, so that its rows carry the hit they were spared.
    """
    exact: dict[tuple[str, Any, Any], Mapping[str, Any]] = {}
    loose: dict[tuple[str, Any], Mapping[str, Any]] = {}
    for line in campaign:
        for name in ("case", "replicate"):
            if name in line:
                loose.setdefault((name, line[name]), line)
                for cell in line.get("cells") or ():
                    exact.setdefault((name, line[name], cell), line)
    found: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        labels = run.get("labels") or {}
        key = ("case", labels["case"]) if "case" in labels else ("replicate", run.get("replicate"))
        own = exact.get((*key, run.get("cell"))) or loose.get(key)
        if own is not None:
            found[str(run["id"])] = own
    return found


def _one_type(values: list[Any]) -> list[Any]:
    """Values a column can hold: all booleans, all numbers or all strings; anything mixed or nested as JSON text."""
    present = [v for v in values if v is not None]
    if all(isinstance(v, bool) for v in present) or all(isinstance(v, str) for v in present):
        return values
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in present):
        whole = all(isinstance(v, int) for v in present)
        return values if whole else [None if v is None else float(v) for v in values]
    return [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]


def equal_tables(a: pl.DataFrame, b: pl.DataFrame) -> list[str]:
    """Differences between two tables as values (NaN = NaN, sorted, volatile columns dropped); empty when equal."""
    a, b = (frame.drop(VOLATILE, strict=False) for frame in (a, b))
    differences = [f"column {name} is only in the first table" for name in a.columns if name not in b.columns]
    differences += [f"column {name} is only in the second table" for name in b.columns if name not in a.columns]
    if a.height != b.height:
        return [*differences, f"{a.height} rows against {b.height}"]
    a, b = a.sort(KEYS), b.sort(KEYS)
    for name in (n for n in a.columns if n in b.columns):
        left, right = a[name], b[name]
        if left.dtype != right.dtype:
            differences.append(f"column {name} is {left.dtype} against {right.dtype}")
            continue
        unequal = left.ne_missing(right)  # polars: NaN equals NaN, null equals null
        if unequal.any():
            row = int(unequal.arg_true()[0])
            where = ", ".join(f"{key} {a[key][row]}" for key in KEYS)
            text = f"column {name}: {unequal.sum()} of {a.height} rows differ, first at {where}"
            differences.append(f"{text}: {left[row]!r} against {right[row]!r}")
    return differences
