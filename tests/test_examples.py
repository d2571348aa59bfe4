"""The examples run as they stand; the replay is an independent check of what the store says a fault did."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import descentlab as dl
from descentlab.config.resolve import resolve
from descentlab.launch import api
from descentlab.launch.block import run_block
from descentlab.store import load

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    """The module in ``examples/NAME.py``."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_does_not_use_the_package(name: str) -> None:
    tree = ast.parse((EXAMPLES / name).read_text())
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not [module for module in modules if module.split(".")[0] == "descentlab"]


def test_minimal_loop_is_short_and_reports_a_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert len((EXAMPLES / "minimal_loop.py").read_text().splitlines()) < 150
    example("minimal_loop").main()
    lines = capsys.readouterr().out.splitlines()
    excess = [float(value) for line in lines for value in re.findall(r"excess test loss ([+-][\d.]+)", line)]
    assert len(lines) == len(excess) == 6
    assert sum(excess[:5]) / 5 == pytest.approx(excess[5], abs=1e-4)
    assert all(e != 0 for e in excess)  # breaks when the hit reaches nothing, or the twin too


@pytest.fixture(scope="module")
def recovery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases of the recovery study, a convolution (before BatchNorm) among them; without its report."""
    settings = ["size=quick", "cases=2", "recovery_steps=2", "observe.evaluate_every=0"]
    resolved = resolve("recovery", settings)
    out = tmp_path_factory.mktemp("replay") / "recovery"
    assert api.run(resolved, out, launcher="local", with_report=False) == 0
    load(out)  # writes table.parquet and hits.jsonl
    return out


def losses(output: str) -> dict[str, tuple[float, float]]:
    """Optimizer -> (stored, replayed) loss."""
    rows = [line.split() for line in output.splitlines()]
    return {row[0]: (float(row[1]), float(row[2])) for row in rows}


def test_replay_gives_the_stored_loss(recovery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks when index order, value, site (before the bias), batch or weights in the store are not the run's."""
    for case in (0, 1):
        example("replay_fault").main(recovery, case)
        replayed = losses(capsys.readouterr().out)
        assert set(replayed) == {"sgd", "adam", "rmsprop", "adamw"}
        for stored, again in replayed.values():
            assert again == pytest.approx(stored, rel=1e-5)


def test_replay_without_the_fault_gives_another_loss(recovery: Path) -> None:
    """As a command, in a process that has not imported the package."""
    first = (recovery / "campaign.jsonl").read_text().splitlines()[0]
    assert '"case": 0' in first and '"layer": "head"' not in first
    code = f"import replay_fault, pathlib; replay_fault.main(pathlib.Path({str(recovery)!r}), 0, False)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    replayed = losses(done.stdout)
    assert len(replayed) == 4
    for stored, clean in replayed.values():
        assert abs(clean - stored) > 1e-3 * abs(stored)


def test_a_replayed_hit_is_written_again_by_a_resumed_block(recovery: Path) -> None:
    """A block killed before its first checkpoint starts again: the same arrays, and no half-written file stays."""
    files = sorted(recovery.glob("blocks/*/artifacts/hit-*.npz"))
    assert len(files) == 8
    before = {path: path.read_bytes() for path in files}
    block = files[0].parent.parent
    (block / "done.json").unlink()
    stray = block / "artifacts" / ".hit.npz.1.tmp"
    stray.touch()
    run_block(recovery, block.name)
    assert {path: path.read_bytes() for path in files} == before
    assert not stray.exists()


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells one after the other on a small grid; the last one gives a figure with a line and a band per rate."""
    grid = ["optimizer=sgd", "optimizer.lr=0.1,0.5", "steps=20", "observe.evaluate_every=5", "replicates=3"]
    dl.run("training", "dataset=digits", "model.pool=0", *grid, out=tmp_path / "o", launcher="local")
    monkeypatch.setenv("DIR", str(tmp_path / "o"))
    notebook = json.loads((EXAMPLES / "analysis.ipynb").read_text())
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    (axes,) = names["figure"].axes
    assert len(axes.lines) >= 2 and len(axes.collections) >= 2 and axes.get_yscale() == "log"
    assert {s.settings["optimizer.lr"] for s in names["best"]} == {0.1, 0.5}


def test_load_without_a_directory_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_loop/load.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and done.stderr.startswith("usage: python load.py DIR")
