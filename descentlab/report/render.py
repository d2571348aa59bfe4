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
    """The figure as ``png`` (200 dpi) or ``pdf`` (embedded TrueType fonts), the same bytes every time.

    The canvas is asked directly, once the layout is fixed: ``savefig`` would lay out and draw everything twice.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    if kind == "png":
        canvas.print_png(buffer, metadata={"Software": None})
    else:
        from matplotlib.backends.backend_pdf import FigureCanvasPdf

        with matplotlib.rc_context({"pdf.fonttype": 42}):
            FigureCanvasPdf(figure).print_pdf(
                buffer, metadata={"CreationDate": None, "Producer": None, "Creator": None}
            )
    return buffer.getvalue()


def render(report: Report, directory: Path | str) -> Path:
    """Write ``report/`` in the run directory ``directory``; returns the path of index.html."""
    return write_report(report, Path(directory) / "report")


def write_report(report: Report, target: Path) -> Path:
    """Write figures/, report.md, summary.json and, last, index.html into ``target``; returns the path of index.html.

    Each file is written beside its place and renamed into it. Figures of an earlier report that this one does not
    have are removed.
    """
    pdf = report.pdf
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
        if pdf:
            write_bytes(figures / f"{block.name}.pdf", image_bytes(block.figure, "pdf"))
    write_bytes(target / "report.md", markdown(report, pdf).encode())
    write_bytes(target / "summary.json", summary_json(report.summary).encode())
    write_bytes(target / "index.html", html(report, images, pdf).encode())
    for old in figures.iterdir():
        if (old.suffix in (".png", ".pdf") and old.stem not in names) or (old.suffix == ".pdf" and not pdf):
            old.unlink()
    return target / "index.html"
