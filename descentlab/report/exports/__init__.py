"""Published file trees written from a run directory: one module per format, found here by name. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...core.errors import UserError, nearest

EXPORTS = {  # name -> (what it writes, "module:function"), the function taking (store.Results, directory)
    "v3": (
        "the file tree of the published recovery experiments, strict JSON",
        "descentlab.report.exports.v3:export",
    ),
    "starter": ("a folder per run with stats.csv, config.yaml and done", "descentlab.report.exports.starter:export"),
    "tensorboard": ("event files", "descentlab.report.exports.loggers:tensorboard"),
    "wandb": ("offline runs", "descentlab.report.exports.loggers:wandb"),
    "mlflow": ("an SQLite file", "descentlab.report.exports.loggers:mlflow"),
    "trackio": ("a local project", "descentlab.report.exports.loggers:trackio"),
}


def names() -> list[str]:
    """The formats there are."""
    return list(EXPORTS)


def find(name: str) -> Callable[[Any, Path], None]:
    """The writer of a format; raises :class:`UserError` with the nearest name for one that does not exist."""
    if name not in EXPORTS:
        raise UserError("export", name, f"one of {', '.join(EXPORTS)}", hint=nearest(name, EXPORTS))
    module, _, function = EXPORTS[name][1].partition(":")
    return getattr(importlib.import_module(module), function)
