"""One run of a campaign raises: the others are trained to the end, the same bits as without it, and it is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import polars as pl
import pytest

from descentlab import store
from descentlab.config.resolve import resolve
from descentlab.launch import api
from descentlab.launch.isolate import pieces

SMALL = ["size=quick", "dataset=digits", "model.pool=1", "batch_size=32", "cases=3", "optimizer=adam,sgd"]
# An observable that raises for the members of one faulted run: the one whose loss jumps at its hit in case 1.
TRIPWIRE = """
from pathlib import Path


class Tripwire:
    name, needs = "tripwire", frozenset()

    def measure(self, m):
        if float(m.loss.max()) > {limit} and not Path({mended!r}).exists():
            raise RuntimeError("tripwire")
        return {{}}
"""


def run(out: Path, *more: str) -> int:
    return api.run(resolve("recovery", [*SMALL, *more]), out, launcher="local", with_report=True)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> store.Results:
    out = tmp_path_factory.mktemp("clean") / "out"
    assert run(out) == 0
    return store.load(out)


def test_a_run_that_raises_does_not_take_the_others_with_it(
    clean: store.Results, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Without the cutting of failed blocks all runs that share its block fail."""
    worst = clean.frame.group_by("run", "optimizer", "replicate").agg(pl.col("train_loss").max()).sort("train_loss")
    first, second = worst["train_loss"][-1], worst["train_loss"][-2]
    assert first > 1.001 * second
    (tmp_path / "tripwire.py").write_text(TRIPWIRE.format(limit=(first + second) / 2, mended="/nowhere"))
    sys.path.append(str(tmp_path))
    try:
        assert run(tmp_path / "out", "observe.extra=[tripwire:Tripwire]") == 1
    finally:
        sys.path.remove(str(tmp_path))
    err = capsys.readouterr().err
    status = store.status(tmp_path / "out")
    assert status.counts() == {"done": 11, "failed": 1}
    bad = next(r for r in status.runs if r.state == "failed")
    assert bad.message == "RuntimeError: tripwire" and "failed: block" in err and "alone" in err
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert report.index(bad.run) < report.index("## Verdicts") and "1 of 12 runs failed" in report
    mine = store.load(tmp_path / "out")
    runs = {r["id"]: (r["cell"], r["replicate"], r["role"]) for r in mine.runs}
    same = {(r["cell"], r["replicate"], r["role"]): r["id"] for r in clean.runs}
    assert runs[bad.run] == next(k for k, v in same.items() if v == worst["run"][-1])
    others = mine.frame.filter(pl.col("run") != bad.run)["run"].unique().to_list()
    for run_id in others:
        a = mine.frame.filter(pl.col("run") == run_id)["train_loss"].to_numpy()
        b = clean.frame.filter(pl.col("run") == same[runs[run_id]])["train_loss"].to_numpy()
        assert a == pytest.approx(b, rel=1e-3)  # other members beside it: rounding only


def test_again_resumes_what_was_cut(tmp_path: Path) -> None:
    """After the cause is gone the same directory is completed, from the pieces that plan.json holds."""
    mended = tmp_path / "mended"
    text = TRIPWIRE.format(limit=2.6, mended=str(mended)).replace("Tripwire", "Mendable")
    (tmp_path / "mendable.py").write_text(text)
    sys.path.append(str(tmp_path))
    try:
        assert run(tmp_path / "out", "observe.extra=[mendable:Mendable]") == 1
        assert store.status(tmp_path / "out").counts()["failed"] >= 1
        mended.touch()
        assert api.rerun(tmp_path / "out") == 0
    finally:
        sys.path.remove(str(tmp_path))
    assert store.status(tmp_path / "out").counts() == {"done": 12}


def test_pieces_are_the_block_s_runs_once_each(clean: store.Results) -> None:
    blocks = json.loads((clean.path / "plan.json").read_text())["blocks"]
    whole = max(blocks, key=lambda b: len(b["runs"]))
    parts = pieces(whole)
    assert [len({r["replicate"] for r in part["plans"]}) for part in parts] == [1, 1, 1]
    assert sorted(r for part in parts for r in part["runs"]) == sorted(whole["runs"])
    singles = pieces(parts[0])
    assert all(len(s["runs"]) == 1 for s in singles) and pieces(singles[0]) == []
    assert len({p["key"] for p in (*parts, *singles)}) == len(parts) + len(singles)
