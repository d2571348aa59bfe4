"""Reports as data and as files: order, strictness, escaping, and planted effects that must be found."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from synthetic import crossed_results, recovery_results

from descentlab.config.resolve import resolve
from descentlab.core.errors import StudyError
from descentlab.launch import api
from descentlab.report import Column, Paragraph, Report, Section, SummaryItem, TableBlock, Verdict
from descentlab.report.figures import DOUBLE, SINGLE, Dot, interval_plot, signed
from descentlab.report.markdown import markdown
from descentlab.report.model import cell_text
from descentlab.report.render import image_bytes, render
from descentlab.report.summary import summary_json
from descentlab.studies.crossed import report as crossed
from descentlab.studies.crossed.factors import factorial, interactions
from descentlab.studies.recovery import report as recovery
from descentlab.studies.recovery.figures import mean_band, median_band, smoothed


@pytest.fixture(scope="module")
def made() -> Report:
    return recovery.build(recovery_results())


@pytest.fixture(scope="module")
def written(made: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two sections on disk; the browser's tests write all."""
    return render(replace(made, sections=made.sections[:2]), tmp_path_factory.mktemp("run")).parent


def small(**more: object) -> Report:
    table = TableBlock([Column("a"), Column("b", ".2f")], [["<script>alert(1)</script>", 0.5], ["x|y", None]])
    parts = {
        "title": "T", "question": "Q?", "verdicts": [Verdict("V", "d")], 
        "sections": [Section("S", [Paragraph("p"), table])],
        "summary": {"k": SummaryItem(math.nan, 3, -math.inf, 1.0, "m")}, "failures": TableBlock([Column("run")], []),
        "provenance": {"packages": {"numpy": "2"}}, "command": "descentlab run x", "runs": 8,
    }  # fmt: skip
    return Report(**{**parts, **more})  # type: ignore[arg-type]


def test_summary_is_strict_json() -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    read = json.loads(summary_json(small().summary), parse_constant=refuse)
    assert read == {"k": {"value": None, "n": 3, "low": None, "high": 1.0, "method": "m"}}


def test_cells_as_text() -> None:
    item = SummaryItem(0.5, 3, 0.25, 0.75, "t")
    assert cell_text(item, Column("c", ".2f")) == "0.50 [0.25, 0.75]"
    assert cell_text(math.nan, Column("c", ".2f")) == "NaN" and cell_text(None, Column("c")) == "\u2013"
    assert cell_text(True, Column("c")) == "yes"
    with pytest.raises(ValueError, match="expected 1 cells"):
        TableBlock([Column("a")], [[1, 2]])


def test_signs_in_figures() -> None:
    assert (signed(-0.04, "+.1f"), signed(-1.26, "+.1f"), signed(2.0, "+.1f")) == ("0.0", "\u22121.3", "+2.0")


def test_text_is_escaped_in_both_forms(tmp_path: Path) -> None:
    page = render(small(), tmp_path).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "x\\|y" in markdown(small())


def test_failures_are_told_first() -> None:
    assert small().failure_line() == "No run failed (0 of 8 runs)."
    failed = small(failures=TableBlock([Column("run")], [["r1"]]))
    assert failed.failure_line() == "1 of 8 runs failed."


