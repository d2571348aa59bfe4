"""Several studies in one command, and copies of run directories without what is heavy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import descentlab as dl
from descentlab import store
from descentlab.cli import main as cli
from descentlab.cli.pull import command
from descentlab.core.errors import StudyError
from descentlab.launch import api

SMALL = ["dataset=digits", "model.pool=0", "optimizer=sgd", "replicates=2", "steps=12", "observe.evaluate_every=6"]
STUDY = "study: training\ndataset: digits\nmodel: {name: mlp, pool: 0}\nreplicates: 1\nsteps: 4\n"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four studies beside each other; their list names them in another order than the alphabet's."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("c", "a", "d", "b")):
        (tmp_path / f"{name}.yaml").write_text(STUDY + f"seed: {seed}\n")
    (tmp_path / "list.txt").write_text("c.yaml\na.yaml  # the second\n\nd.yaml\nb.yaml\n")
    return tmp_path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for launch.api.run: the names of the directories of what was run. Study a fails."""
    made: list[str] = []

    def run(resolved: Any, out: Path, **options: Any) -> int:
        made.append(out.name)
        if out.name == "a":
            raise StudyError("the disk of a is gone")
        return 0

    monkeypatch.setattr(api, "run", run)
    return made


def test_all_are_run_in_order_although_one_fails(studies: Path, ran: list[str]) -> None:
    result = invoke("batch", "list.txt")
    assert (ran, result.exit_code) == (["c", "a", "d", "b"], 1)
    assert "error: the disk of a is gone" in result.stderr


@pytest.mark.parametrize(("start", "expected"), [("2", ["d", "b"]), ("d", ["d", "b"]), ("b.yaml", ["b"])])
def test_it_starts_from_an_index_or_a_name(studies: Path, ran: list[str], start: str, expected: list[str]) -> None:
    invoke("batch", "c.yaml", "a.yaml", "d.yaml", "b.yaml", "--start", start)
    assert ran == expected


def test_what_is_finished_is_skipped_and_what_changed_is_not(studies: Path) -> None:
    """For real, in this process. Fails when a finished study is taken up, or a changed one is left out."""
    assert invoke("batch", "c.yaml", "d.yaml", "--launcher", "local").exit_code == 0
    page = studies / "out/c/report/index.html"
    before = page.stat().st_mtime_ns
    (studies / "d.yaml").write_text(STUDY + "seed: 2\n".replace("2", "7"))
    again = invoke("batch", "c.yaml", "d.yaml", "--launcher", "local")
    assert again.exit_code == 0 and "[0] c.yaml: 1 runs in out/c: done" in again.stdout
    assert "[1] d.yaml: 1 runs in out/d\n" in again.stdout
    assert page.stat().st_mtime_ns == before
    assert store.load("out/d").runs[0]["settings"]["seed"] == 7


def test_a_dry_run_writes_nothing_and_a_mistake_in_the_last_comes_first(studies: Path, ran: list[str]) -> None:
    assert invoke("batch", "list.txt", "-n").exit_code == 0
    (studies / "b.yaml").write_text(STUDY + "sead: 2\n")
    result = invoke("batch", "list.txt")
    assert (result.exit_code, ran) == (2, []) and "did you mean 'seed'?" in result.stderr
    assert not (studies / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.yaml", "--start", "e"], "--start = 'e': expected a number, or one of a"),
        (["a.yaml", "--start", "1"], "--start = '1': expected a number below 1, or one of a"),
        (["seed=1"], "STUDY = '': expected at least one study"),
        (["missing.txt"], "STUDY = 'missing.txt': expected an existing file"),
        (["a.yaml", "./a.yaml"], "STUDY = 'a': expected names that differ"),
    ],
)
def test_mistakes_are_one_line(studies: Path, arguments: list[str], said: str) -> None:
    result = invoke("batch", *arguments)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {said}")
    assert len(result.stderr.splitlines()) == 1


