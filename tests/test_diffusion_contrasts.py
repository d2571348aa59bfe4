"""Contrasts between clouds: which pairs a grid gives, what their replicates are, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_diffusion_study import SMALL, study

from descentlab.config.resolve import resolve
from descentlab.studies.diffusion import contrasts
from descentlab.studies.diffusion.clouds import Cloud
from descentlab.studies.diffusion.contrasts import GD, Measured, answers, planned
from descentlab.studies.diffusion.questions import QUESTIONS
from descentlab.studies.diffusion.spec import DiffusionSpec

RNG = np.random.default_rng(3)


def one(cell: DiffusionSpec, **values: float) -> Measured:
    return Measured(Cloud("x", cell.model_dump(mode="json"), None, None, [], None, []), values)


def cells(*words: str) -> list[DiffusionSpec]:
    return list(resolve("diffusion", ["size=quick", "runs=4", *words]).cells)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (
            ["sampler=replacement,shuffle", "optimizer.lr=0.01,0.05"],
            [
                "sampler shuffle - replacement (optimizer lr=0.01)",
                "optimizer lr=0.05 - lr=0.01 (sampler replacement)",
                "optimizer lr=0.05 - lr=0.01 (sampler shuffle)",
                "sampler shuffle - replacement (optimizer lr=0.05)",
            ],
        ),
        (["sampler=shuffle", "optimizer.lr=0.05", "dtype=float64,float32"], ["dtype float32 - float64"]),
        (
            ["sampler=shuffle", "optimizer.lr=0.05", "batch_size=64,32,128"],
            ["batch_size 32 - 64", "batch_size 128 - 64"],
        ),
    ],
)
def test_every_pair_that_differs_in_one_setting_is_planned_once(words: list[str], names: list[str]) -> None:
    """Breaks when a pair that differs in two settings is compared, or two levels that are not the first."""
    made = [one(cell, spread=1.0) for cell in cells(*words)]
    assert sorted(p.name for p in planned(made)) == sorted(names)


def test_settings_that_vary_together_are_one_contrast() -> None:
    found = list(resolve("diffusion", ["preset=question-language", "runs=4"]).cells)
    plans = list(planned([one(cell, sharpness=1.0) for cell in found]))
    assert [p.name for p in plans] == ["dataset tinyshakespeare - mnist5k, model nanogpt - mlp"]
    assert len(plans[0].first) == len(plans[0].second) == 5


def test_what_belongs_to_theta_is_not_compared_between_clouds_around_one_point() -> None:
    made = [one(cell, sharpness=1.0, spread=2.0) for cell in cells("sampler=replacement,shuffle")]
    assert [p.quantity for p in planned(made)] == ["spread"]


def test_seeds_are_the_replicates_where_there_are_several() -> None:
    """An effect of 1.0 under noise of 0.2 beside what both sides of a seed share, and none. Breaks when pairs are mixed
    up, or when a group of runs counts where seeds do."""
    made = []
    for cell in cells("seed=0,1,2,3,4,5", "dtype=float64,float32", "sampler=shuffle"):
        shared = 10.0 * cell.seed
        effect = 1.0 * (cell.dtype == "float32")
        noise = RNG.normal(size=2) * 0.2
        found = one(cell, **{"spread": shared + effect + noise[0], "test loss rise": shared + noise[1]})
        found.groups["spread"] = np.zeros(20)
        made.append(found)
    up, none = answers(made)
    assert up.unit == none.unit == "seed" and up.result is not None and none.result is not None
    assert up.result.verdict == "higher" and up.result.estimate.n == 6
    assert up.result.estimate.value == pytest.approx(1.0, abs=0.4)
    assert none.result.verdict == "within noise" and none.result.p_holm is not None
    table = contrasts.table([up, none])
    assert table is not None and [row[2] for row in table.rows] == ["higher", "within noise"]
    (line,) = contrasts.verdicts([up, none])
    assert line.text == "dtype float32 - float64: higher: spread; within noise: test loss rise"


def test_one_seed_leaves_groups_of_runs_and_says_what_is_not_tested() -> None:
    """The variance of 400 Gaussian runs, twice that in the other cloud, against the known error sqrt(2 / n) of each."""
    made = []
    for cell, scale in zip(cells("dtype=float64,float32", "sampler=shuffle"), (1.0, 2.0), strict=True):
        found, runs = one(cell), RNG.normal(size=400) * scale**0.5
        without = contrasts._without_groups(runs, lambda v: float(np.log(v.var(ddof=1))))
        found.add("spread", float(np.log(runs.var(ddof=1))), without)
        found.add("sharpness", scale)
        made.append(found)
    spread, sharp = answers(made)
    assert spread.unit == "group of runs" and spread.result is not None and spread.result.estimate.n == 20
    low, high = spread.result.estimate.low, spread.result.estimate.high
    assert low is not None and high is not None and low < np.log(2.0) < high and spread.result.verdict == "higher"
    assert (high - low) / 3.92 == pytest.approx((2 * 2 / 400) ** 0.5, rel=0.5)
    assert sharp.result is None and sharp.value == 1.0
    table = contrasts.table([spread, sharp])
    assert table is not None and table.rows[1][2] == "not tested: one theta*"


def test_clouds_that_differ_elsewhere_are_clouds_of_their_own() -> None:
    """Breaks when one of two lengths takes the other's place, or is paired with itself."""
    made = [one(c, spread=float(c.cloud.steps), sharpness=1.0) for c in cells("cloud.steps=40,60", "sampler=shuffle")]
    (plan,) = planned(made)
    assert plan.name == "cloud steps=60 - steps=40" and plan.differences()[0].tolist() == [20.0]


