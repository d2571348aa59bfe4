"""The run directory, the table, status and provenance. (Kills and damage: test_store_kills.py.)"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_job import RUNS, STEPS, new_directory, train

from descentlab.core.errors import StudyError, UserError
from descentlab.store import (
    VOLATILE,
    BlockWriter,
    Results,
    RunDirectory,
    equal_tables,
    jsonl,
    leftovers,
    load,
    parts,
    provenance,
    status,
)
from descentlab.store.table import _in_order, config_columns, planned_for


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    path = tmp_path_factory.mktemp("undisturbed") / "out"
    train(new_directory(path))
    return load(path)


# ---------------------------------------------------------------------------------------------------------- directories


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="an empty directory or one made by descentlab"):
            RunDirectory.create(tmp_path, "recovery", "", overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="made by descentlab"):
        RunDirectory.open(tmp_path)
    with pytest.raises(UserError, match="an existing directory"):
        RunDirectory.open(tmp_path / "absent")


@pytest.mark.parametrize("place", ["below a file", "read-only file system"])
def test_an_unwritable_directory_is_one_clear_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "out" if place == "below a file" else Path("/proc/descentlab")
    with pytest.raises(UserError, match=r"--out = .*: expected a writable directory"):
        RunDirectory.create(path, "recovery", "")


def test_one_directory_holds_one_study_and_one_format(tmp_path: Path) -> None:
    new_directory(tmp_path / "out")
    with pytest.raises(UserError, match="a directory of study 'crossed'; it holds 'recovery'"):
        RunDirectory.create(tmp_path / "out", "crossed", "")
    (tmp_path / "out/descentlab.json").write_text(json.dumps({"format": 99, "study": "recovery"}))
    with pytest.raises(UserError, match="a directory of format 1; it has format 99"):
        RunDirectory.create(tmp_path / "out", "recovery", "")
    assert RunDirectory.create(tmp_path / "out", "crossed", "", overwrite=True).study == "crossed"


def test_an_earlier_document_is_not_overwritten_after_one_was_removed(tmp_path: Path) -> None:
    for text in ("a: 1\n", "a: 2\n", "a: 3\n"):
        RunDirectory.create(tmp_path / "out", "recovery", text)
    (tmp_path / "out/study.1.yaml").unlink()
    RunDirectory.create(tmp_path / "out", "recovery", "a: 4\n")
    kept = {path.name: path.read_text() for path in (tmp_path / "out").glob("study.*.yaml")}
    assert kept == {"study.2.yaml": "a: 2\n", "study.3.yaml": "a: 3\n"}


def test_overwrite_deletes_results_and_nothing_else(tmp_path: Path) -> None:
    directory = new_directory(tmp_path)
    train(directory)
    (tmp_path / "notes.txt").write_text("mine")
    RunDirectory.create(tmp_path, "recovery", "study: recovery\n", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert load(tmp_path).runs == [] and load(tmp_path).frame.height == 0
    assert directory.block_keys() == []


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    directory = new_directory(tmp_path)
    with directory.lock(), pytest.raises(UserError, match="no other command is writing to"), directory.lock():
        pass
    with directory.lock():
        pass


# --------------------------------------------------------------------------------------------------- table and the rest


def test_the_frame_has_the_settings_that_vary(undisturbed: Results) -> None:
    results = undisturbed
    frame = results.frame
    assert frame.columns[:3] == ["run", "step", "attempt"]
    assert frame.select("run", "step").rows() == [(r, s) for r in ("a0", "a1") for s in range(STEPS)]
    assert {"cell", "replicate", "role", "optimizer", "optimizer.lr", "case", "hit_step", "layer", "value"} <= set(
        frame.columns
    )
    assert "batch_size" not in frame.columns
    assert results.spec == {"batch_size": 64}
    row = frame.row(by_predicate=(pl.col("run") == "a1") & (pl.col("step") == 3), named=True)
    assert math.isnan(row["train_loss"])  # measured and not a number: never null
    assert (row["optimizer"], row["optimizer.lr"], row["hit_step"], row["layer"]) == ("adam", 0.01, 3, "conv1")
    assert math.isinf(row["value"])
    assert frame.filter(pl.col("run") == "a0")["bn"].null_count() == STEPS
    assert results.hits[0]["new"] == [-math.inf]
    assert results.status[1] == {
        "run": "a1",
        "status": "diverged",
        "steps": STEPS,
        "message": "",
        "block": "b0",
        "diverged_step": 3,
    }
    assert results.study == {"study": "recovery"}


def test_every_cell_carries_the_hit_planned_for_it() -> None:
    """A grid over two faults: one case, two plans. Joined by case alone, both cells would carry the first."""
    campaign = [
        {"case": 0, "replicate": 0, "step": 5, "layer": "conv1", "rule": {"value": 1.0}, "cells": [0, 2]},
        {"case": 0, "replicate": 0, "step": 7, "layer": "conv2", "rule": {"kind": "bit", "bit": 3}, "cells": [1, 3]},
    ]
    runs = [
        {"id": f"{c}{r}", "cell": c, "replicate": 0, "role": r, "labels": {"case": 0}, "settings": {}}
        for c in range(5)
        for r in ("twin", "fault")
    ]
    frame = config_columns(runs, campaign, taken=set())
    found = dict(zip(frame["run"], frame.select("hit_step", "layer", "value").rows(), strict=True))
    for cell in range(4):
        expected = (5, "conv1", 1.0) if cell % 2 == 0 else (7, "conv2", None)
        assert found[f"{cell}fault"] == found[f"{cell}twin"] == expected
    assert found["4twin"][0] == 5  # a cell that plans nothing carries what its replicate was spared
    by_hand = [{k: v for k, v in campaign[0].items() if k != "cells"}]
    assert planned_for(runs, by_hand)["3fault"]["step"] == 5
    assert planned_for(runs, []) == {}


def test_runs_of_an_older_grid_are_left_over(tmp_path: Path) -> None:
    directory = new_directory(tmp_path)
    train(directory)
    assert leftovers(tmp_path) == []
    assert set(load(tmp_path).frame["run"]) == {"a0", "a1"}
    directory.replace_jsonl("resolved.jsonl", [RUNS[0], {**RUNS[1], "id": "new"}])
    assert leftovers(tmp_path) == ["a1"]
    results = load(tmp_path)  # the stored table is out of date and must be rebuilt
    assert set(results.frame["run"]) == {"a0"} and results.hits == []
    assert [(r["run"], r["status"]) for r in results.status] == [("a0", "done"), ("new", "queued")]


def test_a_stored_table_is_used_until_something_changes(tmp_path: Path) -> None:
    directory = new_directory(tmp_path)
    train(directory, stop=5)
    assert load(tmp_path).frame["step"].max() == 3
    written = (tmp_path / "table.parquet").stat().st_mtime_ns
    load(tmp_path)
    assert (tmp_path / "table.parquet").stat().st_mtime_ns == written
    train(directory)
    assert load(tmp_path).frame["step"].max() == STEPS - 1
    (tmp_path / "table.parquet").write_bytes(b"PAR1 rubbish")
    assert load(tmp_path).frame["step"].max() == STEPS - 1


def test_a_table_that_is_up_to_date_is_all_that_is_read(
    undisturbed: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part of any block is opened and resolved.jsonl is parsed once; hits come from their file, or where that is
    damaged from the blocks."""
    copy = shutil.copytree(undisturbed.path, tmp_path / "copy")
    read: list[str] = []
    plain = RunDirectory.read_jsonl

    def noted(self: RunDirectory, name: str, **how: Any) -> list[dict[str, Any]]:
        read.append(name)
        return plain(self, name, **how)

    monkeypatch.setattr(RunDirectory, "read_jsonl", noted)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "read_part", lambda folder, part: pytest.fail(f"{part.file} was read"))
        again = load(copy)
    assert equal_tables(again.frame, undisturbed.frame) == [] and read.count("resolved.jsonl") == 1
    assert (again.hits, again.status, again.runs) == (undisturbed.hits, undisturbed.status, undisturbed.runs)
    assert again.hits[0]["new"] == [-math.inf]
    (copy / "hits.jsonl").write_text('{"case": 0, "ru')
    assert load(copy).hits == undisturbed.hits


