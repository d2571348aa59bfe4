"""An optimizer, a fault, an observable and a study from outside the package: under 30 lines each, and they run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from commands import THIRD_PARTY as EXAMPLES
from commands import beside_the_examples

import descentlab as dl
from descentlab.core.errors import UserError
from descentlab.store import Results

QUICK = ("size=quick", "cases=1", "recovery_steps=2", "model=mlp", "batch_size=8")


@pytest.fixture(autouse=True)
def _beside_the_user_s_files() -> Iterator[None]:
    with beside_the_examples():
        yield


def test_each_is_under_30_lines() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    known = ["my_dataset.py", "my_fault.py", "my_model.py", "my_observable.py", "my_optimizer.py", "my_study.py"]
    assert sorted(lines) == known
    assert max(lines.values()) < 30


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Results:
    with beside_the_examples():
        extra = "observe.extra=[my_observable:Sparsity,per_class_accuracy]"
        settings = ("optimizer=my_optimizer:SignDescent", "optimizer.lr=1e-2", "fault=my_fault:StuckColumn", extra)
        return dl.run("recovery", *QUICK, *settings, out=tmp_path_factory.mktemp("third") / "run", launcher="local")


def test_optimizer(run: Results) -> None:
    """Every weight of a sign rule moves by lr: the norm of an update is lr sqrt(386) where no momentum is zero."""
    frame = run.frame
    assert set(frame["optimizer"]) == {"my_optimizer:SignDescent"} and set(frame["lr"]) == {0.01}
    assert frame["update_norm"].max() == pytest.approx(0.01 * np.sqrt(386), rel=0.02)


def test_fault(run: Results) -> None:
    """Eight samples, unit 0 of ten: flat elements 0, 10, 20 …; the twin's loss differs from the hit step on."""
    (hit,) = run.hits
    assert hit["index"] == list(range(0, 80, 10)) and set(hit["new"]) == {0.0} and all(hit["old"])
    fault, twin = (run.frame.filter(role=role).sort("step") for role in ("fault", "twin"))
    different = (fault["train_loss"] != twin["train_loss"]).arg_true().to_list()
    assert hit["step"] == 5 and different[0] == 5


def test_observables_survive_table_and_csv(run: Results, tmp_path: Path) -> None:
    frame = run.frame
    assert frame["zero_share"].is_between(0, 1).all() and "zero_share_tensor_3" in frame.columns
    classes = [f"test_accuracy_class_{k}" for k in range(10)]
    shown = frame.filter(pl.col("test_accuracy").is_not_null())
    assert shown.height and shown.select(classes).null_count().sum_horizontal().item() == 0
    mean = shown.select(pl.mean_horizontal(classes)).to_series()  # 100 test images of each class
    np.testing.assert_allclose(mean.to_numpy(), shown["test_accuracy"].to_numpy(), atol=1e-6)
    frame.write_csv(tmp_path / "table.csv")
    again = pl.read_csv(tmp_path / "table.csv")
    assert again[classes[3]].to_list() == frame[classes[3]].to_list()


def test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = dl.run("my_study:STUDY", "steps=4", "model=mlp", out=tmp_path / "run", launcher="local")
    assert len(results.runs) == 6 and results.frame.height == 24 and set(results.frame["batch_size"]) == {16, 64}
    assert "batch size 16: " in capsys.readouterr().out and (tmp_path / "run" / "report" / "index.html").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("per_class_acuracy", "did you mean 'per_class_accuracy'"),
        ("nowhere:X", "an importable module"),
        ("my_observable:X", "a name defined in module"),
        ("my_optimizer:torch", "a class with name, needs and measure"),
    ],
)
def test_an_observable_that_is_none_is_named_before_anything_runs(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"observe.extra = '{name}': expected .*{text}"):
        dl.run("recovery", *QUICK, f"observe.extra=[{name}]", out=tmp_path / "run", launcher="local")
    assert not (tmp_path / "run").exists()
