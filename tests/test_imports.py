"""Who may import whom, and where torch may not be loaded."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "descentlab"
ROOMS = ("workloads", "optim", "perturb", "cluster", "comm", "observe", "theory", "engine", "store")
SPECS = (*(f"{room}.specs" for room in ROOMS), "perturb.arm_specs", "optim.tuning_specs")
SPECS += ("workloads.partition_specs", "cluster.link_specs")
STUDIES = ("config", "analysis", "report", "theory", "store", "core", *SPECS)

# folder -> what it may import besides itself: a folder, or one module of it
ALLOWED: dict[str, tuple[str, ...]] = {
    "core": (),
    **dict.fromkeys(ROOMS, ("core",)),
    "config": ("core", *SPECS),
    "launch": ("core", "config", *ROOMS),
    "analysis": ("core.errors", "store", "theory"),
    "report": ("core.errors", "store", "theory", "analysis"),
    "studies": STUDIES,
    "studies/*/program.py": (*STUDIES, *ROOMS),  # named as a string by the study's spec, imported by launch
    "studies/*/program_*.py": (*STUDIES, *ROOMS),  # its parts
    "testing": ("core", "config", "launch", "analysis", "report", *ROOMS),
    "cli": ("core", "config", "store", "studies", "launch", "report"),
    "": ("config", "launch", "store", "observe", "perturb", "comm", "report"),  # descentlab/__init__.py, lazy
}
# At module level only these, the rest inside commands; its helpers are imported by commands only.
INSIDE_FUNCTIONS = {"cli/main.py": ("core",), "cli/__init__.py": (), "__init__.py": ()}
TORCH_FREE = ("core/__init__.py", "config/*.py", "analysis/*.py", "report/*.py", "cli/*.py", "store/__init__.py")
TORCH_FREE += ("__init__.py", "*/__init__.py", "*/specs.py", "studies/*/__init__.py", "studies/*/spec.py")
TORCH_FREE += ("*/*_specs.py",)


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Absolute dotted names that ``source`` imports anywhere, and whether importing ``source`` runs the import."""
    tree = ast.parse(source)
    later = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(n)]
    inner = {id(node) for outer in later for node in ast.walk(outer)}
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        yield from ((name, id(node) not in inner) for name in names)


def is_type_checking(node: ast.AST) -> bool:
    """``if TYPE_CHECKING:``. Its imports are arrows like any other, but load nothing."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def forbidden(relative: str, source: str) -> list[str]:
    """Imports in the file ``relative`` (to the package) that the table does not allow."""
    path = Path(relative)
    folder = path.parts[0] if len(path.parts) > 1 else ""
    rule = next((key for key in ALLOWED if "*" in key and path.match(key)), folder)
    allowed = ALLOWED[rule]
    package = path.name == "__init__.py"
    module = ".".join(["descentlab", *path.with_suffix("").parts])
    module = module.removesuffix(".__init__")
    found = []
    for name, top_level in imports(source, module, package):
        parts = name.split(".")
        if parts[0] != "descentlab" or parts[1:2] == ["__version__"]:
            continue
        target = ".".join(parts[1:])
        granted = [a for a in (folder, *allowed) if a and (target == a or target.startswith(f"{a}."))]
        if top_level and relative in INSIDE_FUNCTIONS:
            granted = [a for a in granted if a in INSIDE_FUNCTIONS[relative]]
        if not granted:
            found.append(f"{relative} imports {name}{' at module level' if top_level else ''}")
    return found


def test_every_import_follows_the_table() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found += forbidden(path.relative_to(PACKAGE).as_posix(), path.read_text())
    assert not found, "\n".join(found)


def test_every_folder_is_in_the_table() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert folders == {key for key in ALLOWED if key and "*" not in key}


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("optim/x.py", "from ..engine import lockstep"),
        ("optim/x.py", "import descentlab.engine.lockstep"),
        ("engine/x.py", "def f():\n    from ..optim.stacked import Stacked"),
        ("core/x.py", "from .. import store"),
        ("config/x.py", "from ..optim.stacked import Stacked"),
        ("report/x.py", "from ..core.state import State"),
        ("analysis/x.py", "from ..report import model"),
        ("studies/recovery/report.py", "from ...engine import lockstep"),
        ("studies/__init__.py", "from ..launch import api"),
        ("studies/recovery/program.py", "from ...launch import api"),
        ("testing/x.py", "from ..cli import main"),
        ("cli/main.py", "from ..launch import api"),
        ("cli/main.py", "from . import show"),
        ("__init__.py", "from .store import load"),
        ("optim/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..engine import lockstep"),
        ("optim/x.py", "from .. import run"),
    ],
)
def test_the_walk_notices_a_forbidden_import(relative: str, source: str) -> None:
    assert len(forbidden(relative, source)) == 1


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("engine/x.py", "from ..core.state import State\nfrom .y import z\nimport torch"),
        ("config/x.py", "from ..optim.specs import Adam\nfrom .. import __version__"),
        ("studies/recovery/program.py", "from ...engine.lockstep import run"),
        ("cli/main.py", "from ..core.errors import UserError\ndef f():\n    from ..launch import api"),
        ("report/__init__.py", "from .model import Report"),
    ],
)
def test_the_walk_allows_what_the_table_allows(relative: str, source: str) -> None:
    assert forbidden(relative, source) == []


def torch_free_modules() -> list[str]:
    files = {path for pattern in TORCH_FREE for path in PACKAGE.glob(pattern)}
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in sorted(files)]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def test_settings_commands_and_reports_load_without_torch() -> None:
    """In a fresh interpreter, so that what they import in turn counts too; each module is named if it loads torch."""
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} loads torch')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", script, *torch_free_modules()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