def test_parts_of_earlier_versions_are_read(undisturbed: Results, tmp_path: Path) -> None:
    """They were Parquet files. Fails when the reader goes by anything but the name."""
    copy = shutil.copytree(undisturbed.path, tmp_path / "copy")
    (copy / "table.parquet").unlink()
    folder = copy / "blocks" / "b0"
    done = json.loads((folder / "done.json").read_text())
    for part in done["metrics"]:
        frame = pl.read_ipc((folder / part["file"]).read_bytes())
        (folder / part["file"]).unlink()
        part["file"] = part["file"].replace(".arrow", ".parquet")
        frame.write_parquet(folder / part["file"])
        part["sha256"] = hashlib.sha256((folder / part["file"]).read_bytes()).hexdigest()
    (folder / "done.json").write_text(json.dumps(done))
    assert equal_tables(load(copy).frame, undisturbed.frame) == []


@pytest.mark.parametrize("far", [1, 2**60])
def test_rows_are_put_in_order_and_doubles_are_counted(far: int) -> None:
    """Against polars' own sort; ``far`` steps apart one number cannot hold all three keys. Fails when attempts are not
    compared, or when numbers that have overflowed are."""
    draw = np.random.default_rng(0)
    n = 500
    rows = pl.DataFrame(
        {
            "run": [f"{r:x}" for r in draw.integers(0, 40, n)],
            "step": draw.integers(-2, 6, n) * far,
            "attempt": draw.integers(0, 3, n),
            "loss": draw.normal(size=n),
        }
    )
    keys = ["run", "step", "attempt"]
    once = rows.unique(keys, keep="first", maintain_order=True)
    ordered, doubles = _in_order(once)
    assert doubles == 0 and ordered.equals(once.sort(keys))
    assert _in_order(rows)[1] == n - once.height > 0
    assert _in_order(rows.clear())[1] == 0


