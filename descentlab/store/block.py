"""What a block of runs writes while it trains, in an order that survives a kill between any two system calls."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..core.errors import StudyError
from . import jsonl
from .atomic import remove_temporaries, sync_folder, write_bytes, write_many, write_text, writing
from .directory import RunDirectory
from .parts import (
    CHECKPOINT,
    COVER_MEMBER,
    DONE,
    FAILED,
    NO_ROWS,
    OWNER,
    Cover,
    drop_uncovered,
    read_cover,
    read_part,
    recompute,
    write_hits,
    write_metrics,
)
from .process import process_identity


class BlockWriter:
    """Writes one block: rows and hits into parts, the state into ``checkpoint.pt``, and ``done.json`` at the end.

    Call :meth:`resume` first. A checkpoint names the parts it covers; whatever was written after it is dropped on
    resume and written again, so the table of a killed and resumed block equals that of an undisturbed one.
    ``semantics`` is raised when the same block would compute something else. ``runs`` and ``steps`` (server updates
    per run) only serve ``status``.
    """

    def __init__(
        self,
        run_directory: RunDirectory,
        key: str,
        *,
        semantics: int = 1,
        runs: Sequence[str] = (),
        steps: int | None = None,
    ) -> None:
        self.directory, self.key, self.semantics = run_directory, key, semantics
        self.folder = run_directory.block_folder(key)
        self._runs, self._steps = list(runs), steps
        self._cover: Cover | None = None  # set by resume()
        self._frames: list[pl.DataFrame] = []
        self._hits: list[dict[str, Any]] = []

    @property
    def is_done(self) -> bool:
        """Whether the block is finished; :class:`StudyError` when it was finished under other semantics."""
        return (self.folder / DONE).is_file() and self._checked_cover() is not None

    def resume(self) -> tuple[Any, int] | None:
        """State and step of the last checkpoint, or None to start from the beginning.

        Deletes stray temporary files and the parts no checkpoint covers. Raises :class:`StudyError` when the
        checkpoint or a part it covers is missing, damaged, or of another version.
        """
        if self.is_done:
            raise RuntimeError(f"block {self.key} is done")
        with writing(self.folder):
            for folder in (self.folder, *(self.folder / kind for kind in ("metrics", "hits", "artifacts"))):
                folder.mkdir(parents=True, exist_ok=True)
                remove_temporaries(folder)
            sync_folder(self.folder.parent)
            cover = self._checked_cover()
            drop_uncovered(self.folder, cover)
            (self.folder / FAILED).unlink(missing_ok=True)
        for part in cover.metrics + cover.hits if cover else ():
            read_part(self.folder, part)
        begun = {"from": cover.step if cover else 0}  # with the file's age, the speed
        owner = {**process_identity(), "runs": self._runs, "steps": self._steps, **begun}
        write_text(self.folder / OWNER, jsonl.dumps(owner) + "\n")
        self._frames, self._hits = [], []
        self._cover = cover or Cover(step=0, semantics=self.semantics)
        return (_load_state(self.folder / CHECKPOINT), cover.step) if cover else None

    def rows(self, columns: Mapping[str, Any]) -> None:
        """Buffer rows given as columns of equal length (arrays, lists or polars Series), ``run``, ``step`` and
        ``attempt`` among them.

        ``None`` in a list is a missing value; NaN stays NaN. Arrays and lists are copied.
        """
        missing = [key for key in NO_ROWS if key not in columns]
        if missing:
            raise ValueError(f"rows without {', '.join(missing)}")
        data = {name: _copied(column) for name, column in columns.items()}
        if len({len(column) for column in data.values()}) > 1:
            raise ValueError(f"columns of unequal length: { {name: len(c) for name, c in data.items()} }")
        self._frames.append(pl.DataFrame(data, strict=False))

    def hits(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Buffer realised perturbations (see hits.jsonl)."""
        self._hits.extend(dict(row) for row in rows)

    def artifact(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """:meth:`artifacts` for one of them."""
        self.artifacts({name: arrays})

    def artifacts(self, files: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write ``artifacts/name`` (an .npz) for each; writing the same again is harmless. No cover names artifacts."""
        made = {}
        for name, arrays in files.items():
            buffer = io.BytesIO()
            np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
            made[name] = buffer.getvalue()
        if made:
            write_many(self.folder / "artifacts", made)

    def checkpoint(self, state: Any, step: int) -> None:
        """Write what is buffered, then a checkpoint that covers it: ``state`` after ``step`` server updates.

        ``state`` is nested dicts, lists and tuples of tensors, numbers, strings, None: what ``torch.load`` reads with
        ``weights_only=True``, so that opening somebody's results runs none of their code. Raises :class:`TypeError`
        for anything else, :class:`StudyError` when the disk is full.
        """
        _check_state(state, "state")
        cover = self._flush(step)
        write_bytes(self.folder / CHECKPOINT, _dump_state(state, cover))
        self._accept(cover)

    def spill(self) -> None:
        """Write what is buffered now, to keep memory small; it counts once a checkpoint or done.json names it."""
        self._accept(self._flush(self._opened().step))

    def finish(self, status: Sequence[Mapping[str, Any]]) -> None:
        """Write the last part and ``done.json`` with one status per run ({"run", "status", "steps", "message", …})."""
        steps = max((int(row.get("steps", 0)) for row in status), default=0)
        covered = self._flush(max(steps, self._opened().step))
        cover = Cover(
            step=covered.step,
            semantics=self.semantics,
            metrics=covered.metrics,
            hits=covered.hits,
            status=tuple(dict(row) for row in status),
            done=True,
        )
        write_text(self.folder / DONE, cover.to_json() + "\n")
        self._accept(cover)
        with writing(self.folder):  # of no more use; may be large
            for name in (CHECKPOINT, OWNER):
                (self.folder / name).unlink(missing_ok=True)

    def fail(self, message: str) -> None:
        """Note that the block stopped with an error; ``message`` is its last line. The next resume forgets it."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "message": message}
        write_text(self.folder / FAILED, jsonl.dumps(row) + "\n")

    def _opened(self) -> Cover:
        if self._cover is None:
            raise RuntimeError("call resume() before writing a block")
        return self._cover

    def _checked_cover(self) -> Cover | None:
        cover = read_cover(self.folder)
        if cover is not None and cover.semantics != self.semantics:
            raise StudyError(
                f"{self.folder} was computed under semantics {cover.semantics}, this version has {self.semantics}; "
                f"{recompute(self.folder)}"
            )
        return cover

    def _flush(self, step: int) -> Cover:
        """Write the buffers as parts; nothing counts until a checkpoint or done.json names them."""
        old = self._opened()
        metrics, hits = old.metrics, old.hits
        if self._frames:
            metrics += (write_metrics(self.folder, len(metrics), self._frames),)
        if self._hits:
            hits += (write_hits(self.folder, len(hits), self._hits),)
        return Cover(step=step, semantics=self.semantics, metrics=metrics, hits=hits)

    def _accept(self, cover: Cover) -> None:
        self._cover, self._frames, self._hits = cover, [], []


def _copied(column: Any) -> Any:
    if isinstance(column, pl.Series):  # nobody can change it
        return column
    return np.array(column) if isinstance(column, np.ndarray) else list(column)


def _check_state(value: Any, where: str) -> None:
    import torch

    if type(value) in (type(None), bool, int, float, str) or isinstance(value, torch.Tensor | torch.dtype | torch.Size):
        return
    if type(value) is dict:
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise TypeError(f"{where}: key {key!r} of a checkpoint is neither a string nor an integer")
            _check_state(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_state(item, f"{where}[{index}]")
    else:
        raise TypeError(
            f"{where} of a checkpoint is a {type(value).__name__}: use tensors, numbers, strings, dicts, lists"
        )


def _dump_state(state: Any, cover: Cover) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:  # status reads the cover without torch
        archive.writestr(f"archive/{COVER_MEMBER}", cover.to_json())
    return buffer.getvalue()


def _load_state(path: Path) -> Any:
    import pickle

    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        return torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise StudyError(f"{path} is damaged ({type(error).__name__}); {recompute(path.parent)}") from None
