"""The run directory: its marker, its layout, and the JSON files in it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core.errors import StudyError, UserError
from . import jsonl
from .atomic import append_bytes, is_temporary, remove_temporaries, write_bytes, write_text, writing

FORMAT = 1
INDENTED = 2**18  # characters up to which an object is laid out for readers; that takes ten times as long
MARKER = "descentlab.json"
CLAIMS = "claims"  # see claim.py
LOCK = ".lock"  # held while the files of the whole directory are written
SESSION = ".running"  # shared by every command that runs blocks here
TOLD = ".notified"  # touched when somebody was told that the study has ended
LOCK_WAIT_S = 120.0
# What --overwrite deletes: everything a run directory is documented to hold, and nothing a user put beside it.
LAYOUT = (
    "study.yaml",
    "resolved.jsonl",
    "plan.json",
    "provenance.json",
    "campaign.jsonl",
    "hits.jsonl",
    "runs.jsonl",
    "events.jsonl",
    "logs",
    "blocks",
    CLAIMS,
    "slurm",
    "code",
    "table.parquet",
    "report",
    TOLD,
)
EARLIER = "study.[0-9]*.yaml"  # documents that were replaced, see RunDirectory._archive
APPENDED = frozenset({"events.jsonl", "runs.jsonl"})  # a kill may cut their last line short


class RunDirectory:
    """One study's results on the disk. Use :meth:`create` to write (new, or resumed) and :meth:`open` to read."""

    def __init__(self, path: Path, study: str) -> None:
        self.path, self.study = path, study

    @classmethod
    def create(cls, path: str | Path, study_name: str, document_yaml: str, overwrite: bool = False) -> RunDirectory:
        """Make ``path`` a directory of ``study_name``, or take it up again, and store ``document_yaml`` as study.yaml.

        The document must read the same in YAML 1.1 and 1.2, as ``config.yaml12.dump`` writes it.
        ``overwrite`` first deletes earlier results, if descentlab made them. Raises :class:`UserError` when the
        directory is not ours, holds another study or format, or cannot be written.
        """
        path = Path(path)
        _make_writable(path)
        cls.check(path, study_name, overwrite=overwrite)
        directory = cls(path, study_name)
        with directory.lock(LOCK_WAIT_S):
            directory._begin(document_yaml, overwrite)
        return directory

    @classmethod
    @contextlib.contextmanager
    def join(
        cls, path: str | Path, study_name: str, document_yaml: str, overwrite: bool = False
    ) -> Iterator[RunDirectory]:
        """:meth:`create`, and count as running there until the end of the ``with``.

        Several commands may run the same document at once; they share its blocks (see :mod:`.claim`). Another
        document, or ``overwrite``, is refused with a :class:`UserError` as long as one of them runs.
        """
        path = Path(path)
        _make_writable(path)
        cls.check(path, study_name, overwrite=overwrite)
        directory = cls(path, study_name)
        with contextlib.ExitStack() as stack:
            with directory.lock(LOCK_WAIT_S):
                directory._begin(document_yaml, overwrite)
                stack.enter_context(directory.running())
            yield directory

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Count as a command that runs blocks here, which keeps others from changing what is run."""
        return _locked(self.path / SESSION, shared=True)

    def _begin(self, document: str, overwrite: bool) -> None:
        """Marker, document and folders; under the lock."""
        path = self.path
        others = self.others()
        if others and (overwrite or not _holds(path / "study.yaml", document)):
            expected = f"a directory that no other command runs, or the settings it runs ({others})"
            raise UserError("--out", str(path), expected)
        if overwrite:
            _empty(path)
        self._archive(document)
        write_text(path / MARKER, json.dumps({"format": FORMAT, "study": self.study}) + "\n")
        write_text(path / "study.yaml", document)
        with writing(path):
            for name in ("blocks", "logs"):
                (path / name).mkdir(exist_ok=True)
        if not others:  # what looks unfinished may be what they are writing
            with writing(path):
                remove_temporaries(path)
            for name in sorted(APPENDED):
                self.repair(name)

    def _archive(self, document: str) -> None:
        """Keep a study.yaml that ``document`` is about to replace, as study.1.yaml, study.2.yaml …"""
        old = self.path / "study.yaml"
        if not old.is_file() or _holds(old, document):
            return
        kept = sorted(self.path.glob(EARLIER), key=lambda path: int(path.suffixes[0][1:]))
        if not kept or not _holds(kept[-1], old.read_text()):  # a kill may have come between the two
            number = 1 + (int(kept[-1].suffixes[0][1:]) if kept else 0)  # one of them may have been removed
            write_text(self.path / f"study.{number}.yaml", old.read_text())

    def others(self) -> str:
        """Who runs blocks of the directory now, in words; empty when nobody does."""
        from .claim import holders

        found = {(str(h["host"]), int(h["pid"])) for h in holders(self.path).values() if h["pid"] != os.getpid()}
        if found:
            return ", ".join(f"process {pid} on {host}" for host, pid in sorted(found))
        try:
            with _locked(self.path / SESSION):
                return ""
        except BlockingIOError:
            return "a command that has just begun or is about to end"

    @classmethod
    def check(cls, path: str | Path, study_name: str, *, overwrite: bool = False) -> None:
        """Raise the :class:`UserError` that :meth:`create` would for what is in ``path``; writes nothing."""
        path = Path(path)
        marker = _read_marker(path)
        if marker is None:
            if path.is_dir():
                _refuse_foreign(path)
        elif not overwrite:
            _check_marker(path, marker)
            if marker["study"] != study_name:
                expected = f"a directory of study '{study_name}'; it holds '{marker['study']}'"
                raise UserError("--out", str(path), expected)

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """The directory at ``path``, for reading; :class:`UserError` when descentlab did not make it."""
        path = Path(path)
        if not path.is_dir():
            raise UserError("DIR", str(path), "an existing directory made by descentlab")
        marker = _read_marker(path)
        if marker is None:
            raise UserError("DIR", str(path), "a directory made by descentlab (it has no descentlab.json)")
        _check_marker(path, marker, "DIR", "read it with the version of descentlab that made it")
        return cls(path, str(marker["study"]))

    @contextlib.contextmanager
    def lock(self, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the directory while files of the whole of it are written (plan, table, report).

        Whoever cannot have it within ``wait_s`` seconds gets a :class:`UserError`. Not re-entrant: :meth:`create` and
        :meth:`join` hold it while they work.
        """
        with contextlib.ExitStack() as stack:
            deadline = time.monotonic() + wait_s
            while True:
                try:
                    stack.enter_context(_locked(self.path / LOCK))
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        expected = "a directory that no other command is writing to"
                        raise UserError("--out", str(self.path), expected) from None
                time.sleep(0.05)
            yield

    def block_folder(self, key: str) -> Path:
        """The folder of block ``key``."""
        if not key or not all(c.isalnum() or c in "-_.=" for c in key) or key.startswith("."):
            raise ValueError(f"block key {key!r} is not a plain folder name")
        return self.path / "blocks" / key

    def block_keys(self) -> list[str]:
        """Keys of all blocks that have been begun, sorted."""
        folder = self.path / "blocks"
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    def log_path(self, key: str) -> Path:
        """Where the log of block ``key`` goes."""
        return self.path / "logs" / f"{key}.log"

    def read_jsonl(self, name: str, *, repeated: str = "") -> list[dict[str, Any]]:
        """Rows of ``name``, empty when it does not exist. Only an appended file may end in half a line.

        ``repeated``: the last key of the rows where many have the same value, see :func:`.jsonl.decode`.
        """
        path = self.path / name
        if not path.is_file():
            return []
        return jsonl.decode(path.read_bytes(), path, appended=name in APPENDED, repeated=repeated)[0]

    def replace_jsonl(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write ``name`` anew, atomically."""
        write_bytes(self.path / name, jsonl.encode(rows))

    def append_jsonl(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add ``rows`` to the end of ``name`` (one of ``APPENDED``), after mending a last line cut short by a kill."""
        if name not in APPENDED:
            raise ValueError(f"{name} is replaced whole, never appended to")
        self.repair(name)
        append_bytes(self.path / name, jsonl.encode(rows))

    def repair(self, name: str) -> None:
        """Drop half a last line of an appended file and leave a warning event about it."""
        path = self.path / name
        data = path.read_bytes() if path.is_file() else b""
        if not data or data.endswith(b"\n"):
            return
        good = jsonl.decode(data, path, appended=True)[1]
        if good == len(data):  # whole, only its newline is missing
            append_bytes(path, b"\n")
            return
        with writing(path):
            os.truncate(path, good)
        self.event("warning", f"{name}: the last line was cut short and has been dropped")

    def event(self, kind: str, message: str, **details: Any) -> None:
        """Append one line to events.jsonl: time (UTC), kind (checkpoint, signal, warning …), message."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.append_jsonl("events.jsonl", [{"time": time, "kind": kind, "message": message, **details}])

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in ``name``, empty when the file does not exist."""
        path = self.path / name
        return read_json(path, "restore the file, or start again with --overwrite") if path.is_file() else {}

    def replace_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write ``value`` as ``name``, atomically."""
        text = jsonl.dumps(value)
        if len(text) <= INDENTED:
            text = json.dumps(json.loads(text), indent=1, ensure_ascii=False)
        write_text(self.path / name, text + "\n")

    def plan(self) -> dict[str, Any]:
        """plan.json, read again when it was replaced; not to be changed, others get the same object."""
        try:
            found = (self.path / "plan.json").stat()
        except FileNotFoundError:
            return {}
        return _plan_as_of(self.path, (found.st_ino, found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=1)
def _plan_as_of(path: Path, file: tuple[int, int, int]) -> dict[str, Any]:
    return RunDirectory.open(path).read_json("plan.json")


@contextlib.contextmanager
def _locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """``flock`` on ``path``: shared (waits), or exclusive (:class:`BlockingIOError` where it would have to wait)."""
    import fcntl  # POSIX only; reading results needs no lock

    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in ``path``; :class:`StudyError` naming the file and ``remedy`` when it is damaged."""
    try:
        value = jsonl.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is damaged ({type(error).__name__}); {remedy}") from None
    if not isinstance(value, dict):
        raise StudyError(f"{path} is damaged (not an object); {remedy}")
    return value


def _make_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        test = path / f".writable.{os.getpid()}.tmp"
        test.touch()
        test.unlink()
    except OSError as error:
        raise UserError("--out", str(path), "a writable directory", hint=error.strerror or str(error)) from None


def _read_marker(path: Path) -> dict[str, Any] | None:
    if not (path / MARKER).is_file():
        return None
    try:
        marker = json.loads((path / MARKER).read_text())
    except (OSError, ValueError):
        marker = None
    if not isinstance(marker, dict) or not {"format", "study"} <= marker.keys():
        raise UserError("--out", str(path), f"a directory with a readable {MARKER}")
    return marker


def _check_marker(
    path: Path, marker: Mapping[str, Any], key: str = "--out", hint: str = "choose another --out, or use --overwrite"
) -> None:
    if marker["format"] != FORMAT:
        expected = f"a directory of format {FORMAT}; it has format {marker['format']}"
        raise UserError(key, str(path), expected, hint=hint)


def _refuse_foreign(path: Path) -> None:
    if any(not is_temporary(p) and p.name not in (LOCK, SESSION) for p in path.iterdir()):  # killed before the marker
        raise UserError("--out", str(path), "an empty directory or one made by descentlab")


def _empty(path: Path) -> None:
    with writing(path):
        for target in [*(path / name for name in LAYOUT), *path.glob(EARLIER)]:  # the marker stays: it is still ours
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
