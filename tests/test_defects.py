"""Defects of the published program (docs/defects.md) that no other test keeps out; every row there names a test."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest
from commands import ROOT
from test_coverage import missing_test

import descentlab as dl
from descentlab import store
from descentlab.config.resolve import resolve
from descentlab.studies.recovery import figures
from descentlab.studies.recovery.report import answer

STEPS_PER_EPOCH = 5  # 1,280 training images of digits in batches of 256
SMALL = ["dataset=digits", "batch_size=256", "model.pool=1", "size=quick", "cases=1", "recovery_steps=4"]


def test_every_defect_has_its_test() -> None:
    rows = re.findall(r"^\| (S?\d+) \|.*\| `(tests/.+?)` \|$", (ROOT / "docs" / "defects.md").read_text(), re.MULTILINE)
    expected = [*(str(n) for n in range(1, 19)), *(f"S{n}" for n in range(1, 24))]
    assert [number for number, _ in rows] == expected
    assert [why for _, test in rows if (why := missing_test(test))] == []


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> store.Results:
    """One fault in the first convolution at step 7, in the second epoch."""
    fault = ["fault.layer=conv1", "fault.step=7", "fault.value_low=1e6"]
    out = tmp_path_factory.mktemp("defects") / "out"
    return dl.run("recovery", *SMALL, *fault, "optimizer=sgd,adam", out=out, launcher="local")


def test_every_optimizer_trains_the_same_network(tmp_path: Path) -> None:
    """The first batch's loss is the same to the bit, dropout masks included; afterwards the optimizers part."""
    model = ["model=mlp", "model.dropout=0.5", "model.hidden=[16]", "optimizer=sgd,adam,rmsprop,adamw"]
    settings = [s for s in SMALL if not s.startswith("model")]
    frame = dl.run(
        "recovery", *settings, *model, "model.pool=0", "fault.step=3", out=tmp_path / "o", launcher="local"
    ).frame
    twins = frame.filter(pl.col("role") == "twin")
    assert twins.filter(pl.col("step") == 0)["train_loss"].n_unique() == 1
    assert twins.filter(pl.col("step") == 2)["train_loss"].n_unique() == 4


def test_a_fault_in_the_first_layer_is_no_empty_one(study: store.Results) -> None:
    assert {hit["layer"] for hit in study.hits} == {"conv1"} and len(study.hits) == 2
    assert all(hit["old"] != hit["new"] for hit in study.hits)
    at_hit = study.frame.filter(pl.col("step") == 7).pivot(on="role", index="optimizer", values="train_loss")
    assert (at_hit["fault"] != at_hit["twin"]).all()


def test_the_faulty_step_has_its_row(study: store.Results) -> None:
    """Steps 0 to 11 without a gap, the faulty one among them; the weights it changed are seen one step later."""
    for _, rows in study.frame.group_by("run"):
        assert rows["step"].sort().to_list() == list(range(12))
    assert answer(study).recovery.measures["excess_at_hit"].is_not_null().all()


def test_the_line_is_at_the_step_of_the_fault(study: store.Results) -> None:
    """Comparison: at step 7, in the second epoch; zoom: at 0, and curves begin at most 10 steps before it."""
    recovery = answer(study).recovery
    dashed = [line for ax in figures.comparison(recovery, "N16_RD", 0).axes[:2] for line in ax.lines]
    assert [
        line.get_xdata()[0] for line in dashed if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2
    ] == [7, 7]
    for ax in figures.zoom(recovery).axes:
        curves = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) > 2]
        assert [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2] == [0]
        assert all((x[1:] > x[:-1]).all() and x[0] == -10 and x[-1] == 4 for x in curves)


def test_steps_stay_in_their_epoch_and_step_0_is_recorded(tmp_path: Path) -> None:
    from descentlab.launch.build import survey

    (cell,) = resolve("recovery", [*SMALL, "optimizer=sgd"]).cells
    site, model = survey(cell), cell.fault.build()  # type: ignore[attr-defined]
    assert site.steps_per_epoch == STEPS_PER_EPOCH
    plans = [
        model.plan(i, site.operations, site.streams, replicate=i, steps_per_epoch=STEPS_PER_EPOCH) for i in range(200)
    ]
    assert {plan.step for plan in plans} == set(range(STEPS_PER_EPOCH))  # size=quick: epoch 0 alone
    results = dl.run("recovery", *SMALL, "optimizer=sgd", "fault.step=0", out=tmp_path / "out", launcher="local")
    assert results.hits[0]["step"] == 0
    row = answer(results).recovery.measures.row(0, named=True)
    assert row["hit_step"] == 0 and row["excess_at_hit"] is not None and row["pre_hit_loss"] is None


def test_the_layers_of_a_sweep_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed can be pasted: a grid over it resolves, one point a layer; the first makes no grad_input."""
    from descentlab.cli import show

    show.layers(resolve("recovery", SMALL))
    line = capsys.readouterr().out.strip()
    assert line == "conv1,conv2,conv3,head"
    cells = resolve("recovery", [*SMALL, f"fault.layer={line}", "optimizer=sgd"]).cells
    assert [cell.fault.layer for cell in cells] == line.split(",")  # type: ignore[attr-defined]
    show.layers(resolve("recovery", [*SMALL, "fault=RD", "fault.direction=grad_input"]))
    assert capsys.readouterr().out.strip() == "conv2,conv3,head"


def test_a_rate_that_rises_is_said() -> None:
    rising = resolve("recovery", ["preset=published", "optimizer.lr=1e-5"]).notes
    assert "schedule.end = 0.0001 is above optimizer.lr = 1e-05: the learning rate rises" in rising
    assert not any("rises" in note for note in resolve("recovery", ["preset=published"]).notes)
