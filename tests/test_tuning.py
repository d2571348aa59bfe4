"""Learning rates chosen before a comparison: what is tried, what is chosen, and that it is obeyed afterwards."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from descentlab.config.resolve import Resolved, resolve
from descentlab.core.errors import StudyError, UserError
from descentlab.launch import api, tuning
from descentlab.store import load

SMALL = ["size=quick", "dataset=digits", "model=mlp", "cases=1", "recovery_steps=4", "processes=1"]
SEARCH = ["tune=grid", "tune.steps=15", "tune.replicates=2", "tune.each_side=1", "tune.ratio=5"]
WORDS = [*SMALL, *SEARCH, "optimizer=adam,sgd"]


def go(path: Path, *words: str) -> int:
    return api.run(resolve("recovery", list(words)), path, launcher="local", with_report=True)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "run"
    assert go(path, *WORDS) == 0
    return path


def test_the_choice_is_the_smallest_mean_validation_loss(ran: Path) -> None:
    """Recomputed from the stored rows of the search. Fails when it goes by the test or training set, by one seed, or
    takes the largest loss."""
    search = load(tuning.search_path(ran))
    losses: dict[tuple[str, float], list[float]] = {}
    for row in search.frame.filter(search.frame["step"] == 14).iter_rows(named=True):
        losses.setdefault((row["optimizer"], row["optimizer.lr"]), []).append(row["validation_loss"])
    assert sorted(losses) == [
        ("adam", 0.002),
        ("adam", 0.01),
        ("adam", 0.05),
        ("sgd", 0.02),
        ("sgd", 0.1),
        ("sgd", 0.5),
    ]
    assert {len(found) for found in losses.values()} == {2}
    choice = json.loads((ran / "tune.json").read_text())
    for one in choice["chosen"]:
        name = one["optimizer"]["name"]
        means = {lr: mean(found) for (who, lr), found in losses.items() if who == name}
        assert one["lr"] == min(means, key=means.__getitem__) and math.isclose(
            one["validation_loss"], min(means.values())
        )
        assert one["at_the_edge"] == (one["lr"] in (min(means), max(means)))
    best = [one["validation_loss"] for one in choice["chosen"]]
    assert math.isclose(choice["spread"], max(best) - min(best)) and choice["equal"] == (choice["spread"] <= 0.05)
    assert choice == json.loads((tuning.search_path(ran) / "tune.json").read_text())


def test_the_comparison_is_a_study_with_these_rates(ran: Path) -> None:
    """The ids are those of the rates given by hand. Fails when the comparison runs at the rates it started from."""
    rates = {one["optimizer"]["name"]: one["lr"] for one in json.loads((ran / "tune.json").read_text())["chosen"]}
    assert rates != {"adam": 0.01, "sgd": 0.1}
    blocks = ",".join(
        f"{{name: {name}, lr: {lr}{', momentum: 0.9' if name == 'sgd' else ''}}}" for name, lr in rates.items()
    )
    by_hand = resolve("recovery", [*SMALL, f"optimizer={blocks}"])
    results = load(ran)
    assert {run["id"] for run in results.runs} == {run.id for run in by_hand.runs}
    used = results.frame.select("optimizer", "lr").unique().sort("optimizer").rows()
    assert used == sorted(rates.items())
    text = (ran / "report" / "report.md").read_text()
    assert "Learning rates of smallest validation loss after 15 fault-free updates" in text


def test_a_resume_obeys_the_stored_choice(ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The search is gone: what is stored beside the comparison counts. Fails when it searches again, or when the rates
    are forgotten where only study.yaml is read."""
    path = tmp_path / "run"
    shutil.copytree(ran, path)
    before = {run["id"] for run in load(path).runs}
    assert go(path, *WORDS) == 0 and not tuning.search_path(path).exists()
    assert api.rerun(path) == 0
    assert {run["id"] for run in load(path).runs} == before
    assert capsys.readouterr().err.count("nothing left to run") == 2


def test_another_request_searches_again(ran: Path) -> None:
    trained: list[Resolved] = []

    def interrupted(study: Resolved, path: Path) -> int:
        trained.append(study)
        return 130

    resolved = resolve("recovery", [w for w in WORDS if "steps=15" not in w] + ["tune.steps=16"])
    assert tuning.tuned(resolved, ran, interrupted) == (130, resolved, None)
    assert trained[0].study.name == "training" and len(trained[0].runs) == 12


