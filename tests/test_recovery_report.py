"""The recovery report over grids of faults, with runs that are all NaN, with crashed runs; every table it makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from synthetic import FakeResults, recovery_results

from descentlab.analysis.outcomes import IMMEDIATE, LABELS, NOT_APPLICABLE
from descentlab.analysis.paired import estimate
from descentlab.analysis.recovery import analyse_recovery, mean_of
from descentlab.report import Report, SummaryItem, TableBlock
from descentlab.report.markdown import markdown
from descentlab.report.model import sort_key
from descentlab.studies.recovery import breakdowns, explanation, tables
from descentlab.studies.recovery import report as recovery

FAULTS = ("N16_RD", "RD")


def grid(**more: Any) -> FakeResults:
    return recovery_results(**{"cases": 4, "optimizers": ("sgd", "adam"), "faults": FAULTS, "diverge": (), **more})


@pytest.fixture(scope="module")
def built() -> Report:
    return recovery.build(grid())


def test_a_grid_over_faults_is_joined_by_cell() -> None:
    """Each cell has its own plan for a case; joined by replicate, the second fault would carry the first's."""
    found = analyse_recovery(grid(), 10)
    assert found.order == ["sgd", "adam"] and found.faults == list(FAULTS)
    assert len(found.measures) == 16
    seen = {(fault, layer) for fault, layer in found.measures.select("fault", "layer").iter_rows()}
    assert seen == {("N16_RD", "conv1"), ("RD", "conv2")}
    rows = found.measures.sort("condition", "replicate")
    by_fault = {fault: rows.filter(pl.col("fault") == fault) for fault in FAULTS}
    assert (by_fault["RD"]["value"] / by_fault["N16_RD"]["value"]).to_list() == pytest.approx([10.0] * 8)


def test_a_grid_counts_a_replicate_once_however_many_faults_it_met(built: Report) -> None:
    found = analyse_recovery(grid(), 10)
    own = found.measures.filter(pl.col("condition") == "adam")
    by_hand = [own.filter(pl.col("replicate") == r)["excess_test_loss"].mean() for r in range(4)]
    assert mean_of(own, "excess_test_loss") == estimate(np.array(by_hand))
    assert built.summary["recovery/adam/excess_test_loss"].n == 4
    assert built.summary["recovery/sgd-vs-adam/excess_test_loss"].n == 4
    assert built.summary["recovery/sgd-vs-adam/win_rate"].n == 8  # cases, described
    masked = built.summary["recovery/adam/outcome/Masked"]
    assert masked.n == 8 and masked.method.startswith("95 % Wilson interval")
    assert "replicate" in masked.method


def test_outcome_rates_are_in_the_summary_and_add_up(built: Report) -> None:
    for optimizer in ("sgd", "adam"):
        values = [built.summary[f"recovery/{optimizer}/outcome/{label}"].value for label in LABELS]
        assert sum(v for v in values if v is not None) == pytest.approx(1.0)
    names = [section.heading for section in built.sections]
    assert [n for n in names if n.startswith("By ")] == [
        "By fault", "By layer", "By magnitude of the value", "By epoch", "By time of the hit",
    ]  # fmt: skip
    assert {"outcomes", "outcomes_by_fault"} <= {figure.name for figure in built.figures()}


def test_breakdown_numbers_by_hand() -> None:
    found = analyse_recovery(grid(diverge=(("sgd", 1),)), 10)
    table = breakdowns.breakdown(found, "fault")
    rows = {(row[0], row[1]): row for row in table.rows}
    assert list(rows) == [("N16_RD", "sgd"), ("N16_RD", "adam"), ("RD", "sgd"), ("RD", "adam")]
    part = found.measures.filter((pl.col("fault") == "N16_RD") & (pl.col("condition") == "sgd"))
    row = rows["N16_RD", "sgd"]
    assert row[2] == 4 and row[3].value == pytest.approx(part["excess_test_loss"].mean())
    assert row[5] == part["excess_test_loss"].max() and row[6].value == 25.0
    outcomes = breakdowns.outcome_breakdown(found, "fault")
    labels = [column.name.removesuffix(" (%)") for column in outcomes.columns[3:]]
    assert set(labels) == set(found.measures["outcome"].to_list())
    shown = {label: item.value for label, item in zip(labels, outcomes.rows[0][3:], strict=True)}
    counts = part["outcome"].to_list()
    assert shown == {label: 100 * counts.count(label) / 4 for label in labels}


