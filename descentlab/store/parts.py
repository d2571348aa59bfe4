"""Metrics parts, hits parts, and the cover that names those which count. No torch: the cover is readable without it."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from ..core.errors import StudyError
from . import jsonl
from .atomic import write_bytes
from .directory import FORMAT, read_json

CHECKPOINT, DONE, FAILED, OWNER = "checkpoint.pt", "done.json", "failed.json", "owner.json"
COVER_MEMBER = "extra/cover.json"  # an additional member of the zip file that torch.save makes; torch.load ignores it
NO_ROWS = {"run": pl.String, "step": pl.Int64, "attempt": pl.Int64}  # the columns every part has


@dataclass(frozen=True)
class Part:
    """One file of rows, relative to its block folder."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Cover:
    """What a checkpoint or a finished block vouches for; every other part is dropped on resume."""

    step: int  # server updates whose rows are in the parts
    semantics: int = 1
    metrics: tuple[Part, ...] = ()
    hits: tuple[Part, ...] = ()
    status: tuple[dict[str, Any], ...] = ()  # per run; only once done
    done: bool = False
    format: int = FORMAT

    def to_json(self) -> str:
        return jsonl.dumps(asdict(self))

    @classmethod
    def from_mapping(cls, value: Mapping[str, Any]) -> Cover:
        parts = {key: tuple(Part(**part) for part in value[key]) for key in ("metrics", "hits")}
        return cls(**{**value, **parts, "status": tuple(value["status"])})

    def files(self) -> set[str]:
        return {part.file for part in self.metrics + self.hits}


@dataclass
class BlockData:
    """The rows a block vouches for."""

    key: str
    cover: Cover
    frame: pl.DataFrame
    hits: list[dict[str, Any]] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)  # the hits as they are written


def recompute(folder: Path) -> str:
    """The advice at the end of every message about a damaged block."""
    return f"delete the block folder {folder} to recompute it"


def read_cover(folder: Path) -> Cover | None:
    """The cover of a block: of done.json when it is finished, else of its checkpoint, else None.

    Raises :class:`StudyError` when the file is damaged or of another format.
    """
    path = folder / DONE
    if path.is_file():
        value = read_json(path, recompute(folder))
    elif (text := cover_text(folder)) is not None:
        path = folder / CHECKPOINT
        try:
            value = dict(json.loads(text))
        except ValueError:
            raise StudyError(f"{path} is damaged (its cover is no JSON); {recompute(folder)}") from None
    else:
        return None
    if value.get("format") != FORMAT:
        raise StudyError(f"{path} has format {value.get('format')}, this version reads {FORMAT}; {recompute(folder)}")
    try:
        return Cover.from_mapping(value)
    except (KeyError, TypeError):
        raise StudyError(f"{path} is damaged (fields are missing); {recompute(folder)}") from None


def cover_text(folder: Path) -> bytes | None:
    """What :func:`read_cover` reads, as it is on the disk: equal text, equal cover."""
    path = folder / DONE
    try:
        if path.is_file():
            return path.read_bytes()
        path = folder / CHECKPOINT
        if not path.is_file():
            return None
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith(COVER_MEMBER))
            return archive.read(name)
    except (OSError, StopIteration, zipfile.BadZipFile) as error:
        raise StudyError(f"{path} is damaged ({type(error).__name__}); {recompute(folder)}") from None


def write_metrics(folder: Path, number: int, frames: Sequence[pl.DataFrame]) -> Part:
    """Write ``frames`` as one metrics part."""
    frame = pl.concat(frames, how="diagonal_relaxed") if len(frames) > 1 else frames[0]
    buffer = io.BytesIO()
    frame.write_ipc(buffer, compression="lz4")  # read whole or not at all: Parquet takes twice the work
    return _write(folder, f"metrics/part-{number:05d}.arrow", buffer.getvalue(), frame.height)


def write_hits(folder: Path, number: int, rows: Sequence[Mapping[str, Any]]) -> Part:
    """Write ``rows`` as one hits part."""
    return _write(folder, f"hits/part-{number:05d}.jsonl", jsonl.encode(rows), len(rows))


def _write(folder: Path, file: str, data: bytes, rows: int) -> Part:
    write_bytes(folder / file, data)
    return Part(file, rows, hashlib.sha256(data).hexdigest())


def read_part(folder: Path, part: Part) -> bytes:
    """The bytes of a covered part; :class:`StudyError` when it is missing, truncated or changed."""
    path = folder / part.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}); {recompute(folder)}") from None
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise StudyError(f"{path} is damaged (truncated or changed since it was written); {recompute(folder)}")
    return data


def read_block(folder: Path) -> BlockData | None:
    """Everything the block in ``folder`` vouches for, verified; None when it has no checkpoint yet."""
    cover = read_cover(folder)
    if cover is None:
        return None
    frames = [_frame(read_part(folder, part), part.file) for part in cover.metrics]
    hits, lines = list[dict[str, Any]](), list[bytes]()
    for part in cover.hits:
        data = read_part(folder, part)
        hits += jsonl.decode(data, folder / part.file)[0]
        lines += [line for line in data.split(b"\n") if line.strip()]
    frame = pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame(schema=NO_ROWS)
    return BlockData(folder.name, cover, frame, hits, lines)


def _frame(data: bytes, file: str) -> pl.DataFrame:
    read = pl.read_parquet if file.endswith(".parquet") else pl.read_ipc  # parts were Parquet at first
    return read(io.BytesIO(data))


def drop_uncovered(folder: Path, cover: Cover | None) -> None:
    """Delete parts that ``cover`` does not name: they were written after the last checkpoint."""
    kept = cover.files() if cover else set()
    for kind in ("metrics", "hits"):
        for path in sorted((folder / kind).iterdir()):
            if f"{kind}/{path.name}" not in kept:
                path.unlink(missing_ok=True)
