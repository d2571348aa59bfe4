"""README and docs: the set-up commands are where the scripts look for them, links lead somewhere, code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return [text for language, text in FENCE.findall(page.read_text()) if language == "python"]


def command(marker: str) -> str:
    """The one line of the fenced block after ``<!-- marker -->``."""
    found = re.findall(rf"^<!-- {marker} -->\n```\n([^\n]+)\n```$", README.read_text(), re.MULTILINE)
    assert len(found) == 1, f"expected one block of one line after {marker}"
    return str(found[0])


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 120


def test_setup_commands_are_one_line_each_and_make_the_same_environment() -> None:
    main, test = (command(marker).split(" && ") for marker in ("main-command", "test-command"))
    assert main[0] == test[0] == "python3 -m venv .venv"
    assert main[-1] == ".venv/bin/descentlab run recovery"
    assert test[-1] == ".venv/bin/pytest -n 2"
    assert all("-c constraints.txt" in steps[1] for steps in (main, test))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_exist(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


def test_every_page_of_the_docs_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [page for page in pages if page != "README.md" and f"({page})" not in index] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if code(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, one page in one namespace, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in code(page):
        exec(compile(block, str(page), "exec"), namespace)
