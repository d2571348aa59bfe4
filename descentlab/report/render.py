"""Write a report into its run directory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ..store.atomic import write_bytes
from .html import html
from .markdown import markdown
from .model import Report
from .summary import summary_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200


def image_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as ``png`` (200 dpi) or ``pdf`` (embedded TrueType fonts), the same bytes every time."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    metadata = {"Software": None} if kind == "png" else {"CreationDate": None, "Producer": None, "Creator": None}
    buffer = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def render(report: Report, directory: Path | str) -> Path:
    """Write ``report/`` in ``directory``: figures/, report.md, summary.json and, last, index.html; returns its path.

    Figures of an earlier report that this one does not have are removed.
    """
    target = Path(directory) / "report"
    figures = target / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    blocks = report.figures()
    names = [block.name for block in blocks]
    if len(set(names)) != len(names):
        raise ValueError(f"figure names: expected each once, got {names}")
    images: dict[str, bytes] = {}
    for block in blocks:
        images[block.name] = image_bytes(block.figure, "png")
        write_bytes(figures / f"{block.name}.png", images[block.name])
        write_bytes(figures / f"{block.name}.pdf", image_bytes(block.figure, "pdf"))
    write_bytes(target / "report.md", markdown(report).encode())
    write_bytes(target / "summary.json", summary_json(report.summary).encode())
    write_bytes(target / "index.html", html(report, images).encode())
    for old in figures.iterdir():
        if old.suffix in (".png", ".pdf") and old.stem not in names:
            old.unlink()
    return target / "index.html"
