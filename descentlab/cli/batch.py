"""Studies one after the other: what is finished is skipped, what fails does not keep the others from running."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..config.resolve import LIMIT, Resolved, resolve
from ..config.yaml12 import dump
from ..core.errors import StudyError, UserError, nearest
from ..store import status
from ..store.directory import MARKER

PORT = "engine.port"


def batch(arguments: Sequence[str], out: Path, start: str, *, yes: bool, dry_run: bool, **options: Any) -> int:
    """Run the studies among ``arguments``, each in a directory of its own below ``out``, from ``start`` on.

    The rest of ``arguments`` are settings of all of them. All studies are resolved before the first one runs. Returns
    0, 1 if a study failed, 130 if interrupted.
    """
    from .main import default_name

    names = _names([a for a in arguments if "=" not in a or a.endswith((".yaml", ".yml"))])
    settings = [a for a in arguments if "=" in a and not a.endswith((".yaml", ".yml"))]
    most = None if yes else LIMIT
    studies = [resolve(name, _own(settings, i), limit=most, most_runs=most) for i, name in enumerate(names)]
    targets = [out / default_name(name, study.study.name) for name, study in zip(names, studies, strict=True)]
    for target in targets:
        if targets.count(target) > 1:
            raise UserError("STUDY", target.name, "names that differ: each study gets a directory of its name")
    first = _first(start, names, [target.name for target in targets])
    code = 0
    for i in range(first, len(names)):
        head = f"[{i}] {names[i]}: {len(studies[i].runs)} runs in {targets[i]}"
        if _finished(studies[i], targets[i]):
            typer.echo(f"{head}: done")
            continue
        typer.echo(head)
        if dry_run:
            continue
        found = _one(studies[i], targets[i], yes=yes, **options)
        if found == 130:
            print(f"to go on: the same command, or --start {i}", file=sys.stderr)
            return found
        code = max(code, found)
    return code


def _one(study: Resolved, target: Path, **options: Any) -> int:
    from ..launch import api

    try:
        return api.run(study, target, **options)
    except (UserError, StudyError) as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        return 1


def _names(given: Sequence[str]) -> list[str]:
    """Studies in their order; a text file stands for those it holds, one a line, beside it."""
    names: list[str] = []
    for name in given:
        path = Path(name)
        if path.suffix != ".txt":
            names.append(name)
            continue
        if not path.is_file():
            raise UserError("STUDY", name, "an existing file with one study a line")
        lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
        beside = (path.parent / line for line in lines if line)
        names += [str(file) if file.is_file() else file.name for file in beside]
    if not names:
        raise UserError(
            "STUDY", " ".join(given), "at least one study: names, YAML files, or a .txt file that lists them"
        )
    return names


def _own(settings: Sequence[str], index: int) -> list[str]:
    """The settings of study number ``index``: a port that all were given is counted up, so that none meets another."""
    own = []
    for setting in settings:
        key, _, value = setting.partition("=")
        counted = key == PORT and value.isdecimal() and int(value)
        own.append(f"{key}={int(value) + index}" if counted else setting)
    return own


def _first(start: str, names: Sequence[str], stems: Sequence[str]) -> int:
    """Where to begin: a number from 0 on, or a study's name or file with or without its folder and ending."""
    if start.isdecimal():
        if int(start) < len(names):
            return int(start)
        raise UserError("--start", start, f"a number below {len(names)}, or one of {', '.join(stems)}")
    for i, (name, stem) in enumerate(zip(names, stems, strict=True)):
        if start in (name, stem, Path(name).name):
            return i
    raise UserError("--start", start, f"a number, or one of {', '.join(stems)}", hint=nearest(start, stems))


def _finished(study: Resolved, target: Path) -> bool:
    """Whether the directory holds exactly this study, with every run ended and reported."""
    if not (target / MARKER).is_file() or not (target / "report" / "index.html").is_file():
        return False
    written = target / "study.yaml"
    if not written.is_file() or written.read_text() != dump(study.document):
        return False
    return set(status(target).counts()) <= {"done", "diverged"}