def test_the_seeds_are_not_the_comparisons() -> None:
    search = tuning.search(resolve("recovery", [*WORDS, "seed=7"]))
    assert {cell.seed for cell in search.cells} == {1007}
    shared = ("dataset", "model", "schedule", "batch_size", "dtype")
    own: Any = resolve("recovery", [*WORDS, "seed=7"]).cells[0]
    assert all(getattr(cell, key) == getattr(own, key) for cell in search.cells for key in shared)


def test_to_be_tuned_is_no_part_of_an_id_and_of_no_default() -> None:
    assert [r.id for r in resolve("recovery", WORDS).runs] == [
        r.id for r in resolve("recovery", [*SMALL, "optimizer=adam,sgd"]).runs
    ]


def test_a_baseline_is_tuned_too() -> None:
    words = [*SMALL, *SEARCH, "protocol=baseline", "baseline=sgd", "optimizer=adam,sgd"]
    resolved = resolve("recovery", words)
    assert [block["name"] for block in tuning.blocks(resolved)] == ["adam", "sgd"]
    chosen = [{"optimizer": block, "lr": 0.25} for block in tuning.blocks(resolved)]
    cells = [cell.model_dump() for cell in tuning.with_choice(resolved, {"chosen": chosen}).cells]
    assert [(c["baseline"]["lr"], c["optimizer"]["lr"], c["tune"]["name"]) for c in cells] == [(0.25, 0.25, "none")] * 2
    assert [c["optimizer"]["name"] for c in cells] == ["adam", "sgd"] and cells[0]["baseline"]["momentum"] == 0.9


def test_other_axes_of_the_grid_stay() -> None:
    words = [*WORDS, "arm=none,skip", "optimizer.weight_decay=0,0.1"]
    resolved = resolve("recovery", words)
    blocks = tuning.blocks(resolved)
    assert len(blocks) == 4
    made = tuning.with_choice(resolved, {"chosen": [{"optimizer": b, "lr": 0.5 + i} for i, b in enumerate(blocks)]})
    assert len(made.cells) == len(resolved.cells) == 8
    assert {cell.arm.name for cell in made.cells} == {"none", "skip"}  # type: ignore[attr-defined]
    assert {cell.optimizer.lr for cell in made.cells} == {0.5, 1.5, 2.5, 3.5}  # type: ignore[attr-defined]


def test_a_diverged_rate_is_not_chosen(tmp_path: Path) -> None:
    """A rate with which every run ends in NaN. Fails when NaN compares as smallest."""
    words = [w for w in WORDS if not w.startswith(("tune.ratio", "optimizer"))]
    resolved = resolve("recovery", [*words, "optimizer=sgd", "tune.ratio=1e30"])
    path = tmp_path / "run"
    assert api.run(resolved, path, launcher="local", with_report=False) == 0
    (one,) = json.loads((path / "tune.json").read_text())["chosen"]
    assert one["lr"] == 0.1 and [loss is None for _, loss in one["tried"]] == [False, False, True]


def test_no_rate_at_all_is_an_error(tmp_path: Path) -> None:
    """Fails when a loss that is not a number counts as one."""
    words = [*SMALL, "tune=grid", "tune.steps=15", "tune.replicates=1", "tune.each_side=0"]
    resolved = resolve("recovery", [*words, "optimizer=sgd", "optimizer.lr=1e30"])
    with pytest.raises(StudyError, match="no learning rate tried for sgd gives a finite validation loss"):
        api.run(resolved, tmp_path / "run", launcher="local", with_report=False)


def test_a_dry_run_says_what_comes_first(tmp_path: Path) -> None:
    said = api.estimate(resolve("recovery", WORDS))
    assert said[-1] == "before them 12 runs of 15 updates choose the learning rates" and said[0].startswith("4 runs")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["tune=grid", "optimizer=adam", "optimizer.lr=0.1,0.2"],
            r"tune = 'grid': expected none beside .*optimizer.lr",
        ),
        (["tune=grid", "batch_size=16,32"], r"tune = 'grid': expected none beside a grid over batch_size"),
        (["tune=grid", "seed=1,2"], r"expected none beside a grid over seed"),
        (["tune.steps=4"], r"tune.steps = 4: expected"),
        (["tune=gird"], r"tune = 'gird': expected one of grid, none.* did you mean 'grid'\?"),
        (["tune=grid", "tune.ratio=1"], r"tune.ratio = 1"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(tmp_path: Path, words: Sequence[str], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        go(tmp_path / "run", *SMALL, *words)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_cluster_cannot_wait_for_the_choice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the comparison waits for the choice"):
        api.run(resolve("recovery", WORDS), tmp_path / "run", launcher="slurm")
