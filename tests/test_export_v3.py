"""The published file tree: every file and key, strict JSON, measures calculated by hand, failures never rewarded."""

from __future__ import annotations

import csv
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from synthetic import FakeResults, recovery_results

import descentlab as dl
from descentlab.cli.export import export as export_directory
from descentlab.core.errors import UserError
from descentlab.report.exports import strict, v3
from descentlab.report.exports.v3 import export
from descentlab.report.exports.v3_measures import coordinates, gather
from descentlab.report.exports.v3_summary import aggregate, win_rate

PUBLISHED = {
    "config": "experiment_id seed model stage fmodel target_epoch target_step target_layer injection_position "
    "injection_value learning_rate",
    "results": "experiment_id injection_config injection_results optimizer_results",
    "injection": "post_injection_accuracy post_injection_loss nan_weights inf_weights",
    "optimizer": "history pre_injection_accuracy post_injection_accuracy final_accuracy accuracy_change total_recovery "
    "degradation_rate diverged divergence_step",
    "summary": "completed_experiments optimizers_tested aggregate_metrics",
    "aggregate": "mean_final_accuracy std_final_accuracy mean_accuracy_change std_accuracy_change "
    "mean_degradation_rate positive_recovery_rate divergence_rate",
}
SECTIONS = ["## Configuration", "## Aggregate Results", "## Analysis", "### Best Optimizer", "### Head-to-Head"]
SECTIONS += ["## Breakdown", "### Early", "### Late", "## Conclusions"]


def keys(what: str) -> set[str]:
    return set(PUBLISHED[what].split())