def test_magnitudes_are_decades_of_what_was_planned_else_written() -> None:
    results = grid(cases=1)
    results.campaign[1]["rule"] = {"kind": "bit", "bit": 3}
    for hit in results.hits:
        hit["new"] = [-3.2e7, 5.0]
    found = analyse_recovery(results, 10)
    size = {row["fault"]: row["magnitude"] for row in found.measures.iter_rows(named=True)}
    assert size == {"N16_RD": math.floor(math.log10(results.campaign[0]["rule"]["value"])), "RD": 7}
    for hit in results.hits:
        hit["new"] = [None, 5.0]  # infinity, as JSON has it
    assert analyse_recovery(results, 10).measures.filter(pl.col("fault") == "RD")["magnitude"].to_list() == [None] * 2


# Every number of every table: "low" or "high" = what is good, "" = no score of an optimizer.
GOOD = {
    "difference (nats)": "", "Holm p": "", "detectable (nats)": "", "d_z": "", "p": "", "n": "", "case": "",
    "epoch": "", "difference in accuracy (points)": "", "replicates": "", "hit step": "", "value": "", "elements": "",
    "failed at step": "", "steps after the hit": "", "twin's": "", "twin's (%)": "", "pre-hit test loss (nats)": "",
    "loss before the hit": "", "excess test loss (nats)": "low", "median": "low", "failure rate (%)": "low",
    "excess test accuracy (points)": "high", "final test accuracy (%)": "high", "best": "low", "worst": "low",
    "loss at the hit": "low", "loss one step later": "low", "excess at the hit": "low", "peak excess": "low",
    "area (nat steps)": "low", "steps to recover": "low", "final test loss": "low", "excess test loss": "low",
    "excess test accuracy": "high", "mean excess test loss (nats)": "", "failed": "low", "slot / twin's": "low",
    "BatchNorm variance / twin's": "low", "update / twin's": "low", "variance / twin's": "low",
    "Masked (%)": "high", "Recovered (%)": "high", "TooShort (%)": "", "NotApplicable (%)": "",
    "ImmediateInfNan (%)": "low", "ShortTermInfNan (%)": "low", "LateInfNan (%)": "low", "LowTestAccuracy (%)": "",
    "SlowDegrade (%)": "", "SharpDegrade (%)": "", "SharpSlowDegrade (%)": "",
}  # fmt: skip


def all_tables(report: Report) -> list[TableBlock]:
    found = [block for section in report.sections for block in section.blocks if isinstance(block, TableBlock)]
    return [report.failures, *([report.contrasts] if report.contrasts else []), *found]


def number(value: Any) -> float | None:
    """A cell's number; None for a dash, which the page sorts last whichever way it sorts."""
    key = sort_key(value)
    return None if key is None or isinstance(key, str) else float(key)


def all_nan() -> FakeResults:
    """Every faulted run of sgd: weights, loss and accuracy become NaN at the hit; its last finite values were fine."""
    results = recovery_results(cases=4, optimizers=("sgd", "adam", "rmsprop"), diverge=(), masked=())
    after = (pl.col("optimizer") == "sgd") & (pl.col("role") == "fault") & (pl.col("step") >= pl.col("hit_step"))
    names = ("train_loss", "test_loss", "test_accuracy", "slot_max", "bn_var_max", "update_norm")
    results.frame = results.frame.with_columns(
        *(pl.when(after & pl.col(n).is_not_null()).then(math.nan).otherwise(pl.col(n)).alias(n) for n in names),
        pl.when(after).then(5000).otherwise(0).alias("nonfinite_params"),
    )
    return results


