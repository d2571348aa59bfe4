"""The recovery study from its command line to its files: what hits.jsonl proves, what resume keeps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import polars as pl
import pytest

import descentlab as dl
from descentlab import store
from descentlab.config.resolve import resolve
from descentlab.core.errors import StudyError, UserError
from descentlab.launch import api

SMALL = ["size=quick", "dataset=digits", "model.pool=1", "batch_size=32"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> store.Results:
    return dl.run("recovery", *SMALL, "cases=4", out=tmp_path_factory.mktemp("recovery") / "out", launcher="local")


def test_every_optimizer_met_the_same_fault(results: store.Results) -> None:
    """Invariant 5, from the files alone."""
    met = defaultdict(list)
    for hit in results.hits:
        met[hit["case"]].append(hit)
    assert sorted(met) == [0, 1, 2, 3]
    for case, hits in met.items():
        planned = next(c for c in results.campaign if c["case"] == case)
        assert sorted(h["optimizer"] for h in hits) == ["adam", "adamw", "rmsprop", "sgd"]
        for hit in hits:
            assert all(hit[k] == planned[k] for k in ("step", "layer", "site", "rule", "index"))
            assert hit["new"] == [planned["rule"]["value"]] * 16 and hit["new"] != hit["old"]
    initial = {h["optimizer"]: h["old"] for h in met[min(met, key=lambda c: met[c][0]["step"])]}
    assert len(initial) == 4


def test_the_faults_follow_the_stated_laws() -> None:
    """2,000 cases: layers uniform over the four that can be hit, steps over epochs 0 to 3, values log-uniform."""
    from descentlab.launch.build import survey
    from descentlab.studies.recovery.spec import STUDY

    cell = resolve("recovery").cells[0]
    assert STUDY.spec is type(cell)
    site = survey(cell)
    model = cell.fault.build()  # type: ignore[attr-defined]
    cases = [
        model.plan(i, site.operations, site.streams, replicate=i, steps_per_epoch=site.steps_per_epoch)
        for i in range(2000)
    ]
    layers = pl.Series([c.site.layer for c in cases]).value_counts()["count"].to_list()
    assert len(layers) == 4 and sum((n - 500) ** 2 / 500 for n in layers) < 21  # chi-square 3 d.f., 1 in 8,000
    steps = [c.step for c in cases]
    assert min(steps) >= 0 and 230 < max(steps) < 240 and abs(sum(steps) / 2000 - 119.5) < 5 * 69.3 / math.sqrt(2000)
    logs = sorted(math.log10(c.rule["value"]) for c in cases)
    low, high = math.log10(3.6e2), 12.0
    largest = max(abs((v - low) / (high - low) - (i + 0.5) / 2000) for i, v in enumerate(logs))
    assert largest < 2.2 / math.sqrt(2000)  # Kolmogorov-Smirnov, 1 in 10,000
    assert all(len(set(c.index)) == 16 for c in cases)


def test_the_table(results: store.Results) -> None:
    frame = results.frame
    assert frame.select("run", "step", "attempt").is_unique().all()
    assert frame["run"].n_unique() == 4 * 4 * 2
    hit = frame.filter(pl.col("step") == pl.col("hit_step"))
    assert len(hit) == 32 and hit["test_loss"].null_count() == 0 and hit["train_loss"].null_count() == 0
    last = frame.group_by("run").agg(pl.col("step").max() - pl.col("hit_step").first())
    assert last["step"].unique().to_list() == [10]
    for name in [
        "train_accuracy",
        "grad_norm",
        "update_norm",
        "bn_var_max",
        "lr",
        "nonfinite_grads",
        "nonfinite_params",
    ]:
        assert frame[name].null_count() == 0, name
    assert frame.filter(pl.col("optimizer") == "adam")["slot_max"].null_count() == 0
    pairs = frame.filter(pl.col("step") < pl.col("hit_step")).group_by("optimizer", "case", "step")
    assert pairs.agg(pl.col("train_loss").n_unique()).get_column("train_loss").max() == 1


def test_again_is_nothing_to_do_and_more_cases_keep_what_is_there(
    results: store.Results, capsys: pytest.CaptureFixture
) -> None:
    before = results.frame
    resolved = resolve("recovery", [*SMALL, "cases=5"])
    assert api.run(resolved, results.path, launcher="local", with_report=False) == 0
    more = store.load(results.path)
    assert more.frame["run"].n_unique() == 40
    kept = more.frame.filter(pl.col("run").is_in(before["run"].unique()))
    assert store.equal_tables(kept.select(before.columns), before) == []
    assert api.run(resolved, results.path, launcher="local", with_report=False) == 0
    assert "nothing left to run" in capsys.readouterr().err
    fewer = resolve("recovery", [*SMALL, "cases=4"])
    assert api.run(fewer, results.path, launcher="local", with_report=False) == 0
    assert "8 runs of an earlier grid" in capsys.readouterr().err
    assert store.equal_tables(store.load(results.path).frame, before) == []


def test_same_seed_same_result_another_seed_another(results: store.Results, tmp_path: Path) -> None:
    """Invariant 2: run in worker processes this time; then with another seed."""
    arguments = [*SMALL, "cases=4", "optimizer=adam"]
    assert api.run(resolve("recovery", arguments), tmp_path / "a", launcher="pool", with_report=False) == 0
    again = store.load(tmp_path / "a").frame
    adam = results.frame.filter(pl.col("optimizer") == "adam").drop("cell")
    shared = [c for c in adam.columns if c in again.columns]
    assert "test_loss" in shared and store.equal_tables(again.select(shared), adam.select(shared)) == []
    other = resolve("recovery", [*arguments, "seed=1"])
    assert api.run(other, tmp_path / "b", launcher="local", with_report=False) == 0
    assert set(store.load(tmp_path / "b").frame["run"]).isdisjoint(again["run"])


def test_the_report_is_written(results: store.Results) -> None:
    report = results.path / "report"
    summary = json.loads((report / "summary.json").read_text())
    for optimizer in ("sgd", "adam", "rmsprop", "adamw"):
        for measure in ("excess_test_loss", "failure_rate"):
            item = summary[f"recovery/{optimizer}/{measure}"]
            assert item["n"] == 4 and item["low"] <= item["value"] <= item["high"] and item["method"]
    assert (report / "report.md").stat().st_size > 1000
    assert len(list((report / "figures").glob("*.png"))) >= 2


def test_the_published_preset_has_the_published_settings() -> None:
    cells = {c.optimizer.name: c for c in resolve("recovery", ["preset=published"]).cells}
    assert list(cells) == ["adam", "sgd", "rmsprop", "adamw"] or set(cells) == {"adam", "sgd", "rmsprop", "adamw"}
    assert all(c.optimizer.lr == 1e-3 for c in cells.values())  # type: ignore[attr-defined]
    assert cells["adam"].optimizer.eps == 1e-7 and cells["rmsprop"].optimizer.alpha == 0.9  # type: ignore[attr-defined]
    assert cells["adamw"].optimizer.weight_decay == 4e-3 and cells["sgd"].optimizer.momentum == 0.9  # type: ignore[attr-defined]
    for c in cells.values():
        assert (c.schedule.end, c.schedule.steps) == (1e-4, 5000)  # type: ignore[attr-defined]
        assert (c.fault.value_low, c.fault.value_high) == (3.6e2, 1.2e8)  # type: ignore[attr-defined]
        assert (c.cases, c.recovery_steps, c.fault.last_epoch) == (10, 100, 3)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fault.layer=conv9"], "fault.layer = 'conv9': expected one of conv1, conv2, conv3, head"),
        (["device=cuda:7"], "device = 'cuda:7': expected a device of this machine"),
        (["batch_size=5000"], "batch_size = 5000: expected at most the 3840 training samples"),
        (["dataset=quadratic"], "model = 'cnn': expected a model that fits dataset 'quadratic'"),
        (["model=matrix"], "model = 'matrix': expected a model that fits dataset 'mnist5k'"),
        (["fault=none"], "fault = 'none': expected a fault"),
    ],
)
def test_mistakes_that_need_the_model_are_one_line_too(arguments: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        api.run(resolve("recovery", ["size=quick", *arguments]), tmp_path / "out", launcher="local")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_fault_beyond_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fault"):
        api.run(resolve("crossed", ["size=quick", "fault.step=60"]), tmp_path / "out", launcher="local")


def test_a_truncated_part_file_is_one_clear_line(results: store.Results, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(results.path, copy)
    part = next(copy.glob("blocks/*/metrics/part-*.arrow"))
    part.write_bytes(part.read_bytes()[:-50])
    (copy / "table.parquet").unlink()
    with pytest.raises(StudyError, match=part.name):
        store.load(copy)
    command = [sys.executable, "-m", "descentlab.cli", "table", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_crashed_block_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A worker that is killed by its own optimizer: the other optimizer's runs are done, the exit code says so."""
    arguments = [*SMALL, "cases=2", "optimizer=adam,crash:Suicidal", "processes=2"]
    (tmp_path / "crash.py").write_text(
        "import os, torch\n"
        "class Suicidal(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        size = sum(p.numel() for g in self.param_groups for p in g['params'])\n"
        "        if size > 3000: os.kill(os.getpid(), 9)  # the study's models, not the check before them\n"
        "        return super().step(closure)\n"
    )
    sys.path.append(str(tmp_path))
    try:
        assert api.run(resolve("recovery", arguments), tmp_path / "out", with_report=False) == 1
    finally:
        sys.path.remove(str(tmp_path))
    assert "ended by signal 9" in capsys.readouterr().err
    assert store.status(tmp_path / "out").counts() == {"done": 4, "failed": 4}


def test_a_reader_that_stops_early_is_no_error(results: store.Results) -> None:
    command = f"{sys.executable} -m descentlab.cli table {results.path} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("run,") and done.stderr == ""
