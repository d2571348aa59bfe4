"""Commands that README and docs show exist and their settings resolve; links to headings lead to one.

Links between files and Python blocks are tested in test_readme.py, docs/coverage.md in test_coverage.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import ROOT, bad_command, beside_the_examples

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Every ``descentlab COMMAND …`` on a line of a fenced block, up to two spaces, or in backquotes."""
    lines = [line for language, block in FENCE.findall(text) if language != "python" for line in block.splitlines()]
    shown = [re.split(r"\s{2,}|\s#\s", line)[0] for line in lines]
    shown += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return [line for line in shown if re.match(r"descentlab \w+ \S", line) and "…" not in line]


def headings(page: Path) -> set[str]:
    """The anchors of a page, as Markdown renderers make them from its headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    with beside_the_examples():
        assert [(command, why) for command in commands(page.read_text()) if (why := bad_command(command))] == []


def test_commands_are_found() -> None:
    text = "`descentlab fly high`, `descentlab run`\n```\ndescentlab run recovery size=quick    what it does\nls\n```\n"
    assert commands(text) == ["descentlab run recovery size=quick", "descentlab fly high"]
    assert sum(len(commands(page.read_text())) for page in PAGES) > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+#[^)\s]+)\)", FENCE.sub("", page.read_text())):
        file, _, anchor = target.partition("#")
        if "://" not in target:
            assert anchor in headings(page.parent / file if file else page), target


def test_pages_are_plain_markdown() -> None:
    for page in PAGES:
        prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
        assert not re.search(r"<(?!!--)[a-zA-Z/][^>\n]*>", prose), page
