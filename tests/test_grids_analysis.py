"""Best of a grid, sensitivity, queries and plots, from a table made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import descentlab as dl
from descentlab.analysis.grids import best_of, sensitivity, settings_of
from descentlab.cli.main import app
from descentlab.core.errors import UserError
from descentlab.report.curves import band
from descentlab.report.grids import _frame

FINALS = {  # (lr, batch size) -> the final test loss of three replicates
    (0.1, 8): (1.0, 2.0, 3.0),
    (0.1, 16): (1.0, 1.0, 1.3),
    (1.0, 8): (0.1, 0.1, math.nan),  # one replicate diverged
    (1.0, 16): (5.0, 5.0, 5.0),
}


def made() -> Any:
    rows, runs, status = [], [], []
    for cell, ((lr, batch), finals) in enumerate(FINALS.items()):
        for replicate, final in enumerate(finals):
            run = f"r{cell}{replicate}"
            state = "diverged" if math.isnan(final) else "done"
            runs.append({"id": run, "cell": cell, "replicate": replicate, "role": "plain"})
            status.append({"run": run, "status": state})
            for step, loss in enumerate((9.0, final)):
                fixed = {
                    "run": run,
                    "optimizer": "sgd",
                    "step": step,
                    "attempt": 0,
                    "cell": cell,
                    "replicate": replicate,
                }
                rows.append(
                    {**fixed, "optimizer.lr": lr, "batch_size": batch, "test_loss": loss, "test_accuracy": -loss}
                )
    return SimpleNamespace(frame=pl.DataFrame(rows), runs=runs, status=status, spec={}, path=Path())


def test_order_failures_and_suboptimality() -> None:
    """By hand: the worst finite final is 5, so the cell with a diverged replicate has mean (.1 + .1 + 5) / 3 and still
    ranks behind every cell without failures. Breaks when a diverged run is dropped (it would win with mean .1)."""
    found = settings_of(made(), "test_loss")
    assert [(s.settings["optimizer.lr"], s.settings["batch_size"]) for s in found] == [
        (0.1, 16), (0.1, 8), (1.0, 16), (1.0, 8)
    ]  # fmt: skip
    means = [1.1, 2.0, 5.0, 5.2 / 3]
    assert [s.value.value for s in found] == pytest.approx(means)
    assert [s.suboptimality for s in found] == pytest.approx([m - 1.1 for m in means])
    assert [s.failed for s in found] == [0, 0, 0, 1]
    same = settings_of(made(), "test_accuracy")  # minus the loss: larger is better by its name
    assert [s.cell for s in same] == [s.cell for s in found]
    assert next(s.cell for s in settings_of(made(), "test_loss", "max")) == 3


def test_best_of_each_group() -> None:
    found = best_of(made(), "test_loss", ["batch_size"])
    assert [(s.settings["batch_size"], s.settings["optimizer.lr"]) for s in found] == [(16, 0.1), (8, 0.1)]


def test_sensitivity() -> None:
    found = sensitivity(made(), "test_loss", "optimizer.lr", "batch_size")
    assert (list(found.rows), list(found.columns)) == ([0.1, 1.0], [8, 16])
    means = [[s.value.value if s else None for s in row] for row in found.table]
    assert np.allclose(means, [[2.0, 1.1], [5.2 / 3, 5.0]])


def test_bands_are_t_intervals_over_runs() -> None:
    frame = made().frame.filter(pl.col("cell") == 0)
    x, mean, low, high = band(frame, "step", "test_loss")
    assert x.tolist() == [0, 1] and mean.tolist() == [9.0, 2.0]
    half = 4.302652729911275 * 1.0 / math.sqrt(3)  # t(.975, 2 d.f.), standard deviation 1
    assert (high - mean).tolist() == pytest.approx([0.0, half]) and (mean - low).tolist() == pytest.approx([0.0, half])


def test_suboptimality_is_against_the_best_of_the_same_column() -> None:
    frame = _frame(made(), "test_loss", True)
    assert frame["test_loss"].min() == 0.0 and frame.filter(pl.col("run") == "r01")["test_loss"].to_list() == [8.9, 1.9]
    accuracy = _frame(made(), "test_accuracy", True)
    assert accuracy.filter(pl.col("run") == "r01")["test_accuracy"].to_list() == [8.9, 1.9]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: settings_of(made(), "tst_loss"), "--metric = 'tst_loss'.*did you mean 'test_loss'"),
        (lambda: best_of(made(), "test_loss", ["lr"]), "--by = 'lr': expected a column"),
        (
            lambda: sensitivity(made(), "test_loss", "step", "batch_size"),
            "--rows = 'step': expected a setting",
        ),
    ],
)
def test_mistakes(call: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run: every command, and one line for each mistake."""
    monkeypatch.chdir(tmp_path)
    small = ["size=quick", "dataset=digits", "model.pool=0", "optimizer=sgd", "optimizer.lr=0.1,0.5", "steps=4"]
    dl.run("training", *small, "replicates=2", out="d", launcher="local")

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    assert "lr=0.5" in invoke("best", "d").stdout
    assert invoke("sensitivity", "d", "--rows", "optimizer.lr", "--columns", "optimizer.lr").exit_code == 0
    chosen = invoke("table", "d", "--where", 'step = 3 AND "optimizer.lr" > 0.2', "--columns", "run,step").stdout
    assert len(chosen.splitlines()) == 3 and all(line.endswith(",3") for line in chosen.splitlines()[1:])
    drawn = invoke("plot", "d", "--hue", "optimizer.lr", "--y", "train_loss", "--out", "a.pdf", "--suboptimality")
    assert drawn.stdout == "a.pdf\n" and (tmp_path / "a.pdf").read_bytes()[:5] == b"%PDF-"
    mistakes = [
        (("table", "d", "--where", "stp = 3"), "--where = 'stp = 3': expected a condition in SQL"),
        (("table", "d", "--columns", "stp"), "did you mean 'step'"),
        (("table", "d", "--out", "t.xyz"), "--out = 't.xyz': expected a name that ends in .csv or .parquet"),
        (("plot", "d", "--hue", "run", "--y", "lrr"), "--y = 'lrr'"),
        (("plot", "d", "--y", "run"), "--y = 'run': expected a column of numbers"),
        (("plot", "d", "--out", "a.xyz"), "--out = 'a.xyz': expected a file that can be written"),
        (("plot", "d", "--x", "step", "--rows", "train_loss"), "plot = 'train_loss': expected a key with at most 8"),
    ]
    for arguments, says in mistakes:
        failed = invoke(*arguments)
        assert failed.exit_code == 2 and says in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr
