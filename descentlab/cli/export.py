"""Writing a directory's results in another program's files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ..core.errors import StudyError, UserError
from ..report import exports

MARKER = "export.json"


def export(kind: str, directory: Path, out: Path | None) -> Path:
    """Write ``directory`` as ``kind`` into ``out`` (default ``DIR/export/KIND``); an earlier export there is replaced.

    The files are written beside it and moved into place, so that there is never half an export. Raises
    :class:`UserError` for a format that does not exist, and for an ``out`` that holds something else.
    """
    from .. import store

    write = exports.find(kind)
    target = out if out is not None else directory / "export" / kind
    results = store.load(directory)
    if target.exists() and not _ours(target):
        raise UserError("--out", str(target), "a new or empty directory, or one that export has made")
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        write(results, partial)
        (partial / MARKER).write_text(json.dumps({"export": kind, "from": directory.resolve().name}) + "\n")
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        raise StudyError(f"cannot write {target} ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _ours(target: Path) -> bool:
    return target.is_dir() and ((target / MARKER).is_file() or not any(target.iterdir()))
