"""Moments over runs equal numpy's on all rows, whatever blocks, kills and failed runs lie between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from descentlab.config.resolve import Resolved, resolve
from descentlab.core.errors import StudyError, UserError
from descentlab.engine.program import Slot
from descentlab.engine.reducing import Groups, ReducingRecorder
from descentlab.launch import api
from descentlab.launch.block import build_engine, open_block, run_block
from descentlab.store import RunDirectory, load
from descentlab.store.moments import _chan, load_moments, load_weights
from descentlab.store.progress import status

GRID = ["dataset=digits", "model.pool=0", "model.hidden=[4]", "optimizer=sgd", "optimizer.lr=0.1,0.5"]
SMALL = [*GRID, "steps=7", "replicates=35", "observe.evaluate_every=3", "processes=1", "members_per_block=35"]
WEIGHTS = ["observe.weights_every=2", "observe.coordinates=[0,5,9]"]
KEYS = ["cell", "role", "step", "observable"]


def study(*words: str) -> Resolved:
    """The small study; a key given later replaces the one before."""
    last = {word.partition("=")[0]: word for word in (*SMALL, *words)}
    return resolve("training", list(last.values()))


def run(path: Path, *words: str) -> Path:
    assert api.run(study(*words), path, launcher="local", with_report=False) == 0
    return path


@pytest.fixture(scope="module")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 70 runs in two blocks: rows, and moments with weights."""
    folder = tmp_path_factory.mktemp("clouds")
    reduced = ["observe.reduce=moments", "observe.weights=covariance", *WEIGHTS]
    return {"rows": run(folder / "rows"), "moments": run(folder / "moments", *reduced)}


def expected(frame: pl.DataFrame) -> pl.DataFrame:
    """Moments by numpy from all rows."""
    lines = []
    names = ("train_loss", "train_accuracy", "grad_norm", "update_norm", "test_loss", "test_accuracy")
    for (cell, step), part in frame.partition_by("cell", "step", as_dict=True).items():
        for name in names:
            values = part[name].drop_nulls().to_numpy()
            if len(values):
                line = (cell, "plain", step, name, len(values), values.mean(), values.var(ddof=1))
                lines.append((*line, values.min(), values.max()))
    columns = [*KEYS, "n", "mean", "variance", "low", "high"]
    return pl.DataFrame(lines, schema=columns, orient="row").sort(KEYS)


def test_moments_equal_numpys_over_all_rows(clouds: dict[str, Path]) -> None:
    """Fails when blocks are averaged without weights, or a cell's runs are mixed with another's."""
    rows = load(clouds["rows"]).frame
    found = load_moments(clouds["moments"])
    assert found is not None and len(RunDirectory.open(clouds["moments"]).block_keys()) == 2
    wanted = expected(rows)
    same = found.filter(pl.col("observable").is_in(wanted["observable"].unique().implode())).sort(KEYS)
    assert same.select(KEYS).equals(wanted.select(KEYS)) and same["n"].to_list() == wanted["n"].to_list()
    assert same["nonfinite"].sum() == 0
    for column in ("mean", "variance", "low", "high"):
        np.testing.assert_allclose(same[column], wanted[column], rtol=1e-9, atol=1e-16)


def test_the_table_has_each_runs_last_row(clouds: dict[str, Path]) -> None:
    rows, last = (load(clouds[name]).frame for name in ("rows", "moments"))
    assert last.height == 70 and last["step"].unique().to_list() == [6]
    whole = rows.filter(pl.col("step") == 6).sort("cell", "replicate")
    for column in ("train_loss", "test_loss", "test_accuracy", "optimizer.lr"):
        assert whole[column].to_list() == last.sort("cell", "replicate")[column].to_list()
    assert all(line.state == "done" for line in status(clouds["moments"]).runs)


