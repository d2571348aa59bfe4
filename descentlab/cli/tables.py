"""Writing a directory's table where the user wants it."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import polars as pl

from ..core.errors import UserError, nearest


def write(directory: Path, format_: str | None, out: Path | None, where: str | None = None, columns: str = "") -> None:
    """The table of ``directory`` as csv or parquet, in the file ``out`` or on standard output.

    ``where``: a condition in SQL on its columns; ``columns``: names separated by commas, all where empty.

    Raises:
        UserError: when the file cannot be written, parquet would go to a terminal, or the condition makes no sense.
    """
    from .. import store

    if format_ is None and out is not None and out.suffix not in (".csv", ".parquet"):
        raise UserError("--out", str(out), "a name that ends in .csv or .parquet, or a --format")
    if format_ is None:
        format_ = "parquet" if out is not None and out.suffix == ".parquet" else "csv"
    if out is None and format_ == "parquet" and sys.stdout.isatty():
        raise UserError("--format", "parquet", "--out FILE, or a pipe: parquet is no text")
    frame = _chosen(store.load(directory).frame, where, columns)
    if out is None:
        stream = sys.stdout.buffer
        buffer = io.BytesIO()  # written by Python, so that a reader that stops early is no error of polars'
        frame.write_csv(buffer) if format_ == "csv" else frame.write_parquet(buffer)
        stream.write(buffer.getvalue())
        stream.flush()
        return
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")  # renamed into place: never half a table
    try:
        frame.write_csv(partial) if format_ == "csv" else frame.write_parquet(partial)
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError("--out", str(out), f"a file that can be written ({error.strerror or error})") from None


def _chosen(frame: pl.DataFrame, where: str | None, columns: str) -> pl.DataFrame:
    names = [name.strip() for name in columns.split(",") if name.strip()]
    for name in names:
        if name not in frame.columns:
            hint = nearest(name, frame.columns)
            raise UserError("--columns", name, f"columns of the table ({', '.join(frame.columns)})", hint=hint)
    if where is not None:
        try:
            frame = frame.sql(f"SELECT * FROM self WHERE {where}")
        except pl.exceptions.PolarsError as error:
            told = str(error).split("\n")[0]
            raise UserError(
                "--where", where, f"a condition in SQL, names with dots in double quotes ({told})"
            ) from None
    return frame.select(names) if names else frame