def test_no_two_contrasts_share_a_name() -> None:
    """Breaks when what tells two clouds apart (here how theta* was found) is missing from their names."""
    words = ("reference.gd.lr=0.05,0.1", "sampler=replacement,shuffle")
    found = answers([one(cell, spread=1.0, **{GD: float(i)}) for i, cell in enumerate(cells(*words))])
    assert len({(a.plan.name, a.plan.quantity) for a in found}) == len(contrasts.items(found)) == len(found) == 8
    wanted = "SGD - gradient descent (sampler shuffle, reference gd.lr=0.1)"
    assert [a.value for a in found if a.plan.name == wanted] == [3.0]


def test_runs_without_a_finite_test_loss_are_counted_and_leave_the_groups_as_they_are(tmp_path: Path) -> None:
    """Two equal clouds, one of which lost run 0: all other groups hold the same runs, so their differences are equal.
    Breaks when groups are cut among the survivors, or when the loss of runs goes without a word."""
    loss, (first, second) = RNG.normal(size=400), cells("dtype=float64,float32", "sampler=shuffle")
    made = []
    for cell, values in ((first, loss), (second, np.where(np.arange(400) == 0, np.nan, loss))):
        stages = contrasts.Stages(tmp_path, [], {"own": {"loss": values, "start_loss": np.zeros(1)}})
        block = {"key": "own", "stage": "val_loss", "runs": [], "needs": {}}
        cloud = Cloud("x", cell.model_dump(mode="json"), None, block, [block], None, [])
        made.append(contrasts.measure(None, stages, cloud))  # type: ignore[arg-type]
    without = [contrasts._without_groups(m, np.mean) for m in (loss, np.where(np.arange(400) == 0, np.nan, loss))]
    assert without[0][0] == without[1][0]  # the group of the lost run is out on both sides
    expected = [(loss.sum() - loss[0] - loss[20 * g : 20 * g + 20].sum()) / 379 for g in range(1, 20)]
    assert np.allclose(without[1][1:], expected)
    found = next(a for a in answers(made) if a.plan.quantity == "test loss rise")
    table = contrasts.table([found])
    assert table is not None and table.rows[0][5] == 1 and table.columns[5].name == "left out"
    (item,) = contrasts.items([found]).values()
    assert item.method.endswith("; 1 runs that are not finite left out")


def test_runs_against_gradient_descent() -> None:
    made = [one(cell) for cell in cells("seed=0,1,2", "sampler=shuffle")]
    for found, apart in zip(made, (0.1, 0.2, 0.3), strict=True):
        found.add(GD, apart)
    (answer,) = answers(made)
    assert answer.plan.name == "SGD - gradient descent" and answer.value == pytest.approx(0.2)
    assert answer.unit == "seed" and answer.result is not None and answer.result.estimate.n == 3


TINY = [word for word in SMALL if not word.startswith(("size=", "sampler=", "optimizer.lr="))]


@pytest.mark.parametrize("name", sorted(QUESTIONS))
def test_every_question_s_preset_plans_its_contrast(name: str) -> None:
    found = list(resolve("diffusion", [f"preset={name}", "runs=4"]).cells)
    plans = {p.name for p in planned([one(cell, spread=1.0, **{GD: 0.0}) for cell in found])}
    expected: dict[str, Any] = {
        "question-loader": ["sampler shuffle - replacement"],
        "question-precision": ["dtype float32 - float64"],
        "question-data": ["dataset mnist_similar - mnist5k"],
        "question-model": ["model flexible_cnn - mlp"],
        "question-batch": ["batch_size 32 - 64", "batch_size 128 - 64"],
        "question-language": ["dataset tinyshakespeare - mnist5k, model nanogpt - mlp"],
        "question-text-size": ["model width=4 - width=8", "model width=16 - width=8"],
    }
    assert {p for p in plans if not p.startswith("SGD")} == set(expected[name])
    assert any(p.startswith("SGD - gradient descent") for p in plans)


def test_a_question_is_answered_end_to_end(tmp_path: Path) -> None:
    """Float32 against float64 over three seeds at a tiny size: an answer with interval, Holm p and verdict. The spread
    of one and the same cloud in both precisions is the same within noise."""
    words = [w for w in TINY if not w.startswith(("runs=", "optimizer.", "hessians."))]
    given = ["preset=question-precision", "seed=0,1,2", "runs=20", "hessians.steps=1", "cloud.projections=3"]
    out = tmp_path / "out"
    study(out, *words, *given)
    summary = json.loads((out / "report" / "summary.json").read_text())
    found = summary["diffusion/contrast/dtype float32 - float64/spread"]
    assert found["n"] == 3 and abs(found["value"]) < 0.05 and found["low"] < found["high"]
    assert found["method"].startswith("replicate: seed") and "verdict: within noise" in found["method"]
    assert summary["diffusion/contrast/dtype float32 - float64/sharpness"]["n"] == 3
    assert any(k.startswith("diffusion/contrast/SGD - gradient descent") for k in summary)