def test_weights_equal_numpys(clouds: dict[str, Path]) -> None:
    """Oracle: the same blocks run here with their weights looked at."""
    directory = RunDirectory.open(clouds["rows"])
    seen: dict[tuple[int, int], list[np.ndarray]] = {}
    cells = {str(r["id"]): int(r["cell"]) for r in directory.read_jsonl("resolved.jsonl")}
    for key in directory.block_keys():
        block, cell = open_block(directory, key)
        for progress in (engine := build_engine(block, cell, None, 0, ReducingRecorder())).run():
            theta = torch.cat([p.flatten(1) for p in engine.state.params.values()], dim=1).numpy().astype(float)
            for m, slot in enumerate(engine.slots):
                seen.setdefault((cells[slot.runs[0].id], progress.step - 1), []).append(theta[m, [0, 5, 9]])
    for (cell, role), found in load_weights(clouds["moments"]).items():
        assert role == "plain" and found["step"].tolist() == [0, 2, 4, 6] and found["n"].tolist() == [35] * 4
        for i, step in enumerate(found["step"].tolist()):
            sample = np.stack(seen[cell, step])
            np.testing.assert_allclose(found["mean"][i], sample.mean(0), rtol=1e-12)
            np.testing.assert_allclose(found["covariance"][i], np.cov(sample.T), rtol=1e-9, atol=1e-18)


def test_variances_beside_rows(tmp_path: Path, clouds: dict[str, Path]) -> None:
    """``observe.weights`` without ``observe.reduce`` keeps every row, and variances are the covariance's diagonal."""
    both = run(tmp_path / "both", "observe.weights=variance", *WEIGHTS)
    assert load_moments(both) is None
    assert load(both).frame.height == load(clouds["rows"]).frame.height
    whole = load_weights(clouds["moments"])
    for who, found in load_weights(both).items():
        diagonal = np.diagonal(whole[who]["covariance"], axis1=1, axis2=2)
        np.testing.assert_allclose(found["covariance"], diagonal, rtol=1e-9, atol=1e-18)


def test_blocks_of_an_earlier_grid_are_left_out(tmp_path: Path, clouds: dict[str, Path]) -> None:
    """A block none of whose runs is asked for any more; once it made the report fail."""
    path = tmp_path / "later"
    shutil.copytree(clouds["moments"], path)
    kept = set(json.loads((path / "plan.json").read_text())["blocks"][0]["runs"])
    lines = (path / "resolved.jsonl").read_text().splitlines(keepends=True)
    own = [line for line in lines if json.loads(line)["id"] in kept]
    assert 0 < len(own) < len(lines)
    (path / "resolved.jsonl").write_text("".join(own))
    found = load_moments(path)
    assert found is not None and found["n"].max() == len(own) and found["role"].dtype == pl.String


def test_an_interrupted_cloud_has_the_moments_of_an_undisturbed_one(tmp_path: Path, clouds: dict[str, Path]) -> None:
    """Stopped after every second update; a file that a killed attempt left behind overlaps all later ones."""
    reduced = ["observe.reduce=moments", "observe.weights=covariance", *WEIGHTS]
    path = tmp_path / "cut"
    resolved = study(*reduced)
    prepared = api.prepare(resolved, path, False)
    directory = RunDirectory.create(path, "training", "study: training\n")
    api._write_plan(resolved, directory, prepared, None, {})
    for key in [block["key"] for block in prepared["plan"]["blocks"]]:
        for _ in range(20):
            calls = iter([False, True])
            if run_block(path, key, stop=lambda calls=calls: next(calls, True)) == "done":  # type: ignore[misc]
                break
        else:
            pytest.fail("never done")
        files = sorted((directory.block_folder(key) / "artifacts").glob("moments-*.npz"))
        assert len(files) == 4
        (undisturbed,) = (clouds["moments"] / "blocks" / key / "artifacts").glob("moments-*.npz")
        held = dict(np.load(undisturbed))
        late = {k: v[held["step"] > 0] for k, v in held.items() if len(v) == len(held["step"])}
        np.savez(files[0].with_name("moments-0000000001.npz"), **{**held, **late})
    cut, whole = load_moments(path), load_moments(clouds["moments"])
    assert cut is not None and cut.equals(whole)
    for who, found in load_weights(path).items():
        for name, array in load_weights(clouds["moments"])[who].items():
            np.testing.assert_array_equal(found[name], array)


