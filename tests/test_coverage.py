"""docs/coverage.md claims nothing that is not there: its rows are complete, commands resolve, tests exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from commands import ROOT, bad_command

PAGE = ROOT / "docs" / "coverage.md"
ROWS = {"R": 42, "T": 42, "A": 15, "P": 15, "D": 17}
ROW = re.compile(r"^\| ([A-Z]\d+) \| (.+?) \| (done|partly|not yet|declined) \| (?:`(.+?)`)? ?\| (?:`(.+?)`)? ?\|$")


def rows() -> list[tuple[str, str, str, str]]:
    """(number, status, command, test) of every row."""
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| [A-Z]\d+ ", line)]
    found = [ROW.match(line) for line in lines]
    wrong = [line for line, match in zip(lines, found, strict=True) if match is None]
    assert not wrong, f"not number, what, status, command, test: {wrong[0]}"
    return [(m[1], m[3], m[4] or "", m[5] or "") for m in found if m is not None]


CLAIMED = [row for row in rows() if row[1] in ("done", "partly")]


def test_every_row_is_there_once_and_in_order() -> None:
    assert [row[0] for row in rows()] == [f"{k}{i}" for k, n in ROWS.items() for i in range(1, n + 1)]


def test_rows_that_are_not_done_claim_nothing() -> None:
    assert [row for row in rows() if row[1] in ("not yet", "declined") and (row[2] or row[3])] == []


def test_a_row_that_is_declined_names_its_decision() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if "| declined |" in line]
    pages = [re.search(r"\]\((decisions/\d{4}-[\w-]+\.md)\)", line) for line in lines]
    assert lines and all(page is not None and (PAGE.parent / page[1]).is_file() for page in pages)


@cache
def names_in(path: Path) -> frozenset[str]:
    return frozenset(n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))


def missing_test(test: str) -> str | None:
    path, _, name = test.partition("::")
    if not path.startswith("tests/test_") or not (ROOT / path).is_file():
        return f"no file '{path}'"
    return None if name.startswith("test_") and name in names_in(ROOT / path) else f"no test '{name}' in {path}"


@pytest.mark.parametrize(("number", "status", "command", "test"), CLAIMED, ids=[row[0] for row in CLAIMED])
def test_a_claim_has_its_command_and_its_test(number: str, status: str, command: str, test: str) -> None:
    assert bad_command(command) is None
    assert missing_test(test) is None


@pytest.mark.parametrize(
    "command", ["", "rm -r /", "descentlab fly", "descentlab run recovery --magic", "pytest no.py"]
)
def test_a_command_that_does_not_exist_is_noticed(command: str) -> None:
    assert bad_command(command)


def test_a_test_that_does_not_exist_is_noticed() -> None:
    assert missing_test("tests/test_coverage.py::test_nothing") and missing_test("tests/test_none.py::test_x")
    assert missing_test("") and missing_test("tests/test_coverage.py::names_in")
