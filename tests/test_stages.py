"""Stages: a key changes when something it depends on does, and only then; defaults do not move unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from descentlab.config.resolve import resolve
from descentlab.core.stage import Stage, stage_keys
from descentlab.launch.plan import program_of

GOLDEN = Path(__file__).parent / "golden" / "defaults.json"


def keys(*settings: str) -> dict[str, str]:
    resolved = resolve("recovery", ["optimizer=adam", *settings])
    return stage_keys(program_of(resolved.study).stages(resolved.cells[0]))


def changed(*settings: str) -> set[str]:
    before, after = keys(), keys(*settings)
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("setting", "stages"),
    [
        ("recovery_steps=50", {"recovery", "comparison"}),
        ("optimizer.lr=0.5", {"prefix", "recovery", "comparison"}),
        ("fault.value_high=1e9", {"campaign", "prefix", "recovery", "comparison"}),
        ("seed=3", {"campaign", "prefix", "recovery", "comparison"}),
        ("cases=20", set()),
        ("processes=1", set()),
    ],
)
def test_a_setting_changes_the_stages_that_depend_on_it(setting: str, stages: set[str]) -> None:
    assert changed(setting) == stages


def test_a_dag_has_no_loops_and_no_strangers() -> None:
    with pytest.raises(ValueError, match="no earlier stage"):
        stage_keys([Stage("a", "train", inputs=("b",)), Stage("b", "train")])
    with pytest.raises(ValueError, match="twice"):
        stage_keys([Stage("a", "train"), Stage("a", "derive")])
    first = stage_keys([Stage("a", "train", {"x": 1, "y": 2})])
    assert first == stage_keys([Stage("a", "train", {"y": 2, "x": 1})])
    assert first != stage_keys([Stage("a", "train", {"x": 1, "y": 2}, semantics=2)])


def test_defaults_are_frozen() -> None:
    """Invariant 7. To change a default on purpose, change the golden file and say so in CHANGELOG.md."""
    found = {}
    for study, preset in (
        ("recovery", "default"),
        ("recovery", "published"),
        ("crossed", "default"),
        ("training", "default"),
        ("compression", "default"),
        ("diffusion", "default"),
    ):
        cells = resolve(study, [f"preset={preset}"]).cells
        found[f"{study}/{preset}"] = [cell.model_dump(mode="json") for cell in cells]
    assert found == json.loads(GOLDEN.read_text())