def test_an_optimizer_of_nan_weights_is_last_in_every_table() -> None:
    """The published system let it win. A new column fails here until it says what is good in it."""
    built = recovery.build(all_nan())
    compared = 0
    for table in all_tables(built):
        names = [column.name for column in table.columns]
        if "optimizer" not in names:
            continue
        who = [row[names.index("optimizer")] for row in table.rows]
        for place, name in enumerate(names):
            values = [number(row[place]) for row in table.rows]
            if all(v is None for v in values) or not any(w != "sgd" for w in who):
                continue
            good = GOOD[name]
            if not good:
                continue
            sign = 1.0 if good == "low" else -1.0
            bad = [sign * v for v, w in zip(values, who, strict=True) if w == "sgd" and v is not None]
            rest = [sign * v for v, w in zip(values, who, strict=True) if w != "sgd" and v is not None]
            assert not bad or not rest or min(bad) >= max(rest) or name == "best", (name, bad, rest)
            compared += 1
    assert compared >= 20
    head = tables.head_table(analyse_recovery(all_nan(), 10))
    sgd = head.rows[0]
    assert sgd[0] == "sgd" and all(cell.startswith("0/0/") for cell in sgd[2:])
    assert built.summary[f"recovery/sgd/outcome/{IMMEDIATE}"].value == 1.0
    assert built.summary["recovery/sgd/failure_rate"].value == 1.0
    assert built.failure_line().startswith("4 of 24 runs failed")


def test_a_crashed_run_is_named_first_and_is_no_outcome_of_the_fault() -> None:
    results = recovery_results(cases=3, optimizers=("sgd", "adam"), diverge=(), masked=())
    for line in results.status:
        if line["run"] == "adam-1-fault":
            line.update(status="failed", message="RuntimeError: disk full", steps=0)
    results.frame = results.frame.filter(pl.col("run") != "adam-1-fault")
    built = recovery.build(results)
    text = markdown(built)
    assert text.index("adam-1-fault") < text.index("## Verdicts") and "disk full" in text
    assert built.summary[f"recovery/adam/outcome/{NOT_APPLICABLE}"].value == pytest.approx(1 / 3)
    assert built.summary["recovery/adam/failure_rate"].value == pytest.approx(1 / 3)
    assert built.summary["recovery/adam/excess_test_loss"].n == 3


def test_the_explanation_names_state_ratio_and_decay() -> None:
    """The planted pollution: slots times 1e5 and more fading over 3 x memory steps, variance by 0.9 a step."""
    results = recovery_results(cases=3, optimizers=("sgd", "adam"), diverge=(), masked=())
    found = analyse_recovery(results, 10)
    row = found.measures.filter((pl.col("condition") == "adam") & (pl.col("replicate") == 0)).row(0, named=True)
    assert row["polluted"] == "optimizer slot + BatchNorm variance"
    frame = results.frame.filter((pl.col("replicate") == 0) & (pl.col("optimizer") == "adam"))
    at = [
        frame.filter((pl.col("role") == role) & (pl.col("step") == pl.col("hit_step")))["slot_max"][0]
        for role in ("fault", "twin")
    ]
    assert row["slot_ratio"] == pytest.approx(at[0] / at[1])
    assert row["slot_steps"] is None  # 120 steps of memory: not back within the 100 that were watched
    assert row["slot_predicted"] > 1000  # Adam's second moment
    assert row["bn_predicted"] == pytest.approx(math.log((row["bn_ratio"] - 1) / 0.1) / -math.log(0.9), abs=1)
    table = explanation.pollution_table(found)
    assert table.rows[0][0] == "sgd" and table.rows[1][6] == "> 100"


def test_the_comparison_of_a_grid_is_one_fault(built: Report, tmp_path: Path) -> None:
    captions = [figure.caption for figure in built.figures() if figure.name == "comparison_most_damaging"]
    assert len(captions) == 1 and "RD case" in captions[0]
    cells = built.sections[0].blocks[0]
    assert isinstance(cells, TableBlock) and all(isinstance(row[2], SummaryItem) for row in cells.rows)