def test_files_of_a_report(written: Path) -> None:
    names = ("excess_test_loss", "outcomes")
    expected = {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert {p.name for p in (written / "figures").iterdir()} == expected
    page = (written / "index.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)  # nothing is fetched from anywhere
    heads = ("What failed", "Planned contrasts", "Verdicts", "Results per optimizer")
    for text, form in ((page, "{}</h2>"), ((written / "report.md").read_text(), "## {}\n")):
        places = [text.index(form.format(head)) for head in heads]
        assert places == sorted(places)
        assert "x" * 300 not in text  # the uncommitted diff is not dumped on the reader
    json.loads((written / "summary.json").read_text())


def test_writing_again_removes_stale_figures_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "report" / "figures"
    folder.mkdir(parents=True)
    (folder / "old.png").write_bytes(b"")
    (folder / "mine.txt").write_text("kept")
    render(small(), tmp_path)
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (render(crossed.build(crossed_results(replicates=3)), tmp_path / name).parent for name in "ab")
    for name in ("index.html", "report.md", "summary.json", "figures/crossed.pdf"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_recovery_summary_names_and_failures(made: Report) -> None:
    keys = made.summary
    assert (
        keys["recovery/sgd/failure_rate"].value == pytest.approx(0.1) and keys["recovery/adam/failure_rate"].value == 0
    )
    assert {f"recovery/{o}/excess_test_loss" for o in ("sgd", "adam", "rmsprop", "adamw")} <= set(keys)
    assert all(keys[f"recovery/{o}/excess_test_loss"].n == 10 for o in ("sgd", "adam"))  # not nine survivors
    assert keys["recovery/sgd/final_test_accuracy"].high <= 1.0  # type: ignore[operator]
    assert "Pratt" in keys["recovery/sgd-vs-adam/excess_test_loss"].method  # case 2 is masked everywhere
    assert made.failure_line().startswith("1 of 80 runs failed")
    assert (
        made.failures.rows[0][:3] == ["sgd", 4, "fault"] and made.failures.rows[0][8] == 3
    )  # three steps after the hit


def test_a_failure_is_never_rewarded() -> None:
    """The published system let a run of NaN weights win; here each further failure makes its optimizer worse."""
    means = []
    for failures in (0, 1, 4):
        built = recovery.answer(recovery_results(diverge=tuple(("rmsprop", case) for case in range(failures))))
        means.append(built.summary["recovery/rmsprop/excess_test_loss"].value)
        wins = built.summary["recovery/rmsprop-vs-adamw/win_rate"]
        assert wins.value == pytest.approx((9 - sum(c != 2 for c in range(failures)) + (failures < 3) / 2) / 10)
    assert means == sorted(means) and means[0] < means[1]


def test_a_planted_difference_is_found_and_equal_optimizers_are_within_noise(made: Report) -> None:
    texts = [verdict.text for verdict in made.verdicts]
    assert any(t.startswith("adam against rmsprop: rmsprop ends with") for t in texts)
    assert any(t.startswith("sgd against adam: within noise") for t in texts)  # one failure outweighs eight small wins


def test_small_and_unfinished_studies_report_what_they_can() -> None:
    one = recovery.build(recovery_results(cases=1, recovery_steps=20, diverge=(), masked=()))
    assert one.summary["recovery/adam/excess_test_loss"].low is None
    assert any("not tested" in verdict.text for verdict in one.verdicts)
    unfinished = recovery_results(cases=3, diverge=(), masked=())
    unfinished.status = [s for s in unfinished.status if not s["run"].startswith("adam-0")]
    assert "2 of 24 runs have not ended" in recovery.build(unfinished).notes[0]
    unfinished.status = []
    with pytest.raises(StudyError, match="nothing to report yet"):
        recovery.build(unfinished)


def test_from_twenty_cases_the_bootstrap_is_used_and_named() -> None:
    built = recovery.answer(recovery_results(cases=20, recovery_steps=20, diverge=(), masked=()))
    assert "BCa" in built.summary["recovery/adam/excess_test_loss"].method
    assert "sign-flip" in built.summary["recovery/sgd-vs-adam/excess_test_loss"].method


def test_a_model_without_batchnorm_and_other_hits_are_told() -> None:
    results = recovery_results(cases=3, recovery_steps=20, diverge=(), masked=())
    results.frame = results.frame.with_columns(bn_var_max=None)
    results.hits[0] = {**results.hits[0], "index": [99]}
    built = recovery.build(results)
    cases = next(s for s in built.sections if s.heading == "Cases").blocks[0]
    assert isinstance(cases, TableBlock)
    assert [row[8] for row in cases.rows] == [
        "4 of 4, DIFFERENT elements",
        "4 of 4, same elements",
        "4 of 4, same elements",
    ]


def test_crossed_finds_the_planted_interaction_and_no_other() -> None:
    built = crossed.build(crossed_results(diverge=False, interaction=0.3))
    found = built.summary["crossed/adam/fault-x-staleness"]
    assert (
        found.low is not None and found.high is not None and found.low < 0.33 < found.high
    )  # 0.3 nats of training loss x 1.1
    texts = [verdict.text for verdict in built.verdicts]
    assert sum("more than the sum" in t for t in texts) == 1 and sum("within noise" in t for t in texts) == 5
    assert built.summary["crossed/sgd+none+barrier+none/accuracy"].n == 10
    assert "crossed/sgd+N16_RD+staleness=2+powersgd/excess_test_loss" in built.summary


def test_crossed_names_a_factor_that_all_cells_share() -> None:
    """It is no column of the frame; taking the base level's name for it would say ``barrier`` of stale gradients."""
    results = crossed_results(replicates=3, diverge=False)
    stale = results.frame.filter(pl.col("timeline") == "constant", pl.col("compressor") == "none")
    results.frame = stale.drop("timeline", "timeline.staleness", "compressor", "compressor.rank")
    results.runs = [run for run in results.runs if run["cell"] in set(results.frame["cell"])]
    results.spec |= {"timeline": {"name": "constant", "staleness": 2}, "compressor": {"name": "none"}}
    assert {key[1:] for key in factorial(results, 10).keys} == {(f, "staleness=2", "none") for f in ("none", "N16_RD")}


def test_the_report_waits_for_the_imports_made_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that import parts of matplotlib at once can see it half made; a report used to fail now and then."""
    order = []
    monkeypatch.setattr(api, "_warm_up", lambda resolved: (time.sleep(2), order.append("imported")))
    monkeypatch.setattr(api, "report", lambda path: order.append("report"))
    settings = ["model=mlp", "steps=1", "replicates=1", "observe.evaluate_every=0"]
    assert api.run(resolve("training", settings), tmp_path / "run", launcher="local") == 0
    assert order == ["imported", "report"]


def test_crossed_interaction_by_hand() -> None:
    results = crossed_results(replicates=4, diverge=False)
    data = factorial(results, 10)
    found = next(i for i in interactions(data) if i.condition == "sgd" and i.name == "fault-x-staleness")
    last = results.frame.filter(results.frame["step"] == 59)
    loss = {(r["replicate"], r["fault"] != "none", r["timeline"] != "barrier", r["compressor"]): r["test_loss"]
            for r in last.to_dicts() if r["optimizer"] == "sgd"}  # fmt: skip
    expected = [
        np.mean([loss[r, True, True, c] - loss[r, False, True, c] - loss[r, True, False, c] + loss[r, False, False, c]
                 for c in ("none", "powersgd")])
        for r in range(4)
    ]  # fmt: skip
    assert found.loss == pytest.approx(expected)


def test_crossed_without_two_conditions_says_so() -> None:
    """Silence where a verdict is expected would read as a finding."""
    results = crossed_results(replicates=2, diverge=False)
    one = pl.col("fault").eq("none") & pl.col("timeline").eq("barrier") & pl.col("compressor").eq("none")
    results.frame = results.frame.filter(one)
    kept = set(results.frame["run"])
    results.runs = [run for run in results.runs if run["id"] in kept]
    results.status = [entry for entry in results.status if entry["run"] in kept]
    assert [v.text for v in crossed.build(results).verdicts] == ["no interaction to test: no condition was varied"]


def test_crossed_keeps_failed_runs_and_leaves_out_unfinished_ones() -> None:
    results = crossed_results(replicates=3, diverge=True)
    results.status = [s for s in results.status if s["run"] != "c0-0"]
    built = crossed.build(results)
    assert built.failure_line().startswith("1 of 47 runs failed")
    assert (
        built.summary["crossed/sgd/fault-x-staleness"].n == 2 and built.summary["crossed/adam/fault-x-staleness"].n == 3
    )
    assert built.summary["crossed/sgd+N16_RD+staleness=2+none/failure_rate"].value == pytest.approx(1 / 3)


def test_figures_have_column_width_and_readable_text(made: Report) -> None:
    for block in made.figures():
        assert block.figure.get_size_inches()[0] in (SINGLE, DOUBLE)
        sizes = [
            t.get_fontsize()
            for ax in block.figure.axes
            for t in (*ax.texts, *ax.get_xticklabels(), ax.xaxis.label, ax.title)
        ]
        assert min(sizes) >= 7 and re.search(r"n = \d", block.caption) and block.alt


def test_an_interval_plot_is_a_png_and_a_pdf() -> None:
    figure = interval_plot([Dot("a", 1, 0, 2, "g"), Dot("b", 1e5, None, None, "h")], "x (nats)")
    assert image_bytes(figure, "png").startswith(b"\x89PNG") and image_bytes(figure, "pdf").startswith(b"%PDF")


def test_bands_over_cases() -> None:
    values = np.array([[1.0, 2, np.nan, 4], [3.0, 2, 5, np.nan], [5.0, 2, np.nan, np.nan]])
    centre, low, high = mean_band(values)
    assert centre[:2] == pytest.approx([3, 2]) and np.isnan(centre[2:]).all()  # one of three is less than half
    assert high[0] - low[0] == pytest.approx(2 * 4.3026527 * 2 / math.sqrt(3), rel=1e-6)
    assert median_band(np.array([[1.0], [2.0], [math.inf]]))[0] == pytest.approx([2.0])
    assert smoothed(np.array([0.0, 3, 0, np.nan]), 3)[:2] == pytest.approx([1.5, 1.0])
