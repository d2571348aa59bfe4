"""``report.md``: the same report as GitHub-flavoured Markdown, figures by relative path."""

from __future__ import annotations

import re

from .model import Block, FigureBlock, Paragraph, Report, TableBlock, cell_text, flat


def escaped(text: str) -> str:
    """Plain text that Markdown leaves as it is, also inside a table cell."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text).replace("\n", " ")


def _table(table: TableBlock) -> list[str]:
    numeric = [
        all(not isinstance(row[i], str) for row in table.rows) and bool(table.rows) for i in range(len(table.columns))
    ]
    lines = [
        "| " + " | ".join(escaped(column.name) for column in table.columns) + " |",
        "|" + "|".join("---:" if right else "---" for right in numeric) + "|",
    ]
    for row in table.rows:
        cells = (escaped(cell_text(value, column)) for value, column in zip(row, table.columns, strict=True))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *([escaped(table.caption), ""] if table.caption else [])]


def _block(block: Block, pdf: bool) -> list[str]:
    if isinstance(block, Paragraph):
        return [escaped(block.text), ""]
    if isinstance(block, TableBlock):
        return _table(block)
    assert isinstance(block, FigureBlock)
    path = f"figures/{block.name}"
    link = f" ([PDF]({path}.pdf))" if pdf else ""
    return [f"![{escaped(block.alt)}]({path}.png)", "", f"{escaped(block.caption)}{link}", ""]


def markdown(report: Report, pdf: bool = True) -> str:
    """The text of report.md; ``pdf`` says whether figures also exist as PDF."""
    lines = [f"# {escaped(report.title)}", "", escaped(report.question), ""]
    lines += [part for note in report.notes for part in (f"Note: {escaped(note)}", "")]
    lines += ["## What failed", "", escaped(report.failure_line()), ""]
    if report.failures.rows:
        lines += _table(TableBlock(report.failures.columns, report.failures.rows))
    if report.contrasts is not None:
        lines += ["## Planned contrasts", "", *_table(report.contrasts)]
    lines += ["## Verdicts", ""]
    for verdict in report.verdicts:
        detail = f" {escaped(verdict.detail)}" if verdict.detail else ""
        lines.append(f"- **{escaped(verdict.text)}**{detail}")
    lines.append("")
    for section in report.sections:
        lines += [f"## {escaped(section.heading)}", ""]
        for block in section.blocks:
            lines += _block(block, pdf)
    lines += ["## Provenance", "", "| key | value |", "|---|---|"]
    lines += [f"| {escaped(key)} | {escaped(value)} |" for key, value in flat(report.provenance)]
    lines += ["", "## Reproduce", "", "```", report.command, "```"]
    return "\n".join(lines) + "\n"