def read(path: Path) -> Any:
    """Strict: a NaN or Infinity token is an error."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{path} holds {token}")

    return json.loads(path.read_text(), parse_constant=refuse)


def one_case(accuracy: list[float], loss: list[float], hit: int, status: dict[str, Any]) -> FakeResults:
    """Two optimizers, one case: ``sgd`` as given, ``adam`` like its twin (all 0.5); ten classes."""
    made = recovery_results(1, ("sgd", "adam"), recovery_steps=len(loss) - hit - 1, diverge=(), masked=(0,))
    made.campaign[0].update(step=hit, epoch=0, fault="N16_RD", cells=[0, 1])
    end, parts = len(loss), []
    for run in made.runs:
        own = run["id"] == "sgd-0-fault"
        part = made.frame.filter(run=run["id"]).head(end)
        columns = {"train_accuracy": accuracy if own else [0.5] * end, "train_loss": loss if own else [1.0] * end}
        tests = [None] * (end - 1) + [1.0]
        parts.append(
            part.with_columns(
                *(pl.Series(name, values) for name, values in columns.items()),
                pl.Series("test_loss", tests),
                pl.Series("test_accuracy", tests),
                pl.lit(0).alias("epoch"),
                pl.lit(hit).alias("hit_step"),
            )
        )
    made.frame = pl.concat(parts)
    for line in made.status:
        if line["run"] == "sgd-0-fault":
            line.update(status)
    return made


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of an export's time; ``tree`` draws."""
    monkeypatch.setattr(v3, "_figure", lambda figure, path: None)
    for name in ("comparison", "zoom", "overview"):
        monkeypatch.setattr(v3.v3_figures, name, lambda what: None)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run directory, export) of a small real run."""
    path = tmp_path_factory.mktemp("v3")
    settings = [
        "size=quick",
        "dataset=digits",
        "model.pool=1",
        "batch_size=32",
        "optimizer=sgd,adam",
        "cases=2",
        "fault.last_epoch=1",
    ]
    dl.run("recovery", *settings, out=path / "run", launcher="local")
    return path / "run", export_directory("v3", path / "run", None)


def test_every_published_file_is_there(tree: tuple[Path, Path]) -> None:
    run, out = tree
    assert out == run / "export" / "v3"
    top = {p.name for p in out.iterdir()}
    assert top >= {"all_injection_configs.json", "intermediate_summary.json", "final_report.md"}
    assert top >= {"summary_visualizations.png", "experiment_000", "experiment_001", "README.txt"}
    inside = {p.name for p in (out / "experiment_001").iterdir()}
    assert inside == {
        *("injection_config.json", "results.json", "injection_batch.npz", "comparison_plots.png", "recovery_zoom.png"),
        *("history_sgd.csv", "history_adam.csv"),
    }
    for figure in (out / "summary_visualizations.png", out / "experiment_000" / "comparison_plots.png"):
        width, height = struct.unpack(">II", figure.read_bytes()[16:24])
        assert (width, height) in ((2700, 1800), (2250, 1800))  # 18 x 12 and 15 x 12 inches at 150 dpi


def test_every_published_key_is_there(tree: tuple[Path, Path]) -> None:
    _, out = tree
    configs = read(out / "all_injection_configs.json")
    assert len(configs) == 2 and all(keys("config") <= set(c) and c["format_version"] == 1 for c in configs)
    results = read(out / "experiment_000" / "results.json")
    assert set(results) >= keys("results") and results["format_version"] == 1 and results["notes"]
    assert set(results["injection_results"]) == set(results["optimizer_results"]) == {"sgd", "adam"}
    assert set(results["injection_results"]["sgd"]) >= keys("injection")
    assert set(results["optimizer_results"]["sgd"]) >= keys("optimizer")
    assert set(results["optimizer_results"]["sgd"]["history"]) == {"steps", "accuracy", "loss"}
    summary = read(out / "intermediate_summary.json")
    assert set(summary) >= keys("summary") and summary["completed_experiments"] == 2
    assert all(set(row) >= keys("aggregate") for row in summary["aggregate_metrics"].values())
    text = (out / "final_report.md").read_text()
    places = [text.index(section) for section in SECTIONS]
    assert places == sorted(places)


def test_the_export_agrees_with_the_store(tree: tuple[Path, Path]) -> None:
    """Histories against the table, positions against hits.jsonl, the batch against the losses it gave."""
    run, out = tree
    table = pl.read_parquet(run / "table.parquet")
    configs = read(out / "all_injection_configs.json")
    for hit in map(json.loads, (run / "hits.jsonl").read_text().splitlines()):
        config = configs[hit["case"]]
        folder = out / f"experiment_{hit['case']:03d}"
        with (folder / f"history_{hit['optimizer']}.csv").open() as file:
            rows = list(csv.DictReader(file))
        stored = table.filter(run=hit["run"]).sort("step")
        assert [int(row["step"]) for row in rows] == stored["step"].to_list() == list(range(len(rows)))  # no gap
        assert [float(row["loss"]) for row in rows] == stored["train_loss"].to_list()
        assert [float(row["accuracy"]) for row in rows] == stored["train_accuracy"].to_list()
        assert config["injection_step"] == hit["step"] and config["target_layer"] == hit["layer"]
        assert config["injection_value"] == hit["new"][0] and config["learning_rate"] is None
        assert (
            config["target_epoch"] * 41 + config["target_step"] == hit["step"]
        )  # 1,337 training digits, batches of 32
        results = read(folder / "results.json")
        loss = stored.filter(step=hit["step"])["train_loss"].item()
        assert results["injection_results"][hit["optimizer"]]["post_injection_loss"] == loss
    with np.load(folder / "injection_batch.npz") as batch:
        assert batch["images"].shape == (32, 8, 8, 1) and batch["labels"].shape == (32,)


def test_coordinates_by_hand() -> None:
    """Activation [2, 3, 4, 5]: element (n=1, c=2, h=3, w=4) is the last; kernel OIHW [2, 3, 4, 5] in HWIO order."""
    assert coordinates([119], [2, 3, 4, 5], kernel=False) == [[1, 3, 4, 2]]
    assert coordinates([119], [2, 3, 4, 5], kernel=True) == [[3, 4, 2, 1]]
    assert coordinates([7], [2, 5], kernel=False) == [[1, 2]] and coordinates([7], [2, 5], kernel=True) == [[2, 1]]


def test_measures_by_hand() -> None:
    """Fault at step 2. The slope is over steps 3, 4, 5: (0.6 - 0.3) / 2; without the first of them it would be 0.2."""
    results = one_case([0.1, 0.4, 0.05, 0.3, 0.4, 0.6], [2.0, 1.5, 9.0, 1.6, 1.4, 1.2], 2, {"status": "done"})
    sgd = gather(results).experiments[0].outcomes["sgd"].result()
    assert (sgd["pre_injection_accuracy"], sgd["post_injection_accuracy"], sgd["final_accuracy"]) == (0.4, 0.05, 0.6)
    assert sgd["accuracy_change"] == pytest.approx(0.55) and sgd["total_recovery"] == pytest.approx(0.2)
    assert sgd["degradation_rate"] == pytest.approx(0.15)
    assert sgd["next_step_loss"] == 1.6 and not sgd["diverged"] and sgd["divergence_step"] is None


def test_a_fault_at_the_first_step_has_nothing_before_it() -> None:
    results = one_case([0.1, 0.4, 0.5], [2.0, 1.5, 1.0], 0, {"status": "done"})
    sgd = gather(results).experiments[0].outcomes["sgd"].result()
    assert sgd["pre_injection_accuracy"] is None and sgd["total_recovery"] is None
    assert sgd["accuracy_change"] == pytest.approx(0.4)


def test_divergence_is_never_rewarded(tmp_path: Path, no_figures: None) -> None:
    """A run that turns to NaN after an accurate faulty pass, and one after a hopeless one: neither gains anything.

    Without the charge the first would keep 0.9 as its final accuracy and the second would gain by ending at chance.
    """
    nan = math.nan
    status = {"status": "diverged", "diverged_step": 4, "message": "non-finite loss"}
    for post in (0.9, 0.0):
        results = one_case([0.2, 0.6, post, 0.9, nan, nan], [2.0, 1.0, 1.0, 0.5, nan, math.inf], 2, status)
        campaign = gather(results)
        sgd = campaign.experiments[0].outcomes["sgd"].result()
        assert sgd["diverged"] and sgd["divergence_step"] == 1 and sgd["final_accuracy"] == pytest.approx(0.1)
        assert sgd["accuracy_change"] == pytest.approx(0.1 - max(post, 0.6))
        assert sgd["total_recovery"] < 0 and sgd["degradation_rate"] < 0
        metrics = aggregate(campaign)["sgd"]
        assert metrics["positive_recovery_rate"] == 0 and metrics["divergence_rate"] == 1
        assert win_rate(campaign, "sgd", "adam") == 0 and win_rate(campaign, "adam", "sgd") == 1
    export(results, tmp_path)
    loss = read(tmp_path / "experiment_000" / "results.json")
    assert loss["optimizer_results"]["sgd"]["history"]["loss"][4:] == [None, None]
    assert loss["non_finite"]["optimizer_results.sgd.history.loss[4]"] == "nan"
    assert loss["non_finite"]["optimizer_results.sgd.history.loss[5]"] == "inf"
    assert "Least stable (highest divergence rate): sgd" in (tmp_path / "final_report.md").read_text()


def test_a_crashed_run_gets_its_error_file_and_the_others_stay(tmp_path: Path, no_figures: None) -> None:
    results = one_case([0.2] * 5, [1.0] * 5, 2, {"status": "failed", "message": "out of memory", "block": "b1"})
    results.path = tmp_path / "run"
    (results.path / "logs").mkdir(parents=True)
    (results.path / "logs" / "b1.log").write_text("Traceback: it broke\n")
    out = tmp_path / "out"
    out.mkdir()
    export(results, out)
    error = read(out / "error_exp_000.json")
    assert error["error"] == "out of memory" and error["traceback"] == "Traceback: it broke\n"
    assert error["failed_runs"][0]["optimizer"] == "sgd" and (out / "experiment_000" / "history_adam.csv").is_file()
    assert read(out / "intermediate_summary.json")["aggregate_metrics"]["sgd"]["divergence_rate"] == 1


def test_figures_of_a_failed_run(tmp_path: Path) -> None:
    """NaN curves, a slope that has no points and a zero spread must not break a figure."""
    nan, status = math.nan, {"status": "diverged", "diverged_step": 2, "message": ""}
    campaign = gather(one_case([0.2, 0.6, nan], [2.0, 1.0, nan], 2, status))
    for figure in (v3.v3_figures.comparison(campaign.experiments[0]), v3.v3_figures.overview(campaign)):
        figure.savefig(tmp_path / "f.png", dpi=30)
    rows = v3.v3_figures.aligned(campaign.outcomes("sgd"), 2, 3)
    assert rows[0].tolist() == pytest.approx([0.2, 0.6, 0.1, 0.1, 0.1, 0.1])


def test_ties_count_half_and_leaders_are_named_together() -> None:
    results = one_case([0.5] * 5, [1.0] * 5, 2, {"status": "done"})
    campaign = gather(results)
    assert win_rate(campaign, "sgd", "adam") == 0.5 == win_rate(campaign, "adam", "sgd")


def test_unfinished_experiments_are_counted_and_left_out() -> None:
    campaign = gather(one_case([0.5] * 5, [1.0] * 5, 2, {"status": "running"}))
    assert campaign.experiments == [] and campaign.unfinished == 1 and len(campaign.configs) == 1


def test_strict_json() -> None:
    document = strict.strict({"a": [1.0, math.nan], "b": {"c": -math.inf}, "n": np.float32(2)})
    assert document == {"a": [1.0, None], "b": {"c": None}, "n": 2.0, "non_finite": {"a[1]": "nan", "b.c": "-inf"}}
    assert strict.strict({"a": 1}) == {"a": 1}


def test_mistakes_are_one_line(tree: tuple[Path, Path], tmp_path: Path, no_figures: None) -> None:
    run, out = tree
    with pytest.raises(UserError, match=r"export = 'v2': expected one of .*v3.*did you mean 'v3'"):
        export_directory("v2", run, tmp_path / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="one that export has made"):
        export_directory("v3", run, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    (out / "stale.txt").touch()
    export_directory("v3", run, None)  # its own earlier export is replaced
    assert not (out / "stale.txt").exists()
    with pytest.raises(UserError, match="a directory of the recovery study"):
        gather(FakeResults())
