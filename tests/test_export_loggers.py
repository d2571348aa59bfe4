"""Exports read back by the tools they are for (the ``track`` extra; skipped where a tool is not installed)."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

import descentlab as dl
from descentlab import store
from descentlab.cli.export import export
from descentlab.core.errors import UserError
from descentlab.report import exports
from descentlab.report.exports import loggers, starter
from descentlab.report.exports.series import Series, flat, names, series
from descentlab.store import RunDirectory


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> store.Results:
    """Two learning rates, one of which diverges, two replicates."""
    small = ["size=quick", "dataset=digits", "model.pool=0", "optimizer=sgd", "optimizer.lr=0.1,1e30", "replicates=2"]
    out = tmp_path_factory.mktemp("loggers") / "out"
    return dl.run("training", *small, "steps=12", "observe.evaluate_every=5", out=out, launcher="local")


def rows(results: store.Results, run: str) -> pl.DataFrame:
    return results.frame.filter(pl.col("run") == run).sort("step")


def test_a_run_has_a_name_of_its_own_its_settings_and_its_rows(results: store.Results) -> None:
    found = list(series(results))
    assert [s.name for s in found] == [
        f"lr={lr},replicate={replicate}" for lr in ("0.1", "1e+30") for replicate in (0, 1)
    ]
    assert [s.status for s in found] == ["done", "done", "diverged", "diverged"]
    first = found[0]
    assert first.settings["optimizer"] == "sgd" and first.settings["optimizer.lr"] == 0.1
    table = rows(results, first.id)
    assert [step for step, _, _ in first.rows] == table["step"].to_list()
    assert [m["train_loss"] for _, _, m in first.rows] == table["train_loss"].to_list()
    evaluated = [step for step, _, m in first.rows if "test_loss" in m]
    assert evaluated == table.filter(pl.col("test_loss").is_not_null())["step"].to_list()


def test_names_that_would_be_equal_get_the_id() -> None:
    runs = [{"id": i, "replicate": 0, "role": "plain", "settings": {"a": 1}} for i in ("x", "y")]
    assert names(runs) == ["replicate=0,x", "replicate=0,y"]


def test_settings_are_flat() -> None:
    nested = {"optimizer": {"name": "sgd", "lr": 0.1}, "c": {"policy": {"name": "fixed", "k": 1}}, "name": "n"}
    assert flat(nested) == {"optimizer": "sgd", "optimizer.lr": 0.1, "c.policy": "fixed", "c.policy.k": 1, "name": "n"}


def test_starter(results: store.Results, tmp_path: Path) -> None:
    """stats.csv against the frame; done only where it is."""
    out = export("starter", Path(results.path), tmp_path / "starter")
    folders = sorted(p.name for p in out.iterdir() if p.is_dir())
    assert folders[0] == "000_training+opt_lr=0.1+rep=0" and len(folders) == 4
    assert [(out / f / "done").exists() for f in folders] == [True, True, False, False]
    first = results.runs[0]["id"]
    table = rows(results, first)
    with (out / folders[0] / "stats.csv").open() as file:
        stats = list(csv.DictReader(file))
    ends = table.filter(pl.col("test_loss").is_not_null())
    assert [float(r["test/last/loss"]) for r in stats] == ends["test_loss"].to_list()
    assert [int(float(r["train/seen_examples"])) for r in stats] == ends["samples"].to_list()
    begin = 0
    for row, end in zip(stats, ends["step"].to_list(), strict=True):
        part = table.filter(pl.col("step").is_between(begin, end))["train_loss"]
        assert float(row["train/loss"]) == pytest.approx(float(part.mean()))  # type: ignore[arg-type]
        begin = end + 1
    config = yaml.safe_load((out / folders[0] / "config.yaml").read_text())
    assert (config["base_lr"], config["optim_alg"], config["descentlab"]["optimizer"]["lr"]) == (0.1, "sgd", 0.1)


def made(**settings: Any) -> Series:
    return Series("id", "n", "g", "done", {**settings, "replicate": 0, "role": "plain"}, [])


def test_folder_names_neither_collide_nor_grow() -> None:
    run = made(batch_size=8, batch_sizzle=9, data="a b/c")
    keys = ["batch_size", "batch_sizzle", "data"]
    assert starter.folder_name(7, "s", run, keys) == "007_s+batch_size=8+batch_sizzle=9+dat=ab-c+rep=0"
    long = [made(key="x" * 300 + tail) for tail in "ab"]
    cut = [starter.folder_name(1, "s", run, ["key"]) for run in long]
    assert len({*cut}) == 2 and all(len(name) <= 255 for name in cut)


def test_tensorboard(results: store.Results, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = export("tensorboard", Path(results.path), tmp_path / "tb")
    folders = sorted(p for p in out.iterdir() if p.is_dir())
    assert len(folders) == 4
    held = accumulator.EventAccumulator(str(folders[0]))
    held.Reload()
    table = rows(results, results.runs[0]["id"])
    found = held.Scalars("train_loss")
    assert [e.step for e in found] == table["step"].to_list()
    assert [e.value for e in found] == pytest.approx(table["train_loss"].to_list(), rel=1e-6)
    assert len(held.Scalars("test_loss")) == table["test_loss"].count()


@pytest.mark.filterwarnings("ignore")  # those of mlflow and of what it imports
def test_mlflow(results: store.Results, tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    out = export("mlflow", Path(results.path), tmp_path / "ml")
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "descentlab-training"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(run.info.status for run in runs.values()) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    first = runs["lr=0.1,replicate=0"]
    assert first.data.params["optimizer.lr"] == "0.1"
    history = client.get_metric_history(first.info.run_id, "train_loss")
    assert [m.value for m in history] == rows(results, results.runs[0]["id"])["train_loss"].to_list()


@pytest.mark.filterwarnings("ignore")
def test_wandb_and_trackio_write_offline(results: store.Results, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    out = export("wandb", Path(results.path), tmp_path / "wb")
    assert len(list((out / "wandb").glob("offline-run-*/*.wandb"))) == 4
    pytest.importorskip("trackio")
    out = export("trackio", Path(results.path), tmp_path / "tr")
    assert (out / "descentlab-training.db").is_file()


def test_a_tool_that_is_not_there(results: store.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(loggers.importlib, "import_module", absent)
    with pytest.raises(
        UserError, match=r"export = 'wandb': expected the track extra: pip install 'descentlab\[track\]'"
    ):
        loggers.wandb(results, tmp_path)
    assert {"v3", "starter", "wandb", "mlflow", "tensorboard", "trackio"} <= {*exports.names()}
    assert math.isfinite(loggers._began(results))


def test_the_settings_of_a_run_give_its_id_again(results: store.Results, tmp_path: Path) -> None:
    """``spec.yaml`` of every run, read as a study, holds that run; ``job.yaml`` all of them; an earlier grid's file is
    kept beside it. Fails when a setting is lost, or the document that was replaced is."""
    from descentlab.config.resolve import resolve

    copy = Path(shutil.copytree(results.path, tmp_path / "copy"))
    old = (copy / "study.yaml").read_text()
    for document in (old, old + "# again\n", old + "# again\n", old):
        RunDirectory.create(copy, "training", document)
    assert [(copy / f"study.{n}.yaml").read_text() for n in (1, 2)] == [old, old + "# again\n"]
    out = export("starter", copy, tmp_path / "starter")
    ids = {str(run["id"]) for run in results.runs}
    assert (out / "job.1.yaml").read_text() == old
    assert {run.id for run in resolve(out / "job.yaml").runs} == ids
    found = {}
    for folder in (p for p in out.iterdir() if p.is_dir()):
        replicate = yaml.safe_load((folder / "config.yaml").read_text())["replicate"]
        found[folder.name] = {run.id for run in resolve(folder / "spec.yaml").runs if run.replicate == replicate}
    assert {run for held in found.values() for run in held} == ids and all(len(held) == 1 for held in found.values())
    RunDirectory.create(copy, "training", old, overwrite=True)
    assert not list(copy.glob("study.*.yaml"))