def test_equal_tables_sees_every_kind_of_difference(undisturbed: Results) -> None:
    frame = undisturbed.frame
    assert equal_tables(frame, frame.reverse()) == []
    assert equal_tables(frame, frame.with_columns(pl.lit(1.0).alias(VOLATILE[0]))) == []
    assert "only in the first" in equal_tables(frame, frame.drop("train_loss"))[0]
    assert "rows against" in equal_tables(frame, frame.head(3))[0]
    nudged = frame.with_columns(
        pl.when(pl.col("step") == 6)
        .then(pl.col("train_loss") * (1 + 2**-52))
        .otherwise("train_loss")
        .alias("train_loss")
    )
    assert "2 of 14 rows differ, first at run a0, step 6" in equal_tables(frame, nudged)[0]
    assert equal_tables(frame, frame.with_columns(pl.col("train_loss").fill_nan(None)))  # null is not NaN
    assert (
        "Float64 against Float32" in equal_tables(frame, frame.with_columns(pl.col("train_loss").cast(pl.Float32)))[0]
    )


def test_status_of_every_state(tmp_path: Path) -> None:
    directory = new_directory(tmp_path)
    directory.replace_json("plan.json", {"blocks": [{"key": "b0", "runs": ["a0", "a1"], "steps": STEPS}]})
    assert [(r.state, r.steps) for r in status(tmp_path).runs] == [("queued", 0)] * 2
    train(directory, stop=5)
    assert [(b.state, b.steps, b.total) for b in status(tmp_path).blocks] == [
        ("running", 4, STEPS)
    ]  # this process lives
    owner = directory.block_folder("b0") / "owner.json"
    owner.write_text(owner.read_text().replace('"started": "', '"started": "1'))  # the same id, another process
    assert status(tmp_path).counts() == {"interrupted": 2}
    directory.log_path("b0").write_text("epoch 1\nValueError: boom\n\n")
    BlockWriter(directory, "b0").fail("")
    assert [(r.state, r.message) for r in status(tmp_path).runs] == [("failed", "ValueError: boom")] * 2
    train(directory)
    assert status(tmp_path).counts() == {"done": 1, "diverged": 1}


