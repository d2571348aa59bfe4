"""Finds a dataset's files, or downloads them once, however many processes ask at the same time.

Searched first is the folder in the environment variable ``DESCENTLAB_DATA``, then the cache
(``$XDG_CACHE_HOME/descentlab``, by default ``~/.cache/descentlab``), to which files are downloaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

from ...core.errors import StudyError
from .sources import RemoteFile, Source

VARIABLE = "DESCENTLAB_DATA"
TIMEOUT_S = 30  # without a byte
CHUNK = 2**20


def cache_folder() -> Path:
    """Where downloads go."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "descentlab"


def folders() -> list[Path]:
    """The folders that are searched, in order."""
    own = os.environ.get(VARIABLE)
    return [*([Path(own)] if own else []), cache_folder()]


def paths(source: Source) -> list[Path]:
    """The checked files of ``source``, in its order; an alternative form that is there spares the download.

    Raises:
        StudyError: a file is damaged, or is nowhere and cannot be downloaded.
    """
    here = [_find(file) for file in source.files]
    if None in here:
        others = [_find(file) for file in source.alternatives]
        if others and None not in others:
            return [path for path in others if path is not None]
    return [found or _download(source, file) for found, file in zip(here, source.files, strict=True)]


def present(source: Source) -> bool:
    """Whether :func:`paths` would need no download; touches no network. StudyError for a damaged file."""
    return any(files and None not in [_find(f) for f in files] for files in (source.files, source.alternatives))


def _find(file: RemoteFile) -> Path | None:
    """The first copy in the searched folders, with the right checksum; None if there is none."""
    for folder in folders():
        path = folder / file.path
        if path.is_file():
            stat = path.stat()
            _verify(path, file.checksum, stat.st_size, stat.st_mtime_ns)
            return path
    return None


@lru_cache(maxsize=64)
def _verify(path: Path, checksum: str, size: int, changed: int) -> None:
    """The file has this checksum. ``size`` and ``changed`` are there so that an unchanged file is read only once."""
    if not checksum:  # none is published
        return
    algorithm, _, expected = checksum.partition(":")
    found = digest(path, algorithm)
    if found != expected:
        raise StudyError(f"{path}: damaged, or another file: {algorithm} {found}, expected {expected}; delete it")


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal checksum of a file.

    Raises:
        StudyError: when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror or error})") from None


def _download(source: Source, file: RemoteFile) -> Path:
    """Download to the cache, unless another process has done so while this one waited for the lock."""
    target = cache_folder() / file.path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock")):
            found = _find(file)
            if found is None:
                _fetch(file.url, target, file.checksum)
            return found or target
    except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors, and so is a disk that is full
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        places = " or ".join(str(folder / file.path) for folder in folders())
        advice = f"place it at {places}"
        if VARIABLE not in os.environ:
            advice += f", or in a folder named by {VARIABLE}"
        raise StudyError(
            f"dataset {source.name}: {target.name} is not on this machine and {file.url} cannot be downloaded "
            f"({reason}); {advice}"
        ) from None


def _fetch(url: str, target: Path, checksum: str) -> None:
    """Download beside ``target``, compare the checksum, rename into place: never half a file, never a wrong one."""
    algorithm, _, expected = checksum.partition(":") if checksum else ("sha256", "", "")
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    running = hashlib.new(algorithm)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, partial.open("wb") as out:
            while chunk := answer.read(CHUNK):
                running.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        if expected and running.hexdigest() != expected:
            raise OSError(f"{algorithm} of what came is {running.hexdigest()}, expected {expected}")
        partial.replace(target)
    except urllib.error.HTTPError as error:
        error.close()  # an answer such as 404 holds its connection
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the operating system frees the lock of a process that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
