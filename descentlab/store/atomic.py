"""Files that are either the old one or the whole new one, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..core.errors import StudyError

DISK_FULL = "disk full"  # how the message begins then


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` while ``path`` is written into one :class:`StudyError` line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, remedy = f"{DISK_FULL} while writing {path}", "free space"
        else:
            what, remedy = f"cannot write {path} ({error.strerror or error})", "put this right"
        raise StudyError(f"{what}; the last good state is kept; {remedy} and run the same command again") from error


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is named like an unfinished file of :func:`write_bytes`."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: temporary file beside it, flushed to the disk, renamed into place.

    Raises :class:`StudyError` when the disk is full or not writable; ``path`` then still holds what it held before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            _write_all(temporary, data, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):  # on a full disk the temporary file is what fills it
                os.unlink(temporary)
            raise


def write_many(folder: Path, files: Mapping[str, bytes]) -> None:
    """:func:`write_bytes` for several files of one folder, flushed together: then most of the flushes find nothing left
    to do. After a crash some may be new and others old."""
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    with writing(folder):
        try:
            for name, data in files.items():
                temporary[name].write_bytes(data)
            for path in temporary.values():
                _flush(path)
            for name, path in temporary.items():
                os.replace(path, folder / name)
            sync_folder(folder)
        except OSError:
            for path in temporary.values():
                with contextlib.suppress(OSError):  # on a full disk the temporary files are what fills it
                    path.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def append_bytes(path: Path, data: bytes) -> None:
    """Add ``data`` to the end of ``path`` in one system call where the system allows, and flush it to the disk."""
    with writing(path):
        _write_all(path, data, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder``, so that a rename survives a power cut."""
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Delete the unfinished files that a killed writer left in ``folder``."""
    for path in sorted(folder.iterdir()):
        if is_temporary(path):
            path.unlink(missing_ok=True)


def _write_all(path: Path, data: bytes, flags: int) -> None:
    descriptor = os.open(path, flags, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
