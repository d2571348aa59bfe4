"""Grids: products, values that vary together, sub-grids, computed values; what is written down and what is refused."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from descentlab.cli.main import app
from descentlab.config import yaml12
from descentlab.config.complete import completions
from descentlab.config.grid import alternatives, computed, product
from descentlab.config.overrides import parse_override
from descentlab.config.resolve import Resolved, resolve
from descentlab.config.schema import flatten
from descentlab.core.errors import UserError

PLAIN = {"study": "crossed", "fault": "none", "timeline": "barrier", "compressor": "none", "optimizer": "sgd"}


def opened(tmp_path: Path, grid: Any, *overrides: str, limit: int | None = 10_000, **settings: Any) -> Resolved:
    path = tmp_path / "study.yaml"
    path.write_text(yaml12.dump({**PLAIN, **settings, "grid": grid}))
    return resolve(path, list(overrides), limit=limit)


def points(resolved: Resolved, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(flatten(cell).get(key) for key in keys) for cell in resolved.cells]


def ids(resolved: Resolved) -> list[str]:
    return [run.id for run in resolved.runs]


# Counts and order ---------------------------------------------------------------------------------------------------

RATES = {"logspace": [2**-6, 2**2, 9]}
BY_MOMENTUM = {
    "batch_size": [1, 2, 4, 8, 16, 32],
    "list": [
        {"optimizer.lr": RATES, "optimizer.momentum": 0},
        {"optimizer.lr": {"logspace": [2**-6 / 10, 2**2 / 10, 9]}, "optimizer.momentum": 0.9},
    ],
}
BY_MODEL = [
    {"model": [{"name": "mlp", "hidden": [4]}, {"name": "mlp", "hidden": [8]}], "dtype": "float32"},
    {"model": "cnn", "dtype": ["float32", "float64"]},
]
NESTED = {
    "seed": [1, 2],
    "batch_size": [1, 4, 9],
    "steps": [7],
    "list_a": [
        {"optimizer": "sgd", "optimizer.momentum": [0, 0.9]},
        {"optimizer": "adam", "optimizer.betas": [[0.9, 0.99]]},
    ],
    "list_b": [
        {
            "dtype": ["float64"],
            "list": [
                {"workers": [1], "schedule.warmup_steps": [2]},
                {"workers": [3], "schedule.warmup_steps": [4, 5]},
            ],
        }
    ],
}


@pytest.mark.parametrize(
    ("grid", "count"), [(BY_MOMENTUM, 6 * (9 + 9)), (BY_MODEL, 2 + 2), (NESTED, 2 * 3 * 1 * 3 * 3)]
)
def test_counts(tmp_path: Path, grid: Any, count: int) -> None:
    resolved = opened(tmp_path, grid)
    assert len(resolved.cells) == count
    assert len(set(ids(resolved))) == len(resolved.runs) == 10 * count
    assert resolved.notes == []


def test_a_product_of_axes_changes_the_last_fastest(tmp_path: Path) -> None:
    resolved = opened(tmp_path, {"seed": [1, 2], "batch_size": [4, 8]})
    assert points(resolved, "seed", "batch_size") == [(1, 4), (1, 8), (2, 4), (2, 8)]


def test_zipped_axes_vary_together_beside_a_product(tmp_path: Path) -> None:
    grid = {"zip": {"optimizer.lr": [0.1, 0.2], "batch_size": [4, 8]}, "seed": [0, 1]}
    resolved = opened(tmp_path, grid)
    expected = [(lr, batch, seed) for lr, batch in ((0.1, 4), (0.2, 8)) for seed in (0, 1)]
    assert points(resolved, "optimizer.lr", "batch_size", "seed") == expected
    two = opened(tmp_path, {**grid, "zip_more": {"steps": [3, 4], "workers": [1, 2]}})
    assert len(two.cells) == 8
    assert set(points(two, "steps", "workers")) == {(3, 1), (4, 2)}


def test_sub_grids_may_have_different_keys_and_options(tmp_path: Path) -> None:
    grid = [
        {"optimizer": "sgd", "optimizer.momentum": [0, 0.5]},
        {"optimizer": {"name": "adam", "eps": 1e-6}, "optimizer.betas": [[0.8, 0.9]], "batch_size": 8},
    ]
    resolved = opened(tmp_path, grid, batch_size=16)
    shown = points(resolved, "optimizer", "optimizer.momentum", "optimizer.betas", "batch_size")
    assert shown == [("sgd", 0.0, None, 16), ("sgd", 0.5, None, 16), ("adam", None, [0.8, 0.9], 8)]
    assert {"optimizer", "optimizer.momentum", "batch_size"} <= {r.key for r in resolved.effective() if r.axis}


def test_an_argument_reaches_every_sub_grid_and_may_end_an_axis(tmp_path: Path) -> None:
    grid = [{"seed": [1, 2]}, {"seed": [3], "batch_size": [4, 8]}]
    assert points(opened(tmp_path, grid, "steps=9"), "seed", "steps") == [(1, 9), (2, 9), (3, 9), (3, 9)]
    ended = opened(tmp_path, grid, "batch_size=4")
    assert points(ended, "seed", "batch_size") == [(1, 4), (2, 4), (3, 4)]
    zipped = opened(tmp_path, {"zip": {"seed": [1, 2], "batch_size": [4, 8]}}, "seed=5")
    assert points(zipped, "seed", "batch_size") == [(5, 4), (5, 8)]
    widened = opened(tmp_path, {"zip": {"seed": [1, 2], "batch_size": [4, 8]}}, "seed=5,6,7")
    assert len(widened.cells) == 6  # no longer together


def test_cells_that_repeat_are_run_once_and_said_once(tmp_path: Path) -> None:
    resolved = opened(tmp_path, [{"seed": [1, 2, 2]}, {"seed": [2, 3]}])
    assert points(resolved, "seed") == [(1,), (2,), (3,)]
    assert resolved.notes == [
        "seed: 2 is given more than once and run once",
        "1 of 4 cells repeat another and are run once",
    ]
    zipped = opened(tmp_path, {"zip": {"seed": [1, 1], "batch_size": [4, 4]}})
    assert zipped.notes == ["1 of 2 cells repeat another and are run once"]


@pytest.mark.parametrize(
    ("grid", "overrides"),
    [
        (BY_MOMENTUM, []),
        (BY_MODEL, []),
        (NESTED, ["steps=3"]),
        ([{"seed": [1, 2]}, {"seed": [3], "optimizer.lr": [0.5]}], ["optimizer.momentum=0,0.5"]),
        ([{"optimizer.lr": [0.5]}, {"optimizer": ["adam", "sgd"]}], ["seed=1,2"]),
        ({"zip": {"seed": [1, 2], "batch_size": [4, 8]}, "zip_b": {"steps": [3, 4], "workers": [1, 2]}}, []),
        ({"list": [{"zip": {"seed": [1, 2], "steps": [3, 4]}}, {}], "dtype": ["float64"]}, []),
        ({"optimizer.lr": {"random": {"low": 1e-4, "high": 1, "n": 3, "log": True}}}, []),
        ([{"optimizer.lr": [0.1]}], []),
    ],
)
def test_the_document_fed_back_gives_the_same_runs(tmp_path: Path, grid: Any, overrides: list[str]) -> None:
    first = opened(tmp_path, grid, *overrides)
    path = tmp_path / "again.yaml"
    path.write_text(yaml12.dump(first.document))
    again = resolve(path)
    assert again.document == first.document
    assert [vars(run) for run in again.runs] == [vars(run) for run in first.runs]
    assert again.axes == first.axes


def test_a_cells_id_does_not_depend_on_the_grid_it_came_from(tmp_path: Path) -> None:
    alone = ids(opened(tmp_path, {}, "seed=3", "optimizer.lr=0.5"))
    listed = opened(tmp_path, [{"seed": [1]}, {"seed": [3], "optimizer.lr": [0.5]}])
    zipped = opened(tmp_path, {"zip": {"seed": [1, 3], "optimizer.lr": [0.1, 0.5]}})
    assert set(alone) <= set(ids(listed)) and set(alone) <= set(ids(zipped))


def test_the_cap_counts_all_sub_grids_and_can_be_lifted(tmp_path: Path) -> None:
    grid = [{"seed": {"linspace": [0, 5, 6]}}, {"batch_size": list(range(1, 8))}]
    with pytest.raises(UserError, match=r"grid = 13: expected at most 12 cells\. .*run takes -y for more"):
        opened(tmp_path, grid, limit=12)
    assert len(opened(tmp_path, grid, limit=None).cells) == 13
    axes = {("a",): list(range(200)), ("b",): list(range(200))}
    with pytest.raises(UserError, match="it is 200 a x 200 b; run takes -y"):
        product(axes)
    assert len(product(axes, limit=None)) == 40_000
    assert len(product(axes, groups={("a",): "g", ("b",): "g"})) == 200


def test_yes_lifts_the_cap_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("descentlab.config.resolve.LIMIT", 3)
    monkeypatch.setattr("descentlab.launch.api.estimate", lambda resolved, out: ["estimated"])
    words = ["run", "crossed", "fault=none", "timeline=barrier", "seed=1,2", "--dry-run"]
    refused = CliRunner().invoke(app, words)
    assert (refused.exit_code, "run takes -y for more" in refused.output) == (2, True)
    accepted = CliRunner().invoke(app, [*words, "-y"])
    assert (accepted.exit_code, "estimated" in accepted.output) == (0, True)


# Computed values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "values"),
    [
        ("logspace", [1e-4, 1e-1, 4], (1e-4, 1e-3, 1e-2, 1e-1)),
        ("logspace", [100, 1, 3], (100, 10.0, 1)),
        ("logspace", [0.5, 8, 5], (0.5, 1.0, 2.0, 4.0, 8)),
        ("logspace", [3, 7, 1], (3,)),
        ("linspace", [0, 1, 5], (0, 0.25, 0.5, 0.75, 1)),
        ("linspace", [1, 0.7, 4], (1, 0.9, 0.8, 0.7)),
    ],
)
def test_spaced_values(kind: str, arguments: list[Any], values: tuple[float, ...]) -> None:
    assert computed(kind, arguments, {}, "key", "key") == values
    assert alternatives({"key": {kind: arguments}})[0][0].values == values
    assert parse_override(f"key={kind}({','.join(map(str, arguments))})").values == values


@given(st.integers(0, 5), st.floats(1e-6, 1.0), st.floats(1.1, 1e6), st.booleans())
def test_random_values_stay_inside_and_depend_on_seed_and_key_only(
    seed: int, low: float, ratio: float, log: bool
) -> None:
    named = {"low": low, "high": low * ratio, "n": 20, "seed": seed, "log": log}
    values = computed("random", [], named, "key", "key")
    assert values == computed("random", [], named, "elsewhere", "key")
    assert values[:5] == computed("random", [], {**named, "n": 5}, "key", "key")  # more draws keep the first
    assert values != computed("random", [], named, "key", "other")
    assert all(low <= value <= low * ratio for value in values)


def test_random_values_are_uniform_in_what_was_asked() -> None:
    """Means of 4,000 draws, five standard errors wide; whole numbers come equally often, both ends included."""
    flat = computed("random", [2, 6, 4000], {}, "key", "key")
    assert abs(sum(flat) / 4000 - 4) < 5 * 4 / math.sqrt(12 * 4000)
    log = computed("random", [1e-4, 1, 4000], {"log": True}, "key", "key")
    assert abs(sum(map(math.log10, log)) / 4000 + 2) < 5 * 4 / math.sqrt(12 * 4000)
    dice = computed("random", [1, 6, 6000], {"integer": True}, "key", "key")
    counts = [dice.count(face) for face in range(1, 7)]
    assert sum(counts) == 6000
    assert max(abs(count - 1000) for count in counts) < 5 * math.sqrt(6000 * 5 / 36)


def test_a_random_draw_is_frozen() -> None:
    """Old directories are extended by these: a change here must be deliberate."""
    drawn = parse_override("optimizer.lr=random(1e-4, 1e-1, 3, log=true, seed=7)").values
    assert drawn == FROZEN
    assert resolve("crossed", ["optimizer.lr=random(1e-4,1e-1,3,7,true)"]).axes["optimizer.lr"] == list(FROZEN)


FROZEN = (0.000106157, 0.000151704, 0.000522603)


# What a mistake says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (3, "grid = 3: expected a block of key path: [values], or a list of such blocks"),
        ([3], "grid[0] = 3: expected a block"),
        ([], "grid = []: expected at least one sub-grid: an empty list has no runs"),
        ({"seed": 1}, "grid.seed = 1: expected a list of at least one value"),
        ([{"seed": []}], "grid[0].seed = []: expected a list of at least one value"),
        ({"seed": {"logspce": [1, 2, 3]}}, "did you mean 'logspace'?"),
        ({"zip": [1]}, "grid.zip = [1]: expected a block of key path: [values] that vary together"),
        (
            {"zip": {"seed": [1, 2], "steps": [1, 2, 3]}},
            "grid.zip = {'seed': 2, 'steps': 3}: expected the same number of values for each key",
        ),
        ({"zip": {"seed": 1}}, "grid.zip.seed = 1: expected a list"),
        ({"list": {"seed": [1]}}, "grid.list = {'seed': [1]}: expected a list of sub-grids"),
        ({"seed": [1], "list": [{"seed": [2]}]}, "grid.seed = [2]: expected one axis per key"),
        ([{"optimizer": "adma"}, {"seed": [1]}], "optimizer = 'adma': expected one of"),
        ([{"optimizer.lr": [-1]}, {"seed": [1]}], "optimizer.lr = -1: expected a value greater than 0"),
        ([{"replicates": [1]}, {"seed": [1]}], "replicates = [1]: expected one value: it says how much"),
        ({"optimizer.lr": {"logspace": [1, 2]}}, "grid.optimizer.lr = [1, 2]: expected logspace(low, high, n)"),
        ({"optimizer.lr": {"logspace": [0, 2, 3]}}, "with low and high above 0"),
        ({"optimizer.lr": {"logspace": [1, 2, 2.5]}}, "a whole number n of at least 1"),
        ({"optimizer.lr": {"linspace": ["a", 2, 2]}}, "with numbers low and high"),
        ({"optimizer.lr": {"random": {"low": 1, "high": 2, "n": 3, "sed": 1}}}, "expected random(low, high, n, seed=0"),
        ({"optimizer.lr": {"random": {"low": 2, "high": 1, "n": 3}}}, "with low below high"),
        ({"seed": {"random": {"low": 0.5, "high": 2, "n": 3, "integer": True}}}, "with whole numbers low and high"),
        ({"optimizer.lr": {"random": 3}}, "grid.optimizer.lr = [3]: expected random("),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, grid: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        opened(tmp_path, grid)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("lr=logspace()", "lr = []: expected logspace(low, high, n)"),
        ("lr=logspace(1,2,3,4)", "expected logspace(low, high, n)"),
        ("lr=random(1,2,3,low=4)", "expected random(low, high, n"),
        ("lr=random(1,2,seed=3,4)", "expected arguments by position, then each name once"),
        ("lr=random(1,2,3,seed=1,seed=2)", "expected arguments by position, then each name once"),
        ("lr=random(1,2,3,log=maybe)", "with true or false for log and integer"),
        ("lr=random(1,2,3,seed=-1)", "with a whole number for seed"),
        ("grid=logspace(1,2,3)", "write key=value1,value2"),
    ],
)
def test_a_mistake_in_an_argument_is_one_line(argument: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve("crossed", [argument])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# The page about grids -----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "grids.md").read_text()
FILES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for line in PAGE.splitlines() if line.startswith("descentlab show ")]


@pytest.mark.parametrize(("text", "count"), list(zip(FILES, (2 * 2 * 8, 6 * 2 * 8, (6 + 12) * 8, 48), strict=True)))
def test_the_pages_files_have_the_cells_it_says(tmp_path: Path, text: str, count: int) -> None:
    """Times the eight conditions of the crossed study where the file does not set them."""
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert len(resolve(path).cells) == count


@pytest.mark.parametrize(("words", "count"), list(zip(COMMANDS, (4 * 8, 4 * 8, 2 * 4), strict=True)))
def test_the_pages_commands_resolve(words: list[str], count: int) -> None:
    assert len(resolve(words[2], words[3:]).cells) == count


@pytest.mark.parametrize(
    ("written", "arguments"),
    [(row[0], row[1]) for row in re.findall(r"^\| `(\{\w+space: .*?\})` \| (.*?): equal", PAGE, re.MULTILINE)],
)
def test_the_pages_values(written: str, arguments: str) -> None:
    expected = [float(value) for value in arguments.split(", ")]
    assert list(alternatives({"key": yaml12.load(written)})[0][0].values) == expected


# Completion in the shell --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("study", "typed", "incomplete", "offered"),
    [
        ("crossed", [], "optimizer.l", ["optimizer.lr="]),
        ("crossed", ["optimizer=sgd"], "optimizer.n", ["optimizer.nesterov="]),
        ("crossed", ["optimizer=adam"], "optimizer.n", []),
        ("crossed", [], "optimizer=nad", ["optimizer=nadam"]),
        ("crossed", [], "optimizer=sgd,nad", ["optimizer=sgd,nadam"]),
        ("crossed", ["optimizer=sgd"], "optimizer.nesterov=", ["optimizer.nesterov=false", "optimizer.nesterov=true"]),
        ("crossed", [], "dtype=float6", ["dtype=float64"]),
        ("crossed", ["sead=1"], "see", ["seed="]),
        ("recovery", [], "preset=p", ["preset=published"]),
        ("recovery", [], "siz", ["size="]),
        ("recovery", [], "size=q", ["size=quick"]),
        ("recovery", [], "seed=", []),
        ("nobody", [], "se", []),
        ("crossed", ["optimizer", "="], "nad", ["nadam"]),
        ("crossed", ["optimizer", "=", "sgd", "optimizer.nesterov"], "=", ["false", "true"]),
        ("crossed", ["optimizer", "=", "sgd"], "optimizer.n", ["optimizer.nesterov="]),
    ],
)
def test_completions(study: str, typed: list[str], incomplete: str, offered: list[str]) -> None:
    assert completions(study, typed, incomplete) == offered


def test_every_key_offered_is_a_key(tmp_path: Path) -> None:
    keys = completions("crossed", ["optimizer=sgd"], "")
    shown = {row.key for row in resolve("crossed", ["optimizer=sgd"]).effective()}
    assert shown - {key.removesuffix("=") for key in keys} == set()
