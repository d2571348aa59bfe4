"""Switches that are off by default: folds, mixed precision, torch.compile, determinism, notices, columns of usage."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import descentlab as dl
from descentlab import store
from descentlab.analysis.grids import best_of
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.core.state import State
from descentlab.launch import notify
from descentlab.launch.block import build_engine, make_recorder
from descentlab.launch.determinism import settled
from descentlab.launch.plan import make_plan, read_block
from descentlab.launch.usage import Usage
from descentlab.workloads.base import Data
from descentlab.workloads.loading import load_data
from descentlab.workloads.slices import folded

MLP = ["dataset=digits", "model.pool=0", "optimizer=sgd", "optimizer.lr=0.1", "replicates=2", "steps=20"]
CNN = ["dataset=mnist5k", "model=lenet5", "batch_size=16", *MLP[2:4], "replicates=1", "steps=3"]


def losses(*settings: str) -> tuple[np.ndarray, Any]:
    """Training losses of all steps and runs, without writing anything, and the engine's parts."""
    resolved = resolve("training", settings)
    plan, _ = make_plan(resolved, {})
    block = read_block(plan["blocks"][0])
    cell = resolved.cells[0]
    recorder = make_recorder(cell)
    engine = build_engine(block, cell, None, 0, recorder)
    for _ in engine.run():
        pass
    return recorder.flush()[0]["train_loss"].to_numpy(), engine.parts


def test_every_sample_is_validated_on_once() -> None:
    """Folds are disjoint, cover the training set, hold every class in proportion, and leave the test set alone."""
    data = load_data(resolve("training", MLP).cells[0].dataset)
    parts = [folded(data, 5, k) for k in range(5)]
    whole = sorted(data.x_train.flatten(1).tolist())
    assert sorted(torch.cat([p.x_validation for p in parts]).flatten(1).tolist()) == whole
    for part in parts:
        assert sorted(torch.cat([part.x_train, part.x_validation]).flatten(1).tolist()) == whole
        counts = torch.bincount(part.y_validation, minlength=10) - torch.bincount(data.y_train, minlength=10) / 5
        assert counts.abs().max() < 2
        assert torch.equal(part.x_test, data.x_test)


def test_folds_may_differ_by_one_sample_and_need_no_classes() -> None:
    x, y = torch.arange(7.0).view(7, 1), torch.arange(7.0)
    data = Data("line", x, y, x[:0], y[:0], x, y, classes=0, source="", licence="")
    sizes = [len(folded(data, 3, k).x_validation) for k in range(3)]
    assert sorted(sizes) == [2, 2, 3]
    with pytest.raises(UserError, match="folds = 8: expected at most the 7 training samples"):
        folded(data, 8, 0)