def test_values_that_are_not_finite_are_counted_apart() -> None:
    runs = [type("Run", (), {"id": str(i), "group": i % 2, "stop": 1})() for i in range(6)]
    groups = Groups.of([Slot((run,)) for run in runs])  # type: ignore[arg-type]
    values = np.array([[1.0, np.nan, 3.0, np.inf, np.nan, 5.0], [0, 1, 2, 3, 4, 5]])
    found = groups.reduce(values)
    assert found["n"].tolist() == [[2, 3], [1, 3]] and found["nonfinite"].tolist() == [[1, 0], [2, 0]]
    assert found["mean"].tolist() == [[2.0, 2.0], [5.0, 3.0]] and found["m2"].tolist() == [[2.0, 8.0], [0.0, 8.0]]
    assert found["low"].tolist() == [[1, 0], [5, 1]] and found["high"].tolist() == [[3, 4], [5, 5]]
    theta = np.array([[1.0, 0], [np.nan, 1], [3, 4], [5, 6], [5, 8], [7, 8]])
    spread = groups.spread(theta, matrix=False)
    assert spread["n"].tolist() == [3, 2] and spread["mean"].tolist() == [[3, 4], [6, 7]]
    assert spread["m2"].tolist() == [[8, 32], [2, 2]]


def test_a_diverged_run_is_known_without_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    words = ["optimizer.lr=1e30", "replicates=2", "observe.reduce=moments", "steps=4"]
    run(path, *words)
    lines = status(path).runs
    assert {line.state for line in lines} == {"diverged"}
    assert {row["diverged_step"] for row in RunDirectory.open(path).read_jsonl("runs.jsonl")} <= {0, 1, 2}


def test_two_samples_merge_to_the_moments_of_both() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(3.0, 2.0, size=(11, 3))

    def moment(x: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        return len(x), x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0))

    n, mean, m2 = _chan(moment(a), moment(b))
    both = np.concatenate([a, b])
    assert n == 16
    np.testing.assert_allclose(mean, both.mean(0), rtol=1e-12)
    np.testing.assert_allclose(m2 / 15, np.cov(both.T), rtol=1e-12)


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = run(tmp_path / "torn", "observe.reduce=moments", "replicates=1")
    (file,) = path.glob("blocks/*/artifacts/moments-*.npz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StudyError, match="cannot be read") as caught:
        load_moments(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["observe.reduce=moment"], "observe.reduce = 'moment'"),
        (["observe.weights=all"], "observe.weights = 'all'"),
        (
            ["observe.weights=variance", "observe.every=7"],
            "observe.weights_every = 100: expected a multiple of every = 7",
        ),
        (["observe.weights_every=0"], "observe.weights_every = 0"),
        (["observe.coordinates=[-1]"], "observe.coordinates"),
        (["steps=10", "epochs=2"], "steps = 10: expected steps or epochs, not both; epochs = 2 is given"),
        (["steps=0"], "steps = 0"),
        (["replicates=0"], "replicates = 0"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve("training", words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["observe.weights=variance", "observe.coordinates=[0,99999]"], "observe.coordinates = 99999: expected"),
        (["observe.weights=covariance", "model.hidden=[300]"], "observe.weights = 'covariance': expected"),
    ],
)
def test_weights_a_model_has_not(words: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        api.run(resolve("training", [*words, "dataset=digits", "model.pool=0"]), tmp_path / "x", launcher="local")
    assert says in str(caught.value)
