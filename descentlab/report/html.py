"""``index.html``: one self-contained page; style, script and figures are inside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib import resources
from typing import Any

from .model import Column, FigureBlock, Paragraph, Report, SummaryItem, TableBlock, cell_text, flat, sort_key

LONG_TABLE = 12  # rows; a longer table is folded


def _numeric(value: Any) -> bool:
    return isinstance(value, (SummaryItem, int, float)) and not isinstance(value, bool)


def _cell(value: Any, column: Column) -> dict[str, Any]:
    key = sort_key(value)
    return {"text": cell_text(value, column), "sort": "" if key is None else key, "number": _numeric(value)}


def _table(table: TableBlock) -> dict[str, Any]:
    rows = [[_cell(v, column) for v, column in zip(row, table.columns, strict=True)] for row in table.rows]
    heads = [
        {"name": column.name, "help": column.help, "number": any(row[i]["number"] for row in rows)}
        for i, column in enumerate(table.columns)
    ]
    return {"kind": "table", "heads": heads, "rows": rows, "caption": table.caption, "long": len(rows) > LONG_TABLE}


def _block(block: Any, images: Mapping[str, bytes]) -> dict[str, Any]:
    if isinstance(block, Paragraph):
        return {"kind": "paragraph", "text": block.text}
    if isinstance(block, TableBlock):
        return _table(block)
    assert isinstance(block, FigureBlock)
    data = base64.b64encode(images[block.name]).decode("ascii")
    inches = float(block.figure.get_size_inches()[0])
    return {
        "kind": "figure",
        "name": block.name,
        "data": data,
        "caption": block.caption,
        "alt": block.alt,
        "width": round(inches * 132),
        "wide": inches > 4,
    }


def html(report: Report, images: Mapping[str, bytes], pdf: bool = True) -> str:
    """The page; ``images`` maps each figure's name to its PNG bytes, ``pdf`` says whether PDF files exist too."""
    import jinja2

    here = resources.files(__package__)
    page, css, script = ((here / name).read_text("utf-8") for name in ("page.html.j2", "page.css", "page.js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(page).render(
        report=report,
        suffixes="png and pdf" if pdf else "png",
        css=css,
        script=script,
        failures=_table(TableBlock(report.failures.columns, report.failures.rows)),
        contrasts=None if report.contrasts is None else _table(report.contrasts),
        sections=[
            {"heading": section.heading, "id": f"s{index}", "blocks": [_block(b, images) for b in section.blocks]}
            for index, section in enumerate(report.sections)
        ],
        provenance=flat(report.provenance),
    )
