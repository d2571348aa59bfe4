"""The command line: what it prints, what a mistake says, and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

import descentlab.launch
from descentlab import store
from descentlab.cli import main as cli
from descentlab.config import yaml12
from descentlab.core.errors import StudyError, UserError
from descentlab.store import RunDirectory

# a mistake and words of the one line it must print
MISTAKES = [
    (["run", "recovery", "optimizer=adma"], ["optimizer = 'adma'", "expected one of", "did you mean 'adam'?"]),
    (["run", "recovery", "optimiser.lr=0.1"], ["optimiser.lr = 0.1", "did you mean 'optimizer.lr'?"]),
    (["run", "recovery", "optimizer.lr=-1"], ["optimizer.lr = -1", "expected a value greater than 0"]),
    (["run", "recovry"], ["study = 'recovry'", "did you mean 'recovery'?"]),
    (["run", "crossed", "fault.step=100000"], ["fault.step = 100000", "expected a step below steps = 200"]),
    (["run", "recovery", "-n", "optimizer"], ["argument = 'optimizer'", "expected key.path=value"]),
    (["run", "training", "replicates=1000000"], ["runs = 1000000", "expected at most 10000 without -y"]),
    (["show", "missing.yaml"], ["file = 'missing.yaml'", "expected a readable file"]),
    (["status", "nowhere"], ["DIR = 'nowhere'", "expected an existing directory"]),
    (["table", "nowhere"], ["DIR = 'nowhere'", "expected an existing directory"]),
    (["list", "modles"], ["KIND = 'modles'", "did you mean 'models'?"]),
]


def descentlab_(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    code = "from descentlab.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for launch.api and records what the commands ask of it."""
    made: list[tuple[Any, ...]] = []

    def run(resolved: Any, out: Path, **options: Any) -> int:
        made.append(("run", resolved, out, options))
        return 0

    def estimate(resolved: Any, out: Path | None = None) -> list[str]:
        return [f"about 3 s for {len(resolved.runs)} runs"]

    def report(directory: Path) -> Path:
        return directory / "report" / "index.html"

    def rerun(directory: Path) -> int:
        made.append(("rerun", directory))
        return 3

    def check_launcher(resolved: Any, launcher: str) -> None: ...

    fake = types.ModuleType("descentlab.launch.api")
    vars(fake).update(run=run, estimate=estimate, report=report, rerun=rerun, check_launcher=check_launcher)
    monkeypatch.setitem(sys.modules, "descentlab.launch.api", fake)
    monkeypatch.setattr(descentlab.launch, "api", fake, raising=False)
    return made


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "words"), MISTAKES[:3])
def test_a_mistake_in_a_real_process(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    done = descentlab_(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert all(word in line for word in ["error: ", *words])
    assert list(tmp_path.iterdir()) == []


def test_several_mistakes_are_a_line_each() -> None:
    result = invoke("run", "recovery", "optimizer=adma", "seed=-1", "colour=1")
    assert result.exit_code == 2
    assert [line.split(" = ")[0] for line in result.stderr.splitlines()] == [
        "error: optimizer",
        "error: colour",
        "error: seed",
    ]


def test_an_unknown_launcher_and_a_missing_study_are_usage_errors() -> None:
    for arguments in (["run", "recovery", "--launcher", "cloud"], ["run"], ["rnu", "recovery"]):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "Error: " in result.stderr
        assert "Traceback" not in result.stderr


def test_run_hands_over_what_was_asked(calls: list[tuple[Any, ...]]) -> None:
    result = invoke("run", "recovery", "size=quick", "optimizer=adam", "--launcher", "local", "-y")
    assert result.exit_code == 0, result.stderr
    ((_, resolved, out, options),) = calls
    assert (out, options) == (Path("out/recovery"), {"yes": True, "launcher": "local", "overwrite": False})
    assert len(resolved.runs) == 6
    shown = result.stdout.splitlines()
    assert "batch_size = 64  (default)" in shown
    assert "size = quick" in shown
    assert "optimizer.lr = 0.01  (default)" in shown
    assert "6 runs in 1 cell" in shown


def test_run_prints_notes_and_the_grid_as_it_would_be_typed(calls: list[tuple[Any, ...]]) -> None:
    shown = invoke("run", "recovery", "fault=RD", "seed=1,2", "--out", "x").stdout.splitlines()
    assert "seed = 1,2  (grid)" in shown
    assert any(line.startswith("note: fault=RD drops what the study sets for 'N16_RD': value_") for line in shown)
    typed = next(line for line in shown if line.startswith("optimizer = "))
    assert typed.endswith("(grid, default)")
    again = "optimizer=" + typed.removeprefix("optimizer = ").removesuffix("  (grid, default)")
    ids = invoke("show", "recovery", "--runs").stdout
    assert invoke("show", "recovery", "--runs", again).stdout == ids


def test_the_default_directory_of_a_file_is_named_after_it(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("study: recovery\nsize: quick\n")
    assert invoke("run", str(path)).exit_code == 0
    assert calls[0][2] == Path("out/mine")


def test_a_dry_run_lists_runs_and_cost_and_touches_nothing(
    calls: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = invoke("run", "crossed", "size=quick", "-n").stdout.splitlines()
    assert shown[-1] == "about 3 s for 48 runs"
    assert sum("replicate=" in line for line in shown) == 48
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_show_runs_has_the_id_first() -> None:
    shown = invoke("show", "recovery", "size=quick", "optimizer=adam,sgd", "--runs").stdout.splitlines()
    assert len(shown) == 12
    assert all(len(line.split()[0]) == 12 and int(line.split()[0], 16) >= 0 for line in shown)
    assert "cell=0 replicate=0 role=twin case=0 optimizer=adam optimizer.lr=0.01" in shown[0]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("models", ["mlp", "cnn", "hidden = [8]"]),
        ("workloads", ["dataset: ", "model: "]),
        ("optimizers", ["adamw", "weight_decay = 0.01"]),
        ("faults", ["N16_RD", "value_high = 120000000.0"]),
        ("observables", ["grad_norm", "observe.evaluate_every = 10"]),
        ("studies", ["recovery", "preset = default, published"]),
        ("compressors", ["powersgd", "rank = 1"]),
        ("timelines", ["round_robin"]),
        ("datasets", ["mnist5k"]),
    ],
)
def test_list(kind: str, words: list[str]) -> None:
    result = invoke("list", kind)
    assert result.exit_code == 0
    for word in words:
        assert word in result.stdout


def test_a_terminal_gets_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from descentlab.cli import show
    from descentlab.config.resolve import resolve

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    show.settings(resolve("recovery", ["size=quick"]))
    shown = capsys.readouterr().out
    assert "{name: sgd, lr: 0.1, momentum: 0.9},{name: adam, lr: 0.01}" in shown  # no markup eats the brackets
    assert "[8, 16, 16]" in shown


# directories ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "results"
    RunDirectory.create(path, "recovery", yaml12.dump({"study": "recovery"}))
    return path


def test_status_of_an_empty_directory(directory: Path) -> None:
    result = invoke("status", str(directory))
    assert (result.exit_code, result.stdout) == (0, "recovery: no runs\n")


def test_status_counts_and_names_what_went_wrong(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from descentlab.store.progress import BlockStatus, RunStatus, Status

    state = Status(
        "recovery",
        (BlockStatus("b0", "done", 5, 5, ("r0",)), BlockStatus("b1", "failed", 2, 5, ("r1",), "out of memory")),
        (RunStatus("r0", "diverged", 5, "loss is NaN"), RunStatus("r1", "failed", 2)),
    )
    monkeypatch.setattr(store, "status", lambda path: state, raising=False)
    assert invoke("status", str(directory)).stdout.splitlines() == [
        "recovery: 1 failed, 1 diverged, 70 %",
        "block b1 failed 2/5 steps out of memory",
        "run r0 diverged 5 steps loss is NaN",
        "run r1 failed 2 steps",
    ]


def test_status_of_somebody_elses_directory(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    result = invoke("status", str(tmp_path))
    assert result.exit_code == 2
    assert "expected a directory made by descentlab" in result.stderr


def test_table_formats(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pl.DataFrame({"run": ["a"], "step": [0], "train_loss": [float("nan")]})
    monkeypatch.setattr(store, "load", lambda path: types.SimpleNamespace(frame=frame), raising=False)
    assert invoke("table", str(directory)).stdout == "run,step,train_loss\na,0,NaN\n"
    for name, options in (("t.parquet", []), ("t.bin", ["--format", "parquet"])):
        assert invoke("table", str(directory), "--out", str(tmp_path / name), *options).exit_code == 0
        assert pl.read_parquet(tmp_path / name).equals(frame)
    assert pl.read_parquet(invoke("table", str(directory), "--format", "parquet").stdout_bytes).equals(frame)
    result = invoke("table", str(directory), "--out", str(tmp_path / "no" / "t.csv"))
    assert result.exit_code == 2
    assert "expected a file that can be written" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results", "t.bin", "t.parquet"]


def test_report_and_rerun(calls: list[tuple[Any, ...]], directory: Path) -> None:
    assert invoke("report", str(directory)).stdout.strip() == str(directory / "report" / "index.html")
    assert invoke("rerun", str(directory)).exit_code == 3
    assert calls == [("rerun", directory)]


# how commands end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (UserError("--out", "/x", "a directory that can be written"), 2, "error: --out = '/x': expected a directory"),
        (StudyError("part-00000.arrow is cut short; delete it"), 1, "error: part-00000.arrow is cut short"),
        (KeyboardInterrupt(), 130, "stopped; to resume: descentlab run recovery 'optimizer={name: adam}'"),
    ],
)
def test_exit_codes(
    raised: BaseException, code: int, says: str, calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> int:
        raise raised

    monkeypatch.setattr(sys.modules["descentlab.launch.api"], "run", run)
    arguments = ["run", "recovery", "optimizer={name: adam}"]
    monkeypatch.setattr(sys, "argv", ["descentlab", *arguments])
    result = invoke(*arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1)
    assert result.stderr.startswith(says)


# what is not imported ------------------------------------------------------------------------------------------------

HEAVY = ("torch", "polars", "matplotlib", "numpy", "scipy", "sklearn")
PROBE = """
import sys
from descentlab.cli.main import app
try:
    app(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print("loaded", code, *(m for m in {heavy!r} if m in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        (["--help"], ("pydantic", "yaml", "rich")),
        (["run", "--help"], ("yaml", "rich")),
        (["show", "recovery", "--runs"], ("rich",)),
        (["list", "models"], ("rich",)),
        (["list", "studies"], ()),
    ],
)
def test_light_commands_import_nothing_heavy(arguments: list[str], more: tuple[str, ...], tmp_path: Path) -> None:
    code = PROBE.format(heavy=(*HEAVY, *more))
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr.strip() == "loaded 0"


def test_help_and_version_in_a_real_process(tmp_path: Path) -> None:
    shown = descentlab_("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for command in ("run", "status", "show", "list", "report", "table", "rerun"):
        assert f"\n  {command} " in shown.stdout
    assert descentlab_("--version", cwd=tmp_path).stdout.startswith("descentlab ")