def test_studies_whose_processes_talk_get_ports_of_their_own(studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports: list[int] = []
    monkeypatch.setattr(api, "run", lambda resolved, out, **_: ports.append(resolved.cells[0].engine.port) or 0)
    for name in ("x", "y", "z"):
        (studies / f"{name}.yaml").write_text("study: crossed\nsize: quick\n")
    result = invoke("batch", "x.yaml", "y.yaml", "z.yaml", "--start", "1", "engine=process", "engine.port=29500")
    assert (ports, result.exit_code) == ([29501, 29502], 0), result.output


needs_rsync = pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A finished directory and what makes directories heavy: checkpoint, artifact, code, a stranger's file."""
    path = tmp_path / "far" / "study"
    dl.run("training", *SMALL, out=path, launcher="local")
    (block,) = (path / "blocks").iterdir()
    for name in ("checkpoint.pt", "artifacts/best-x.npz", "artifacts/moments-0.npz"):
        (block / name).parent.mkdir(exist_ok=True)
        (block / name).write_bytes(b"0" * 1000)
    for name in ("code/abc/descentlab/x.py", "slurm/1_submitted.pkl", "slurm/1_0_log.err", "private.txt"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"0")
    return path


@needs_rsync
def test_a_copy_reads_like_its_source_without_what_is_heavy(source: Path, tmp_path: Path) -> None:
    """Also where its table has to be made again. Fails when a file that reading needs stays behind."""
    result = invoke("pull", str(source), "--out", str(tmp_path / "near"))
    assert result.exit_code == 0, result.output
    names = {str(p.relative_to(tmp_path / "near")) for p in (tmp_path / "near").rglob("*") if p.is_file()}
    kept = {"table.parquet", "descentlab.json", "slurm/1_0_log.err", "report/index.html"}
    assert kept <= names and any(name.endswith("moments-0.npz") for name in names)
    heavy = ("checkpoint.pt", "best-x.npz", ".py", ".pkl", "private.txt")
    assert not [name for name in names if name.endswith(heavy)]
    there, here = store.load(source), store.load(tmp_path / "near")
    assert store.equal_tables(there.frame, here.frame) == [] and here.status == there.status
    (tmp_path / "near/table.parquet").unlink()
    assert store.equal_tables(there.frame, store.load(tmp_path / "near").frame) == []


@needs_rsync
def test_again_brings_what_is_new(source: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    assert invoke("pull", str(source), "--out", str(near)).exit_code == 0
    (source / "events.jsonl").write_text('{"kind": "new"}\n')
    assert invoke("pull", f"{source}/", "--out", str(near)).exit_code == 0
    assert (near / "events.jsonl").read_text() == '{"kind": "new"}\n'


def test_a_dry_run_prints_the_command(tmp_path: Path) -> None:
    result = invoke("pull", "host:lab/out/study", "-n", "--out", str(tmp_path / "x"))
    assert result.stdout.split()[0] == "rsync" and result.stdout.rstrip().endswith(f"host:lab/out/study/ {tmp_path}/x/")
    assert not (tmp_path / "x").exists()
    assert command("host:d/", Path("out/d"))[-2:] == ["host:d/", "out/d/"]


@needs_rsync
def test_mistakes_of_pull(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for arguments, said in (
        (("pull", str(tmp_path / "none"), "--out", str(tmp_path / "x")), "error: rsync could not copy"),
        (("pull", str(tmp_path / "none"), "--out", str(tmp_path / "mine")), "error: DIR = "),
        (("pull", str(tmp_path / "mine"), "--out", str(tmp_path / "y")), "error: pull = "),
        (("pull", str(tmp_path / "mine"), "--out", str(tmp_path / "mine")), "error: --out = "),
    ):
        result = invoke(*arguments)
        assert result.exit_code in (1, 2) and result.stderr.startswith(said), result.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
