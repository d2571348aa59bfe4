"""What a stranger can add from outside the package, by module:Name: under 30 lines each, and it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from commands import THIRD_PARTY as EXAMPLES
from commands import beside_the_examples

import descentlab as dl
from descentlab.core.errors import StudyError, UserError
from descentlab.store import Results

QUICK = ("size=quick", "cases=1", "recovery_steps=2", "model=mlp", "batch_size=8")


@pytest.fixture(autouse=True)
def _beside_the_user_s_files() -> Iterator[None]:
    with beside_the_examples():
        yield


def test_each_is_under_30_lines() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    known = ["compressor", "dataset", "delay", "fault", "model", "observable", "optimizer", "policy"]
    assert sorted(lines) == [f"my_{name}.py" for name in (*known, "staleness_rule", "study")]
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


CROSSED = ("fault=none", "optimizer=sgd", "replicates=1", "steps=12", "observe.evaluate_every=0", "workers=3")


def crossed(tmp_path: Path, *settings: str) -> pl.DataFrame:
    """Twelve updates of MLP-386 on three workers."""
    given = {text.split("=")[0] for text in settings}
    rest = [
        f"{key}={value}" for key, value in {"timeline": "barrier", "compressor": "none"}.items() if key not in given
    ]
    return dl.run("crossed", *CROSSED, *rest, *settings, out=tmp_path / "run", launcher="local").frame


def test_compressor(tmp_path: Path) -> None:
    """386 numbers of two bytes from each of three workers; with its error feedback it learns as the plain mean does."""
    frame = crossed(tmp_path / "half", "compressor=my_compressor:HalfPrecision")
    whole = crossed(tmp_path / "whole")
    assert frame["bytes_sent"].to_list() == [(t + 1) * 3 * 2 * 386 for t in range(12)]
    difference = (frame["train_loss"] - whole["train_loss"]).abs()
    assert difference[0] == 0 and 0 < difference.max() < 1e-3


def test_delay(tmp_path: Path) -> None:
    """Every gradient takes 1 s, or 20 s: so does every difference of times; the option reaches the class."""
    settings = ("timeline=asynchronous", "timeline.delay={name: my_delay:Hiccups, options: {mean_s: 1.0, share: 0.3}}")
    times = crossed(tmp_path, *settings)["virtual_s"].to_list()
    assert times[0] in (1.0, 20.0) and times == sorted(times) and {t % 1 for t in times} == {0.0}
    assert len(set(times)) < 12  # workers that are ready at once make one update each


def test_staleness_rule(tmp_path: Path) -> None:
    """Three workers of equal speed: the first gradient is fresh, the second one update old, all later ones two."""
    base = ("timeline=asynchronous", "timeline.delay=constant")
    rule = ("staleness_rule=my_staleness_rule:DropLate", "staleness_rule.options={most: 1}")
    norms = crossed(tmp_path / "dropped", *base, *rule)["grad_norm"].to_list()
    plain = crossed(tmp_path / "plain", *base)["grad_norm"].to_list()
    assert norms[:2] == plain[:2] and set(norms[2:]) == {0.0} and min(plain) > 0


def test_policy(tmp_path: Path) -> None:
    """Rank 2 in the first epoch of four updates, 1 afterwards: bytes of the factors of the two weight matrices."""
    policy = "compressor={name: powersgd, policy: {name: my_policy:Halving, options: {first: 2}}}"
    frame = crossed(tmp_path, policy, "batch_size=320")
    sent = frame["bytes_sent"].diff().to_list()[1:]
    rank = {r: 3 * 4 * (r * (8 + 36) + (r * (10 + 8)) + 8 + 10) for r in (1, 2)}
    assert frame["epoch"].to_list() == [t // 4 for t in range(12)]
    assert sent == [rank[2]] * 3 + [rank[1]] * 8


def test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = dl.run("my_study:STUDY", "steps=4", "model=mlp", out=tmp_path / "run", launcher="local")
    assert len(results.runs) == 6 and results.frame.height == 24 and set(results.frame["batch_size"]) == {16, 64}
    assert "batch size 16: " in capsys.readouterr().out and (tmp_path / "run" / "report" / "index.html").exists()
    dl.run("my_study:STUDY", "steps=4", "model=mlp", "batch_size=8", out=tmp_path / "one", launcher="local")
    assert "batch size 8: " in capsys.readouterr().out  # what does not vary is no column of the frame, a label is


def test_a_study_without_training_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import my_study

    monkeypatch.setattr(my_study, "stages", lambda cell: [])
    with pytest.raises(StudyError, match="no stage of kind 'train'"):
        dl.run("my_study:STUDY", "steps=4", "model=mlp", out=tmp_path / "run", launcher="local")


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


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("optimizer=nowhere:X", "optimizer = 'nowhere:X': expected an importable module"),
        ("optimizer=my_optimizer:X", "optimizer = 'my_optimizer:X': expected a name defined in module"),
        ("optimizer=my_fault:StuckColumn", "expected a subclass of torch.optim.Optimizer"),
        ("schedule=nowhere:X", "schedule = 'nowhere:X': expected an importable module"),
        ("fault=nowhere:X", "fault = 'nowhere:X': expected an importable module"),
        ("model=nowhere:X", "model = 'nowhere:X': expected an importable module"),
        ("fault={name: my_fault:StuckColumn, options: {x: 1}}", "expected arguments of my_fault:StuckColumn"),
    ],
)
def test_a_class_that_is_none_is_named_before_anything_runs(setting: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        dl.run("recovery", "size=quick", "cases=1", setting, out=tmp_path / "run", launcher="local")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (("compressor=nowhere:X",), "an importable module"),
        (("compressor=my_delay:Hiccups",), "a class with start and exchange and resize"),
        (
            ("compressor={name: my_compressor:HalfPrecision, options: {bits: 8}}",),
            "arguments of my_compressor:HalfPrec",
        ),
        (("compressor={name: powersgd, policy: my_delay:Hiccups}",), "a class with rank"),
        (("staleness_rule=my_policy:Halving",), "a class with adjust"),
        (("timeline=my_policy:Halving",), "a class with ticks"),
        (("timeline={name: asynchronous, delay: my_policy:Halving}",), "a class with seconds"),
    ],
)
def test_a_condition_that_is_none_is_named_before_anything_runs(
    settings: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=text):
        crossed(tmp_path, *settings)
    assert not (tmp_path / "run").exists()
