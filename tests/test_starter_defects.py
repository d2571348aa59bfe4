"""Defects of the experiment starter (docs/defects.md) that no other test keeps out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

import descentlab as dl
from descentlab import store
from descentlab.cli.main import app
from descentlab.config.resolve import resolve, resolve_settings
from descentlab.config.starter import study_of
from descentlab.launch import api, queue
from descentlab.store import RunDirectory

SMALL = ["dataset=digits", "model.pool=0", "optimizer=sgd", "optimizer.lr=0.1", "replicates=1"]
STARTER: dict[str, Any] = {"train_length_unit": "step", "train_length": 4, "batch_size": 64, "base_lr": 0.5}


def contents(path: Path) -> dict[str, str]:
    files = (p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_dry_run_with_overwrite_deletes_nothing(tmp_path: Path) -> None:
    """Not a byte of earlier results changes, with the same settings and with others."""
    dl.run("training", *SMALL, "steps=4", out=tmp_path / "o", launcher="local")
    before = contents(tmp_path)
    for more in ([], ["seed=1"]):
        done = CliRunner().invoke(
            app, ["run", "training", *SMALL, "steps=4", *more, "-n", "--overwrite", "--out", str(tmp_path / "o")]
        )
        assert done.exit_code == 0, done.output
    assert contents(tmp_path) == before and len(before) > 10


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_schedule": "step_1_0.1"},
        {"base_lr": 1},
        {"loss": "square"},
        {"loss": "mse"},
        {"train_length_unit": "sample", "train_length": 640, "steps_per_epoch": 2},
        {"eval_batch_size": None},
        {"averaging": "ema_0.999"},
        {"LIST_A": [{"optim_alg": "sgd", "momentum": [0, 0.9]}, {"optim_alg": "adam", "momentum": ["0.9,0.99"]}]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_crashed_trains(settings: dict[str, Any]) -> None:
    """Every setting with which the starter ended in a traceback, read from its own spelling and trained for real."""
    own = {**STARTER, **settings}
    if any(key.startswith("LIST") for key in own):
        own = {"job_details": {"name": "x", "output_dir": "x"}, "parameters": own}
    made, _ = study_of({**own})
    made = {**made, "dataset": "digits", "replicates": 1}
    resolved = resolve_settings(made)
    assert all(cell.optimizer.lr for cell in resolved.cells)
    cell = resolved.cells[0]
    words = [*SMALL, f"steps={cell.steps or 10}", f"loss={cell.loss}"]
    schedule, averaging = cell.schedule.model_dump(mode="json"), cell.averaging.model_dump(mode="json")
    flat = [f"{key}={value}" for key, value in (("schedule", schedule["name"]), ("averaging", averaging["name"]))]
    losses = [e.rows["test_loss"].drop_nulls()[-1] for e in dl.train("training", *words, *flat)]
    assert losses and all(loss == loss for loss in losses)


def test_accumulation_trains_the_full_length(tmp_path: Path) -> None:
    """Epochs of a number of steps, four micro-batches each: as many optimizer steps and samples as without."""
    words = [*SMALL, "epochs=3", "steps_per_epoch=5", "evaluate_epochs=1", "batch_size=64"]
    one, four = (
        dl.run("training", *words, f"accumulation={n}", out=tmp_path / str(n), launcher="local").frame for n in (1, 4)
    )
    for frame in (one, four):
        assert frame["step"].max() == 14 and frame["samples"].max() == 15 * 64
        assert frame.filter(pl.col("test_loss").is_not_null())["step"].to_list() == [4, 9, 14]


def test_a_rerun_leaves_queued_jobs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two blocks that never began, one is in a waiting job: the rerun runs the other.

    Fails when the queue is not asked, or its answer ignored.
    """
    words = [*SMALL[:-1], "replicates=2", "steps=4", "members_per_block=1"]
    whole = dl.run("training", *words, out=tmp_path / "o", launcher="local")
    directory = RunDirectory.open(whole.path)
    first, second = directory.block_keys()
    for key in (first, second):
        for path in sorted(directory.block_folder(key).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        directory.block_folder(key).rmdir()
    (directory.path / "slurm").mkdir()
    directory.replace_jsonl(queue.JOBS, [{"job": "7_0", "blocks": [first], "submitted": "", "code": ""}])
    monkeypatch.setattr(queue, "_squeue", lambda: {"7_0": "pending (Priority)"})
    assert api.rerun(directory.path, launcher="local") == 0
    assert directory.block_keys() == [second]
    assert store.status(directory.path).counts() == {"done": 1, "queued": 1}
    assert "1 blocks wait or run in Slurm jobs" in capsys.readouterr().err


def test_a_dry_run_counts_what_is_left(tmp_path: Path) -> None:
    """Of three replicates two are done: a third of the member-steps is quoted; all of them with --overwrite."""
    few = [*SMALL[:-1], "steps=4", "members_per_block=1"]
    dl.run("training", *few, "replicates=2", out=tmp_path / "o", launcher="local")
    three = resolve("training", [*few, "replicates=3"])
    assert api.estimate(three, tmp_path / "o")[0] == (
        f"3 runs in 3 blocks, 2 of them done in {tmp_path / 'o'}, 4 member-steps"
    )
    assert api.estimate(three)[0] == "3 runs in 3 blocks, 12 member-steps"