def test_a_block_refuses_what_it_could_not_give_back(tmp_path: Path) -> None:
    block = BlockWriter(new_directory(tmp_path), "b0")
    with pytest.raises(RuntimeError, match=r"call resume\(\) before"):
        block.checkpoint({}, 0)
    block.resume()
    with pytest.raises(ValueError, match="rows without attempt"):
        block.rows({"run": ["a"], "step": [0]})
    with pytest.raises(ValueError, match="unequal length"):
        block.rows({"run": ["a"], "step": [0], "attempt": [0, 1]})
    with pytest.raises(TypeError, match=r"state\['x'\]\[1\] of a checkpoint is a ndarray"):
        block.checkpoint({"x": [1, np.zeros(2)]}, 0)
    with pytest.raises(ValueError, match="not a plain folder name"):
        BlockWriter(block.directory, "../x")


def test_buffered_rows_do_not_alias_the_caller(tmp_path: Path) -> None:
    directory = new_directory(tmp_path)
    block = BlockWriter(directory, "b0")
    block.resume()
    loss = np.ones(1)
    block.rows({"run": ["a0"], "step": [0], "attempt": [0], "train_loss": loss})
    loss[:] = 7.0
    block.checkpoint({}, 1)
    assert load(tmp_path).frame["train_loss"].to_list() == [1.0]


def test_spilled_rows_count_once_a_checkpoint_names_them(tmp_path: Path) -> None:
    """Fails when a part written between checkpoints is counted at once, or is forgotten by the next checkpoint."""
    directory = new_directory(tmp_path)
    block = BlockWriter(directory, "b0")
    block.resume()
    for step in range(4):
        block.rows({"run": ["a0"], "step": [step], "attempt": [0]})
        if step == 1:
            block.checkpoint({}, 2)
        else:
            block.spill()
    assert load(tmp_path).frame["step"].to_list() == [0, 1]
    assert BlockWriter(directory, "b0").resume() == ({}, 2) and len(list((block.folder / "metrics").iterdir())) == 2
    again = BlockWriter(directory, "b0")
    again.resume()
    again.rows({"run": ["a0"], "step": [2], "attempt": [0]})
    again.spill()
    again.checkpoint({}, 3)
    assert load(tmp_path).frame["step"].to_list() == [0, 1, 2]


