"""``import-spec``: a settings file of another program in, a study out, checked before it is written."""

from __future__ import annotations

from pathlib import Path

import typer

from ..config import adaptive_rank, starter
from ..config.resolve import resolve_settings
from ..config.yaml12 import dump, load_file
from ..core.errors import StudyError, UserError


def write(file: Path, out: Path | None) -> None:
    """Print or write the study; what was left out, and how many runs it has, goes to standard error.

    Raises:
        UserError: for mistakes in the file, one line each, and for an ``out`` that exists.
    """
    document = load_file(file)
    known = adaptive_rank if adaptive_rank.is_adaptive_rank(document) else starter
    settings, notes = known.study_of(document)
    resolved = resolve_settings(settings)
    text = f"# from {file.name}\n{dump(settings)}"
    if out is None:
        typer.echo(text, nl=False)
    elif out.exists():
        raise UserError("--out", str(out), "a file that does not exist yet")
    else:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise StudyError(f"{out}: cannot be written ({error.strerror or error})") from None
    for note in [*notes, *resolved.notes]:
        typer.echo(f"note: {note}", err=True)
    runs = len(resolved.runs)
    typer.echo(f"{runs} {'run' if runs == 1 else 'runs'}" + (f" in {out}" if out else ""), err=True)
