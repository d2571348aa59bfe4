"""Writing a directory's table where the user wants it."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from ..core.errors import UserError


def write(directory: Path, format_: str | None, out: Path | None) -> None:
    """The table of ``directory`` as csv or parquet, in the file ``out`` or on standard output.

    Raises:
        UserError: when the file cannot be written, or parquet would go to a terminal.
    """
    from .. import store

    if format_ is None:
        format_ = "parquet" if out is not None and out.suffix == ".parquet" else "csv"
    if out is None and format_ == "parquet" and sys.stdout.isatty():
        raise UserError("--format", "parquet", "--out FILE, or a pipe: parquet is no text")
    frame = store.load(directory).frame
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
