"""Downloading datasets before they are needed, for instance where the machine that trains has no network."""

from __future__ import annotations

import typer

from ..core.errors import UserError, nearest


def fetch(names: list[str]) -> None:
    """Each file of each dataset, found or downloaded, with its checksum compared: one line with its path.

    Raises:
        UserError: for a name that is no dataset.
        StudyError: for a file that is damaged or cannot be downloaded.
    """
    from ..config.rooms import REGISTRIES

    (datasets,) = REGISTRIES["datasets"]
    for name in names:
        if name not in datasets.options:
            known = ", ".join(datasets.names())
            raise UserError("NAME", name, f"one of {known}", hint=nearest(name, datasets.options))
    for name in names:
        find = getattr(datasets.options[name], "paths", None)
        origin = getattr(datasets.options[name], "origin", None)
        paths = find() if find is not None else []
        verified = origin is None or all(file.checksum for file in origin().files)
        for path in paths:
            typer.echo(f"{name}: {path}" + ("" if verified else " (not verified: no checksum is published)"))
        if not paths:
            typer.echo(f"{name}: nothing to download")
