"""The code as it is when jobs are submitted, so that a job that waits for days executes what was submitted."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from ..store.atomic import writing

FOLDER = "code"
NAMED = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")
LARGEST_BYTES = 2**20  # what is larger in a user's package is data, not code


def snapshot(directory: Path, settings: Any) -> Path:
    """Copy descentlab and every imported module that is not installed to ``directory/code/HASH``; that folder.

    What ``settings`` (plain data) name as ``module:Name`` is imported first. HASH is of names and contents, so
    unchanged code is copied once.
    """
    for name in sorted(set(_named(settings))):
        with suppress(ImportError):  # text with a colon in it; a module that is missing has been refused before
            importlib.import_module(name)
    files = dict(sorted(_files()))
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    made = directory.resolve() / FOLDER / digest.hexdigest()[:12]
    if made.is_dir():
        return made
    partial = made.with_name(f".{made.name}.{uuid.uuid4().hex[:8]}.tmp")
    with writing(made):
        for name, path in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / name)
        try:
            os.rename(partial, made)
        except OSError:
            if not made.is_dir():  # else another command was faster
                raise
            shutil.rmtree(partial)
    return made


def _files() -> Iterator[tuple[str, Path]]:
    """(name below the snapshot, file)."""
    package = Path(__file__).parents[1]
    yield from ((f"descentlab/{p.relative_to(package).as_posix()}", p) for p in _below(package))
    for name, module in list(sys.modules.items()):
        file = _source(name, module)
        if file is None:
            continue
        top = sys.modules.get(name.partition(".")[0])
        home = _source(name.partition(".")[0], top) if top is not None else None
        if home is not None and home.name == "__init__.py":
            yield from ((f"{home.parent.name}/{p.relative_to(home.parent).as_posix()}", p) for p in _below(home.parent))
        else:
            stem = name.replace(".", "/")
            yield (f"{stem}/__init__.py" if file.name == "__init__.py" else f"{stem}{file.suffix}"), file


def _named(value: Any) -> Iterator[str]:
    """Modules of ``module:Name`` texts."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _named(item)
    elif isinstance(value, str) and (found := NAMED.fullmatch(value)):
        yield found[1]


def _below(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [p for p in found if p.stat().st_size <= LARGEST_BYTES and not p.name.startswith(".")]


def _source(name: str, module: ModuleType) -> Path | None:
    """The file of a module that the user wrote: neither ours, nor Python's, nor installed."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or name.partition(".")[0] in ("descentlab", "__main__", "__mp_main__"):
        return None
    path = Path(file).resolve()
    standard = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib")}
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    if installed or any(path.is_relative_to(folder) for folder in standard):
        return None
    return path if path.suffix == ".py" and path.is_file() else None