def test_folds_are_runs_and_the_best_mean_is_chosen(tmp_path: Path) -> None:
    """Both optimizers' folds in one command; each fold's validation loss is its own, and their mean decides.

    Fails when folds share data or when `best` compares single folds.
    """
    words = [*(w for w in MLP if "optimizer" not in w), "folds=3", "optimizer=sgd,adam", "optimizer.lr=1e-4,0.1"]
    results = dl.run("training", *words, "observe.evaluate_every=20", out=tmp_path / "o", launcher="local")
    assert len(results.runs) == 3 * 2 * 2 * 2
    plan = store.RunDirectory.open(results.path).read_json("plan.json")
    assert "choose" in {stage["kind"] for block in plan["blocks"] for stage in block["stages"]}
    frame = results.frame.filter(pl.col("validation_loss").is_not_null())
    means = frame.group_by("optimizer", "optimizer.lr").agg(pl.col("validation_loss").mean(), pl.len())
    assert means["len"].to_list() == [6] * 4
    best = means.sort("validation_loss").row(0, named=True)
    found = best_of(results, "validation_loss")[0]
    assert (found.settings["optimizer"], found.settings["optimizer.lr"]) == (best["optimizer"], best["optimizer.lr"])
    assert found.value.n == 6 and found.value.value == pytest.approx(best["validation_loss"])
    assert frame.filter(pl.col("replicate") == 0).n_unique("validation_loss") == 12
    assert "chosen over folds: " in (results.path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["folds=1"], "folds = 1: expected a value greater than or equal to 2"),
        (["fold=1"], "fold = 1: expected folds beside it"),
        (["folds=3", "fold=3"], "fold = 3: expected a number below folds = 3"),
        (["folds=3", "splits.train=train[:50%]"], "folds = 3: expected no splits beside it"),
        (["amp=bfloat16", "dtype=float64"], "amp = 'bfloat16': expected none beside dtype = float64"),
    ],
)
def test_what_cannot_be_is_said(settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        resolve("training", [*MLP, *settings])


@pytest.mark.parametrize("base", [MLP, CNN])
def test_autocast_rounds_the_forward_pass_of_training_alone(base: list[str]) -> None:
    """Losses differ from those of float32, by the rounding of bfloat16 (2^-8) and not more; weights stay float32 and
    evaluations are in full precision.

    Fails when autocast does not reach the forward pass (equal losses), or when weights are cast.
    """
    full, parts = losses(*base)
    mixed, mixed_parts = losses(*base, "amp=bfloat16")
    assert 0 < np.abs(mixed[:2] - full[:2]).max() < 0.05
    params, buffers = mixed_parts.fresh(0)
    assert {p.dtype for p in params.values()} == {torch.float32}
    stacked = State.start({k: p[None] for k, p in params.items()}, {k: b[None] for k, b in buffers.items()})
    for a, b in zip(
        parts.evaluator.evaluate(stacked, *parts.test),
        mixed_parts.evaluator.evaluate(stacked, *parts.test),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_compiled_forward_pass_is_called_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the backend that runs the captured graph as it is: the losses of the plain pass, to rounding."""
    asked: list[str] = []
    compiled = torch.compile

    def noted(function: Any, **options: Any) -> Any:
        asked.append(options["backend"])
        return compiled(function, **options)

    monkeypatch.setattr(torch, "compile", noted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler about itself
        found, _ = losses(*CNN, "compile=eager")
    np.testing.assert_allclose(found, losses(*CNN)[0], rtol=1e-5)
    assert "eager" in asked


def test_compilation_is_refused_where_members_are_vectorised() -> None:
    with pytest.raises(
        UserError, match="compile = 'eager': expected none for a model whose members are trained in one"
    ):
        make_plan(resolve("training", [*MLP, "compile=eager"]), {})


def test_determinism_is_on_inside_and_as_before_outside() -> None:
    """An operation without a deterministic form raises; fails when the switch does not reach torch."""
    with settled(True):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    with settled(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_block_trains_with_the_switch_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from descentlab.launch import block

    seen: list[bool] = []
    plain = block.settled
    monkeypatch.setattr(block, "settled", lambda asked: (seen.append(asked), plain(asked))[1])
    few = [w for w in MLP if "steps" not in w]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on = dl.run("training", *few, "steps=2", "deterministic=true", out=tmp_path / "on", launcher="local")
    off = dl.run("training", *few, "steps=2", out=tmp_path / "off", launcher="local")
    assert seen == [True, False]
    assert on.frame.sort("replicate", "step")["train_loss"].equals(off.frame.sort("replicate", "step")["train_loss"])


def test_rows_say_when_they_were_made_and_what_it_took(tmp_path: Path) -> None:
    """Times lie between begin and end and rise with the step; usage is that of this process. All volatile."""
    begin = datetime.now(UTC)
    frame = dl.run("training", *MLP, out=tmp_path / "o", launcher="local").frame.sort("step")
    stamps = frame["timestamp"].to_list()
    assert begin.timestamp() - 0.01 <= stamps[0].timestamp() <= stamps[-1].timestamp() <= time.time() + 0.01
    assert frame["timestamp"].is_sorted()
    assert frame["cpu_percent"].min() > 0 and 20 < frame["rss_mb"].min() < 20_000  # type: ignore[operator]
    assert {"timestamp", "cpu_percent", "rss_mb"} <= set(store.VOLATILE)


def test_processor_time_is_measured() -> None:
    """A process that sleeps uses little, one that works much: independent of how fast the machine is."""
    columns = {"wall_s": pl.Series("wall_s", [0.0])}
    usage = Usage()
    time.sleep(0.2)
    idle = usage.beside(columns, 0.0)["cpu_percent"][0]
    used = time.process_time()
    while time.process_time() - used < 0.2:
        pass
    assert idle < usage.beside(columns, 0.0)["cpu_percent"][0]


@pytest.fixture
def ended(tmp_path: Path) -> Iterator[store.RunDirectory]:
    dl.run("training", *MLP, "notify=true nothing", out=tmp_path / "o", launcher="local")
    (tmp_path / "o" / store.directory.TOLD).unlink()
    yield store.RunDirectory.open(tmp_path / "o")


def _name(directory: store.RunDirectory, whom: str) -> None:
    rows = directory.read_jsonl("resolved.jsonl")
    directory.replace_jsonl("resolved.jsonl", [{**r, "settings": {**r["settings"], "notify": whom}} for r in rows])


def test_a_command_is_told_once_in_a_while(ended: store.RunDirectory, tmp_path: Path) -> None:
    """At the end of a run, and again only after a pause; fails without the limit, or without what is told."""
    said = tmp_path / "said"
    _name(ended, f'echo "$DESCENTLAB_STATE $DESCENTLAB_TEXT" >> {said}')
    notify.tell(ended)
    notify.tell(ended)
    assert said.read_text() == f"done training: 2 done in {ended.path.resolve()}\n"
    long_ago = time.time() - notify.PAUSE_S - 1
    os.utime(ended.path / store.directory.TOLD, (long_ago, long_ago))
    notify.tell(ended)
    assert len(said.read_text().splitlines()) == 2


def test_a_command_that_fails_is_a_note(ended: store.RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    _name(ended, "echo no such channel >&2; exit 3")
    notify.tell(ended)
    assert "nobody was told" in capsys.readouterr().err
    assert "no such channel" in ended.read_jsonl("events.jsonl")[-1]["message"]


def test_a_webhook_gets_json(ended: store.RunDirectory) -> None:
    got: list[dict[str, str]] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        _name(ended, f"http://127.0.0.1:{server.server_port}/hook")
        notify.tell(ended)
        thread.join(10)
    assert got == [{"text": f"training: 2 done in {ended.path.resolve()}"}]