def test_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    directory = new_directory(tmp_path)
    state = {
        "w": torch.tensor([1.0, math.nan, -0.0]),
        "slots": {"momentum": [torch.arange(3), None], "by_group": {0: (1, 2.5, "x", True)}},
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    block = BlockWriter(directory, "b0")
    assert block.resume() is None
    block.checkpoint(state, 11)
    found, step = BlockWriter(directory, "b0").resume() or pytest.fail("no checkpoint")
    assert (
        step == 11 and found["slots"]["by_group"] == {0: (1, 2.5, "x", True)} and found["slots"]["momentum"][1] is None
    )
    for name in ("w", "half"):
        assert found[name].dtype == state[name].dtype
        assert found[name].view(torch.uint8).tolist() == state[name].view(torch.uint8).tolist()
    assert (
        torch.load(block.folder / "checkpoint.pt", weights_only=True).keys() == state.keys()
    )  # plain torch reads it too


def test_provenance_has_versions_and_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2-very-secret")
    directory = new_directory(tmp_path)
    first = provenance.record(directory, ["descentlab", "run", "recovery"], "cpu")
    assert first["command"] == ["descentlab", "run", "recovery"] and first["packages"]["torch"]
    assert first["cores"] >= 1 and first["memory_bytes"] > 2**20 and first["threads"] == 1
    changed = {**first, "packages": {**first["packages"], "torch": "1.0"}}
    directory.replace_json("provenance.json", changed)
    again = provenance.record(directory, ["again"], "cpu")
    assert [s["command"] for s in again["resumed"]] == [["again"]]
    assert "torch 1.0 ->" in directory.read_jsonl("events.jsonl")[-1]["message"]
    assert "hunter2-very-secret" not in (tmp_path / "provenance.json").read_text()


floats = st.floats(width=64)
values = st.one_of(floats, st.lists(floats, max_size=3))


@given(
    st.lists(
        st.fixed_dictionaries({"old": values, "new": values, "step": st.integers(), "layer": st.text()}), max_size=5
    )
)
def test_hits_survive_json(rows: list[dict[str, Any]]) -> None:
    data = jsonl.encode(rows)
    for line in data.decode().split("\n")[:-1]:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = jsonl.decode(data, Path("hits.jsonl"))[0]
    assert repr(found) == repr(rows)  # repr: NaN compares equal, -0.0 does not equal 0.0


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(st.tuples(floats, st.none() | floats, st.integers(-(2**63), 2**63 - 1)), max_size=4), max_size=5),
    st.data(),
)
def test_any_rows_in_any_portions_come_back(portions: list[list[tuple[Any, ...]]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = new_directory(Path(folder) / "out")
        block = BlockWriter(directory, "b0")
        block.resume()
        step = 0
        for portion in portions:
            if portion:
                x, y, n = (list(column) for column in zip(*portion, strict=True))
                steps = list(range(step, step + len(portion)))
                block.rows(
                    {"run": ["a0"] * len(x), "step": steps, "attempt": [0] * len(x), "x": np.array(x), "y": y, "n": n}
                )
                step += len(portion)
            if data.draw(st.booleans()):
                block.checkpoint({}, step)
        block.finish([{"run": "a0", "status": "done", "steps": step}])
        frame = load(directory.path).frame
        expected = [row for portion in portions for row in portion]
        assert frame.height == len(expected)
        if expected:
            assert repr(frame.select("x", "y", "n").rows()) == repr(expected)


def test_the_cover_is_readable_without_torch(undisturbed: Results, tmp_path: Path) -> None:
    train(new_directory(tmp_path / "out"), stop=5)
    script = (
        "import sys; from descentlab import store; store.load(sys.argv[1]); print(store.status(sys.argv[1]).counts());"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for path in (undisturbed.path, tmp_path / "out"):
        subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=True, timeout=120)
    assert parts.read_cover(tmp_path / "out/blocks/b0") is not None


def test_rows_that_end_in_the_same_settings_are_read_as_they_are(tmp_path: Path) -> None:
    """Against ``json.loads`` line by line. Fails when a key of that name elsewhere in a row is taken for the last one,
    or when a damaged line is not noticed."""
    settings = {"optimizer": {"name": "sgd", "lr": 0.1}, "value": "inf"}
    rows = [{"id": f"r{i}", "labels": {}, "settings": settings} for i in range(3)]
    rows += [{"id": "a", "settings": {"x": 1}, "role": "last"}, {"id": "b", "labels": {"settings": {"y": 2}}}]
    rows += [{"id": 'c, "settings": 3', "settings": [1]}, {"settings": {"z": 1}}, {"id": "d"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / "resolved.jsonl"
    read, good = jsonl.decode(text.encode(), path, repeated="settings")
    plain, _ = jsonl.decode(text.encode(), path)
    assert read == plain and good == len(text) and [row["id"] for row in read[:3]] == ["r0", "r1", "r2"]
    assert read[0]["settings"] is read[2]["settings"] and read[0]["settings"]["value"] == float("inf")
    with pytest.raises(StudyError, match="damaged at line 2"):
        lines = text.splitlines()
        jsonl.decode("\n".join([lines[0], lines[1][:-1], lines[2], ""]).encode(), path, repeated="settings")
