"""What a report is made of, and its rendering to HTML, Markdown, figures and a flat summary. Imports no torch."""

from .model import Column, FigureBlock, Paragraph, Report, Section, SummaryItem, TableBlock, Verdict

__all__ = ["Column", "FigureBlock", "Paragraph", "Report", "Section", "SummaryItem", "TableBlock", "Verdict"]
